"""SkipDecode: the later a token is generated, the fewer layers it goes through (arXiv:2307.02628)."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor

from hf_compress import budget
from hf_compress.methods.base import DecoderMethod, check_count
from hf_compress.registry import register
from hf_compress.signals import DecoderView, Read


@register("skipdecode", stage="decoder", kind="skipping", paper="arXiv:2307.02628")
@dataclass
class SkipDecode(DecoderMethod):
    """Generated tokens go through fewer and fewer layers, all sequences of a batch through the same ones.

    The prompt goes through all T layers. The t-th token behind it goes through e(t), from T down to e(`length` - 1) in
    a straight line, and further ones through as many as that: the `warmup` lowest layers and the highest e(t) -
    `warmup`; those between are not run. As e never rises, a layer that a token goes through has stored all tokens
    before it. The e(t) are integers that sum to (1 - `ratio`) T `length`, rounded to a whole number. In training the
    answers of a sample go through the same layers as if they were generated one behind the other.

    The authors do not say where their budgets begin and end; the line begins at T here. Without fine-tuning it costs
    quality on most models, as layers meet states that they have never seen.

    Source: SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference,
    arXiv:2307.02628. Cost: none; what it saves are layers of decode steps, nothing of the prompt.

    Args:
        length: how many generated tokens the budget is for.
        warmup: how many of the lowest layers every token goes through.

    Raises:
        ValueError: a knob is no integer of at least 1, or the ratio would leave a token fewer than `warmup` + 1 layers.
    """

    length: int = 64
    warmup: int = 1

    waits: ClassVar[bool] = True
    example = {"ratio": 0.25, "length": 4}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("length", self.length)
        check_count("warmup", self.warmup)

    def boundaries(self, layers: int) -> Sequence[int]:
        return range(self.warmup, layers - 1)

    def reads(self, depth: int) -> set[Read]:
        return set()

    def removable(self, view: DecoderView) -> Tensor:
        return view.valid & ~view.prompt

    def units(self, images: int) -> int:
        return 1

    def idle(self, layers: int, ratio: Fraction, nth: int) -> Collection[int]:
        most = depths(layers, self.length, self.warmup, ratio)[min(nth, self.length - 1)]
        return range(self.warmup, layers - most + self.warmup)

    def plan(self, layers: int, tokens: int, ratio: Fraction) -> dict[int, int]:
        idle = [self.idle(layers, ratio, nth) for nth in range(min(tokens, self.length))]
        through = {layer: sum(layer not in out for out in idle) for layer in self.boundaries(layers)}
        last = idle[-1] if idle else ()
        return {layer: n if layer in last else tokens for layer, n in through.items()}

    def score(self, view: DecoderView) -> Tensor:
        return -view.first.float()


@functools.lru_cache(maxsize=64)
def depths(layers: int, length: int, warmup: int, ratio: Fraction) -> tuple[int, ...]:
    """Layers that each of `length` tokens goes through: a falling line from all `layers`, (1 - `ratio`) on average.

    Raises:
        ValueError: the last would go through fewer than `warmup` + 1.
    """
    last = 2 * (1 - ratio) * layers - layers
    if last < warmup + 1:
        most = Fraction(max(0, layers - warmup - 1), 2 * layers)
        raise ValueError(
            f"ratio={float(ratio):.4g} cannot be reached from {layers} layers down to warmup={warmup} and one more: "
            f"reachable is 0 <= ratio <= {float(most):.4g}"
        )
    steps = max(1, length - 1)
    line = [layers - (layers - last) * Fraction(t, steps) for t in range(length)]
    total = round(length * layers * (1 - ratio))
    return tuple(budget.shares(total, line, [layers] * length))
