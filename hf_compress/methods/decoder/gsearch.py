"""G-Search and P-Sigmoid: fewer visual tokens in every layer, on a searched or a sigmoid curve (arXiv:2412.00556)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from hf_compress import budget
from hf_compress.methods.base import DecoderMethod, check_choice, check_count, check_number
from hf_compress.methods.question import behind_images
from hf_compress.registry import register
from hf_compress.signals import DecoderView

FINEST = 50  # cuts of less than 1 / FINEST of the visual tokens are put together


@register("gsearch", stage="decoder", kind="dropping", paper="arXiv:2412.00556", needs={"visual"})
@dataclass
class GSearch(DecoderMethod):
    """Visual tokens fall on a sigmoid over the layers, or as a search has found; text behind the image ranks them.

    Layer l of T, from `layer` on, keeps 1 / (1 + exp(slope (l - c))) of the V visual tokens, and at least one, with c
    such that the mean over layers meets `ratio`; numbers removed are multiples of V / 50, so that not every layer is
    cut. Those stay to which the voters attend most in the layer just run, mean over heads and voters: rows of text
    behind the last image, or the last row of the prompt. Sets are nested, positions are kept.

    This is P-Sigmoid, whose exact form the paper does not give. G-Search is `hf_compress.calibrate.row_schedule`, which
    finds per layer the fewest rows that change no answer: `compress("gsearch", schedule=row_schedule(model, batches))`.

    On the built-in LLaVA (100 questions) 96 and 83 % are right with 50 and 75 % removed (random: 94 and 74).

    Source: Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction, CVPR 2025,
    arXiv:2412.00556. Cost: the attention rows of the voters in every layer before a cut, O(voters V H d).

    Args:
        layer: the first short layer.
        slope: how steep the curve is; default 16 / T, which is 0.5 for 32 layers.
        voters: "text" or "last".

    Raises:
        ValueError: a knob is none of its values, or the ratio is out of reach.
    """

    layer: int = 1
    slope: float | None = None
    voters: str = "text"

    example = {"ratio": 0.4}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("layer", self.layer)
        check_choice("voters", self.voters, ("text", "last"))
        if self.slope is not None:
            check_number("slope", self.slope, 0, above=True)

    def boundaries(self, layers: int) -> Sequence[int]:
        if self.layer >= layers:
            raise ValueError(f"layer={self.layer} must lie within the {layers} decoder layers, 1 <= layer < {layers}")
        return range(self.layer, layers)

    def plan(self, layers: int, tokens: int, ratio: Fraction) -> dict[int, int]:
        slope, step, at = self.slope or 16 / layers, max(1, tokens // FINEST), self.boundaries(layers)
        out = math.ceil(40 / slope)  # so far out there is nothing left, or all

        def counts(knob: Fraction) -> list[int]:
            """From one row to everything: the middle of the curve moves from -out (0) to layers + out."""
            shares = [_sigmoid(slope * (i - float(knob - out))) for i in at]
            return [max(1, tokens - step * round(tokens * (1 - share) / step)) for share in shares]

        return budget.cuts(at, layers, tokens, ratio, counts, 2 * out + layers)

    def score(self, view: DecoderView) -> Tensor:
        voters = behind_images(view) if self.voters == "text" else None
        return view.attention(source=self.source, voters=voters)


def _sigmoid(x: float) -> float:
    """1 / (1 + exp(x))."""
    return 0.5 * (1 - math.tanh(x / 2))
