"""ZipVL: as many rows take part in the attention of a layer as hold most of its mass (arXiv:2410.08584)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from hf_compress import budget
from hf_compress.methods.base import DecoderMethod, check_choice, check_count, check_number
from hf_compress.registry import register
from hf_compress.signals import DecoderView, Read
from hf_compress.tensors.rows import best_rows


@register("zipvl", stage="decoder", kind="skipping", paper="arXiv:2410.08584")
@dataclass
class ZipVL(DecoderMethod):
    """In every layer the important rows of the prompt, text or not, attend among themselves; the others skip attention.

    a_j is what row j receives from probe rows of the prompt in this very layer, mean over heads: the `recent` last rows
    and `spread` more, evenly spaced. With `ratio="adaptive"` p is the smallest number of rows whose a sum to the share
    `mass` of the whole, in each layer and sample; with a ratio p is the same in all layers. The p rows with the highest
    a_j / (probes that can see j) are important: late rows are seen by few. The rows that the answer is predicted from
    always are. All rows go through the MLP. `ratio` is the share of rows that attention is spared; the work of the MLP,
    most of that of a prompt of a few thousand rows, stays.

    Entries of the cache of a layer whose rows were not important there leave it (`discard`), as in the second version
    of the paper; the first stores them in 2 bits, which cache methods here do in their own ways. What is generated
    stays.
    The authors draw the spread probes at random; evenly spaced ones need no seed, and are the same in every batch.
    Their code was not to be had: 64 and 64 probes and .975 are as remembered from the paper.

    Source: ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification, ICCV 2025,
    arXiv:2410.08584. Cost: in every layer the attention rows of the probes, O(128 L H d), and copies of what is
    gathered.

    Args:
        mass: the share of attention, of the rule.
        recent, spread: how many probes.
        discard: whether entries leave the cache.

    Raises:
        ValueError: a knob is none of its values.
    """

    mass: float = 0.975
    recent: int = 64
    spread: int = 64
    discard: bool = True

    adaptive: ClassVar[bool] = True
    example = {"ratio": 0.4, "recent": 2, "spread": 3}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("mass", self.mass, 0, 1, above=True)
        check_count("recent", self.recent)
        check_count("spread", self.spread, least=0)
        check_choice("discard", self.discard, (True, False))
        if self.scope == "per_image":
            raise ValueError("scope='per_image' shares a budget over images, and rows of text are chosen here, too")

    @property
    def discards(self) -> bool:  # type: ignore[override]
        return self.discard

    def boundaries(self, layers: int) -> Sequence[int]:
        return range(layers)

    def reads(self, depth: int) -> set[Read]:
        return set()

    def removable(self, view: DecoderView) -> Tensor:
        return view.prompt & ~view.speaks

    def units(self, images: int) -> int:
        return 1

    def plan(self, layers: int, tokens: int, ratio: Fraction) -> dict[int, int]:
        counts = budget.shares(round(layers * tokens * (1 - ratio)), [1] * layers, [tokens] * layers)
        return dict(enumerate(counts))

    def among(self, view: DecoderView, keep: list[int] | None) -> Tensor | None:
        asks = probes(view.prompt, self.recent, self.spread)
        mass = view.attention(source="own", voters=asks).masked_fill(~view.prompt, 0)  # (B, S)
        seen_by = asks.flip(1).long().cumsum(1).flip(1).clamp(min=1)
        if keep is None:
            fixed = (view.prompt & ~view.removable).sum(1).tolist()
            keep = [max(0, n - more) for n, more in zip(holding(mass, self.mass), fixed)]
        return best_rows(mass / seen_by, view.removable, keep)[:, None]


def probes(prompt: Tensor, recent: int, spread: int) -> Tensor:
    """(B, S) bool: of the rows that are True in `prompt` (B, S) the last ones, and the first of so many equal parts."""
    place, count = prompt.long().cumsum(1) - 1, prompt.sum(1, keepdim=True)
    part = place * spread // count.clamp(min=1)
    first = part != (place - 1) * spread // count.clamp(min=1) if spread else torch.zeros_like(prompt)
    return prompt & ((place >= count - recent) | first)


def holding(mass: Tensor, share: float) -> list[int]:
    """The smallest numbers of rows that hold `share` of the mass (B, S) of each sample."""
    sums = mass.sort(descending=True).values.cumsum(1)
    return ((sums < share * sums[:, -1:]).sum(1) + 1).tolist()
