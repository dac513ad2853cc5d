"""LLaVolta: the rows of an image are pooled between two layers (arXiv:2406.20092)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress import budget
from hf_compress.methods.decoder.fastv import FastV
from hf_compress.registry import register
from hf_compress.signals import Assignment, DecoderView, Read
from hf_compress.tensors.merge import pool1d


@register("llavolta", stage="decoder", kind="merging", paper="arXiv:2406.20092", needs={"visual"})
@dataclass
class LLaVolta(FastV):
    """One cut before a decoder layer, where windows of visual rows become their means.

    Layers 0 .. layer-1 run in full; before `layer` the rows of every image, in raster order, are cut into windows that
    are as equal as can be (stride S where S divides their number), and a window becomes the mean of its states
    (B, S, D) at the position of its middle row, rounded down. Budgets are those of `fastv`: a stride of S from `layer`
    on removes (T - layer) / T * (1 - 1 / S) of T layers; images share them in proportion. Rows that answers are
    predicted from stay as they are.

    Source: "Efficient Large Multi-modal Models via Visual Context Compression", NeurIPS 2024, arXiv:2406.20092
    (Beckschen/LLaVolta). There it is what makes training cheap: `CompressionCallback("llavolta")` runs its four stages
    by budget, (8, 2), (2, 2), (2, 16) of 32 layers and none in the end, `layer` being the same in all of them here; the
    trained model then reads all tokens. Cost: none.

    Without training it loses to rows drawn at random, as a mean of unlike states is like none of them: the embedded
    LLaVA answers 81 and 15 of 100 questions with 50 and 75 % removed from layer 1 of 6 on (random: 94 and 74).

    Args:
        layer: K, the first short layer.

    Raises:
        ValueError: `layer` is no integer of at least 1, or the ratio is out of reach of one cut.
    """

    def reads(self, depth: int) -> set[Read]:
        return set()

    def removable(self, view: DecoderView) -> Tensor:
        return view.visual & ~view.speaks

    def decide(self, view: DecoderView, keep: list[int] | None) -> Assignment | None:
        assert keep is not None
        owner = torch.arange(view.valid.shape[1], device=view.valid.device).where(view.valid, -1)
        for b, rows in enumerate(view.removable):
            image = view.image[b, rows]
            sizes = torch.bincount(image).tolist()
            for i, n in enumerate(budget.shares(min(keep[b], len(image)), [float(s) for s in sizes], sizes)):
                at = (rows & (view.image[b] == i)).nonzero()[:, 0]
                if n:
                    groups, middle = pool1d(len(at), n, at.device)
                    owner[b, at] = at[middle[groups]]
                else:
                    owner[b, at] = -1
        return Assignment.owned(owner)
