"""HiRED: an early look at the whole image shares the budget over its crops, a late look at each crop picks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_compress.budget import shares
from hf_compress.methods.base import VisionMethod, check_choice, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.merge import pool1d
from hf_compress.tensors.regions import Box, region_sums
from hf_compress.tensors.select import top_by_part, top_mask, top_sorted

__all__ = ["HiRED"]


@register("hired", stage="vision", kind="crops", paper="arXiv:2408.10945", needs={"visual", "cls", "places"})
@dataclass
class HiRED(VisionMethod):
    """Crops keep more where [CLS] of the whole image looks early; what it looks at late stays.

    On the tokens of all crops of an image, the whole image in small first: 1. the whole image keeps the share `whole`
    of the budget, as far as it has tokens. 2. The crops share the rest in proportion to what [CLS] of the whole image
    attends to in the first block of the tower within the region of each (head sum). 3. Each keeps the tokens that its
    own [CLS] attends to most in the block whose features the projector reads; raster order. What a crop cannot hold
    goes to the others. An image of one crop, and every frame, keeps its highest. Cost: two rows of attention per crop,
    O(N * d) per head each.

    Source: "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models",
    arXiv:2408.10945. The paper sums over the region of each crop; its code counts how many of the highest attended
    tokens lie in each of as many runs of consecutive tokens: `allocation="code"`. The code rounds every count down and
    so keeps fewer than asked, ours are exact by largest remainders; it drops newlines, here they are no tokens.
    Encoders without [CLS], which neither covers, take the attention row of their mean query.

    Args:
        allocation: "region" (the paper), or "code".
        whole: share of the budget that the whole image in small gets, from 0 to 1.

    Raises:
        ValueError: `whole` is not a number from 0 to 1, `allocation` or `positions` none of its values.
    """

    allocation: str = "region"
    whole: float = 0.5

    scope: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("allocation", self.allocation, ("region", "code"))
        check_number("whole", self.whole, 0, 1)

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", back, "attention") for back in (0, max(0, depth - 1))}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K) of the highest scores by crop; ties go to the lower index."""
        late = tokens.attention(surrogate="mean").sum(1)
        if len(tokens.grids) == 1:
            return Assignment(top_sorted(late, keep))
        h, w = tokens.grids[0]
        early = tokens.attention(tokens.depth - 1, surrogate="mean").sum(1)[:, : h * w].view(-1, h, w)
        counts = self.counts(early, [h * w for h, w in tokens.grids], tokens.boxes, keep)
        return Assignment.selection(top_by_part(late, tokens.place[..., 0], torch.tensor(counts, device=late.device)))

    def counts(self, view: Tensor, sizes: Sequence[int], boxes: Sequence[Box], keep: int) -> list[list[int]]:
        """How many tokens of every crop stay, the whole image first; they sum to `keep`.

        Args:
            view: (n, h, w) early attention on the whole image; sizes, boxes: of all crops, the whole image first.
        """
        rest, first = shares(keep, [1 - self.whole, self.whole], [sum(sizes[1:]), sizes[0]])
        if self.allocation == "region":
            score = region_sums(view, boxes[1:])
        else:
            marks = int(sizes[0] * (1 - self.whole))
            runs, _ = pool1d(sizes[0], len(sizes) - 1, view.device)
            score = view.new_zeros(len(view), len(sizes) - 1)
            score.index_add_(1, runs, top_mask(view.flatten(1), marks).float())
        return [[first, *shares(rest, mine, sizes[1:])] for mine in score.tolist()]
