"""SparseVLM: the text that the image is about votes, and what is dropped returns in clusters (arXiv:2410.04417)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from hf_compress import budget
from hf_compress.methods.base import DecoderMethod, check_layers, check_number
from hf_compress.methods.question import behind_images
from hf_compress.methods.recycling import recycle
from hf_compress.registry import register
from hf_compress.signals import Assignment, DecoderView

# Visual rows of 576 behind the three cuts, recycled ones among them, of the four published settings.
PUBLISHED = ((309, 204, 113), (312, 117, 39), (249, 55, 27), (82, 32, 18))
LEVELS = ((576, 576, 576), *PUBLISHED, (0, 0, 0))


@register("sparsevlm", stage="decoder", kind="merging", paper="arXiv:2410.04417", needs={"visual"})
@dataclass
class SparseVLM(DecoderMethod):
    """Three cuts by the attention of the text that the image is about; what is dropped returns in a few clusters.

    Raters are the rows t of text behind the last image whose share r_t, the mean over visual rows v of the softmax over
    text of E_v . E_t, E (S, D) being what comes into the language model, is above the mean of all r. Before a cut the
    visual rows are ranked by what the raters attend to in the layer just run (mean over heads and raters). Of D that
    are dropped the floor(`recycled` D) + 1 best ranked, x, form floor(x / 10) + 1 clusters (`density_peaks`, as many
    neighbours as clusters), whose means stay at the places of their centres; the others vanish. Clusters count in the
    budget, and are visual rows like others at the next cut. A row that the answer is predicted from stays as it is.

    Counts behind the cuts are interpolated between the four published settings (309, 204, 113 of 576 rows for "192",
    and so on), everything, and nothing, so that their average over layers meets `ratio`. Cuts are made behind layers 2,
    6 and 15 of 32, and in proportion in other models.

    The release appends clusters behind the other visual rows and numbers all rows anew; here rows keep their places
    and positions. Its paper lets the rank of the attention decide how many are dropped, its code has the lists. Of
    SparseVLM v2.0 (no recycling, attention without the bias of rotations, 14 heads) nothing is here, but for
    `recycled=0`, which drops without clusters.

    On the built-in LLaVA (100 questions) 98 and 94 % are right with 50 and 75 % removed (`fastv` 98 and 96, random 94
    and 74). On the built-in Qwen2.5-VL it loses, 75 and 64 % where random gives 93 and 83: likeness of embeddings there
    names one to three words of the question, often articles, as raters. Were all its text raters, or the last row
    alone, 95 of 100 would be right with half removed; clusters make no difference (`recycled=0`: 76). So it does on
    clips of the built-in video model, which is its descendant: 62 and 45 %, random 81 and 67 (200 questions).

    Source: SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, ICML 2025,
    arXiv:2410.04417. Cost: V rows of text products at the entry, the attention rows of the raters at each cut, and
    O(x^2 D) for the clusters, sample by sample.

    Args:
        layers: one to three first short layers, ascending; default 3, 7 and 16 of 32, in proportion. Fewer than three
            take the counts behind the last cuts.
        recycled: the share of dropped rows that form clusters, below 1; 0: none.

    Raises:
        ValueError: a knob is none of its values, or the ratio is out of reach of these cuts.
    """

    layers: Sequence[int] | None = None
    recycled: float = 0.3

    example = {"ratio": 0.4}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("recycled", self.recycled, 0, 1, below=True)
        if self.layers is not None:
            check_layers("layers", self.layers)
            self.layers = tuple(self.layers)
            if len(self.layers) > 3:
                raise ValueError(f"layers={self.layers!r} must be at most three layers, one for each cut")

    def boundaries(self, layers: int) -> Sequence[int]:
        at = self.layers or tuple(round(Fraction(i * layers, 32)) + 1 for i in (2, 6, 15))
        if at[-1] >= layers or len(set(at)) < len(at):
            raise ValueError(f"layers={self.layers!r} does not fit a decoder of {layers} layers; name others")
        return at

    def plan(self, layers: int, tokens: int, ratio: Fraction) -> dict[int, int]:
        at = self.boundaries(layers)

        def counts(knob: Fraction) -> list[int]:
            """From nothing (0) over the published settings to everything (5)."""
            step = min(int(knob), len(LEVELS) - 2)
            low, high = (LEVELS[-i - step][-len(at) :] for i in (1, 2))
            found = [tokens * (a + (knob - step) * (b - a)) / 576 for a, b in zip(low, high)]
            return [min(tokens, max(1, round(n))) for n in found]

        return budget.cuts(at, layers, tokens, ratio, counts, len(LEVELS) - 1)

    def enter(self, view: DecoderView) -> None:
        text, rates = behind_images(view), torch.zeros_like(view.valid)
        for b, (asks, shows) in enumerate(zip(text, view.visual)):
            if bool(shows.any()):
                x = view.hidden[b].float()
                rates[b, asks] = raters(x[shows], x[asks])
        view.memory["raters"] = rates

    def score(self, view: DecoderView) -> Tensor:
        return view.attention(source="own", voters=view.memory["raters"])

    def decide(self, view: DecoderView, keep: list[int] | None) -> Assignment | None:
        assert keep is not None
        return recycle(view, self.score(view), keep, self.recycled, self.scope)


def raters(visual: Tensor, text: Tensor) -> Tensor:
    """(L,) bool: of `text` (L, D) the tokens whose mean softmax over text, by `visual` (V, D), is above the mean.

    Where all are alike none is above, and all of them rate.
    """
    share = torch.stack([(some @ text.T).softmax(-1).sum(0) for some in visual.split(256)]).sum(0)
    rates = share > share.mean()
    return rates if bool(rates.any()) else torch.ones_like(rates)
