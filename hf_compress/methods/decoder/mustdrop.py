"""MustDrop: what neither the text as a whole nor any of its rows looks at goes, key tokens stay (arXiv:2411.10803)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from hf_compress import budget
from hf_compress.methods.base import Part, VisionMethod, check_choice, check_number
from hf_compress.methods.decoder.pyramiddrop import PyramidDrop
from hf_compress.methods.question import behind_images
from hf_compress.registry import register
from hf_compress.signals import Assignment, DecoderView, Read, Tokens
from hf_compress.tensors.rows import best_rows
from hf_compress.tensors.select import top_mask


@register("mustdrop", stage="decoder", kind="dropping", paper="arXiv:2411.10803", needs={"visual", "cls"})
@dataclass
class MustDrop(PyramidDrop):
    """Four cuts by what the text as a whole, and what any of its rows, attends to; key tokens of the tower stay.

    M (t, V) is what each of the t rows of text behind the last image attends to among the V visual rows, in the layer
    just run, mean over heads; G_j = sum over t of M, I_j = max over t. By its thresholds the method drops the rows with
    G_j < `share` sum(G) and I_j < `peak` (`ratio="adaptive"`). With a ratio those with the highest max(G_j / (share
    sum(G)), I_j / peak) stay, which is the same order: floor(V q^s) behind the s-th cut, q such that the mean over
    layers meets the ratio. The `key` V tokens of every image that the [CLS] row of the tower, mean over heads, attends
    to most come first in any case. Rows that go leave the caches of the layers run before, too (`truncate`).

    Cuts are made behind layers 2, 6, 10 and 14 of 32, in proportion in other models. Positions are kept. The authors
    also merge alike windows of patches behind the first block of the tower, which is not here: how much that removes
    nobody knows before. They number rows anew, and leave the caches of the first two layers whole.

    On the built-in LLaVA (100 questions) 100 and 87 % are right with 50 and 75 % removed (random: 94 and 74).

    Source: Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model, arXiv:2411.10803.
    Cost: the attention rows of the text at every cut.

    Args:
        layers: first short layers, ascending; default 3, 7, 11 and 15 of 32, in proportion.
        share, peak: thresholds; the authors take .001 and .001 for 192 tokens, .0012 and .001 for 128, .011 and .01 for
            64.
        key: the share of tokens of every image that stay.
        truncate: whether caches of earlier layers are cut, too.

    Raises:
        ValueError: a knob is none of its values, or the ratio is out of reach of these cuts.
    """

    share: float = 0.001
    peak: float = 0.001
    key: float = 0.08
    truncate: bool = True

    source: ClassVar[str] = "own"
    adaptive: ClassVar[bool] = True
    example = {"ratio": 0.4, "truncate": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("share", self.share, 0, 1, above=True)
        check_number("peak", self.peak, 0, 1, above=True)
        check_number("key", self.key, 0, 1, below=True)
        check_choice("truncate", self.truncate, (True, False))

    @property
    def trims(self) -> bool:  # type: ignore[override]
        return self.truncate

    def parts(self, layers: int, tokens: int | None, ratio: Fraction | None, keep: int | None) -> Mapping[str, Part]:
        """The tower says which tokens are key; the language model drops."""
        return {"vision": (MustDropKeys(key=self.key), Fraction(0), None), "decoder": (self, ratio, keep)}

    def boundaries(self, layers: int) -> Sequence[int]:
        if self.layers is not None:
            return super().boundaries(layers)
        at = dict.fromkeys(round(Fraction(i * layers, 32)) + 1 for i in (2, 6, 10, 14))
        return tuple(i for i in at if i < layers)

    def decide(self, view: DecoderView, keep: list[int] | None) -> Assignment | None:
        above, key = self.above(view), view.memory["key"] > 0
        if keep is None:
            stays = view.removable & ((above >= 1) | key | view.speaks)
        else:
            score = (above / (1 + above) + key).masked_fill(view.speaks, torch.inf)
            stays = best_rows(score, view.removable, keep, view.image if self.scope == "per_image" else None)
        return Assignment.selection(view.valid & ~view.removable | stays)

    def above(self, view: DecoderView) -> Tensor:
        """(B, S) how far above its thresholds each visual row is: those from 1 on stay."""
        asks = behind_images(view)
        mean, peak = (view.attention(source=self.source, voters=asks, over=over) for over in ("mean", "max"))
        total = (mean * view.visual).sum(1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
        return torch.maximum(mean / (self.share * total), peak / self.peak)


@dataclass
class MustDropKeys(VisionMethod):
    """Which tokens of each image are key: ceil(`key` N) of N, by the [CLS] row of the tower. All tokens stay.

    Args:
        key: the share of them.
    """

    key: float = 0.08

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", 0, "attention")}

    def note(self, tokens: Tokens) -> dict[str, Tensor]:
        count = (tokens.count * budget.check_share(self.key, "key")).__ceil__()
        return {"key": top_mask(tokens.attention(surrogate="all").mean(1), count).float()}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        raise AssertionError("it has no budget, and is not asked")
