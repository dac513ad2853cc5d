"""FitPrune: fitted counts per layer, ranked by what text and image attend to (arXiv:2409.10197)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import torch
from torch import Tensor

from hf_compress import budget
from hf_compress.methods.base import DecoderMethod, check_choice, check_count
from hf_compress.methods.question import behind_images
from hf_compress.registry import register
from hf_compress.signals import DecoderView

# How many of 576 visual tokens the release removes in each of 32 layers, where 20, 40, 60, 80 and 90 % of FLOPs go.
PUBLISHED = (
    (0, 0, 3, 3, 1, 1, 4, 16, 14, 15, 24, 4, 2, 3, 2, 0, 6, 0, 5, 13, 4, 19, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0),
    (0, 1, 21, 13, 14, 11, 41, 53, 29, 15, 14, 5, 1, 4, 5, 1, 26, 1, 13, 28, 6, 27, 2, 1, 0, 0, 1, 1, 2, 0, 0, 0),
    (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    (128, 127, 118, 35, 26, 8, 13, 3, 2, 1, 0, 0, 0, 2, 1, 8, 7, 8, 5, 11, 2, 6, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0),
    (262, 153, 80, 19, 13, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 1, 2, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0),
)
# The same as what is gone before each layer, from nothing to everything.
GONE = [[0, *accumulate(counts)][:32] for counts in ((0,) * 32, *PUBLISHED, (576, *[0] * 31))]


@register("fitprune", stage="decoder", kind="dropping", paper="arXiv:2409.10197", needs={"visual"})
@dataclass
class FitPrune(DecoderMethod):
    """Counts per layer that were fitted once; what text and visual tokens attend to least goes.

    In the layer just run, A (B, H, S, S) its attention, every visual row j has the mean over the rows t of text behind
    the last image of max_h A[h, t, j], and the mean over visual rows i of max_h A[h, i, j]; those with the lowest
    products of both go. Positions are kept.

    Counts are interpolated between the published settings for LLaVA-1.5-7B, stretched over the layers of the model,
    everything, and nothing, so that their mean over layers meets `ratio`. `hf_compress.calibrate.fitted_schedule` fits
    them to a model: `compress("fitprune", schedule=fitted_schedule(model, batches, ratio=...))`.

    The release drops a row between the attention of a layer and its output projection; here it goes through the MLP of
    that layer, too, which changes nothing for the rows that stay.

    Causal attention gives more to visual rows at the beginning, which more rows see: on the built-in LLaVA (100
    questions) products are right in 90 and 66 % with 50 and 75 % removed, worse than random rows (94 and 74).
    `rank="fair"` divides what visual rows attend to by how many of them see the row (100 and 95 %), `rank="text"`
    leaves it out (100 and 100 %).

    Source: Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models, AAAI 2025,
    arXiv:2409.10197. Cost: in every layer before a cut the attention rows of all visual tokens and the text, in blocks:
    about as long as its attention.

    Args:
        layer: the first short layer.
        rank: "product" (as published), "fair" or "text".

    Raises:
        ValueError: a knob is none of its values, or the ratio is out of reach.
    """

    layer: int = 1
    rank: str = "product"

    example = {"ratio": 0.4}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("layer", self.layer)
        check_choice("rank", self.rank, ("product", "fair", "text"))

    def boundaries(self, layers: int) -> Sequence[int]:
        if self.layer >= layers:
            raise ValueError(f"layer={self.layer} must lie within the {layers} decoder layers, 1 <= layer < {layers}")
        return range(self.layer, layers)

    def plan(self, layers: int, tokens: int, ratio: Fraction) -> dict[int, int]:
        at = self.boundaries(layers)

        def counts(knob: Fraction) -> list[int]:
            """From one row (0) over the published settings to everything (6)."""
            return [max(1, round(tokens * (1 - _gone(knob, i, layers)))) for i in at]

        return budget.cuts(at, layers, tokens, ratio, counts, len(GONE) - 1)

    def score(self, view: DecoderView) -> Tensor:
        text, image = attended(view)
        if self.rank == "fair":
            image = image / view.visual.long().flip(1).cumsum(1).flip(1).clamp(min=1)
        return text if self.rank == "text" else text * image


def attended(view: DecoderView) -> tuple[Tensor, Tensor]:
    """(B, S) each: what text behind the last image, and what visual rows, attend to in the layer just run.

    Means over these rows of the largest share of all heads.
    """
    voters = behind_images(view), view.visual
    text, image = (view.attention(source="own", voters=rows, of=lambda a: a.amax(1)) for rows in voters)
    return text, image


def tolerance(text: Tensor, image: Tensor) -> Tensor:
    """(N,) the tolerance from which each of N tokens may go: `text` and `image` (N,) are what it receives.

    With tolerance alpha those may go that are, by both, among the lowest that together have at most alpha of the sum.
    """
    return torch.stack([_mass(text), _mass(image)]).amax(0)


def _mass(x: Tensor) -> Tensor:
    """(N,) the share that each and all lower ones have of the sum."""
    order = x.argsort(stable=True)
    share = x[order].double().cumsum(0) / x.double().sum()
    return torch.empty_like(share).scatter_(0, order, share)


def _gone(knob: Fraction, layer: int, layers: int) -> Fraction:
    """The share of visual tokens that is gone before a layer, between two settings and between two of 32 layers."""
    step, at = min(int(knob), len(GONE) - 2), Fraction(32 * layer, layers)
    first = int(at)

    def before(counts: list[int]) -> Fraction:
        return counts[first] + (at - first) * (counts[min(first + 1, 31)] - counts[first])

    many, fewer = (before(GONE[-1 - step - i]) for i in (0, 1))
    return (many + (knob - step) * (fewer - many)) / 576
