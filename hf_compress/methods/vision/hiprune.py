"""HiPrune: what the middle of the tower looks at, its neighbours, and what the end of the tower looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.methods.base import VisionMethod, check_choice, check_count, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.select import identity, top_sorted

__all__ = ["HiPrune"]

MIDDLE = 9 / 23  # of the blocks in front of the features: the 9th of 23 in CLIP-L, the 2nd of the 4 full ones of Qwen


@register("hiprune", stage="vision", kind="saliency", paper="arXiv:2508.00553", needs={"visual", "cls"})
@dataclass
class HiPrune(VisionMethod):
    """Tokens of objects with their neighbours, filled up by those that late blocks attend to.

    On the attention (n, H, N) that tokens receive on average from all patches, mean over heads: 1. the n_a =
    round(K * objects / 5) highest ones of a block in the middle of the tower are anchors, which lie on objects. 2. The
    tokens above, below, left and right of them stay too. 3. The highest ones of the block whose features the projector
    reads, which have gathered what the whole image says, fill up to K; raster order. Every crop and frame has its own
    K; n_a is at most K // 5, so that all neighbours have room. Cost O(N^2 * D) for either block, streamed; no map.

    Source: "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
    arXiv:2508.00553. The code looks for neighbours in the sequence, so that those of a row's end lie in the next row:
    `wrap` does as it does. Its Qwen2.5-VL takes the two middle ones of the blocks that see the whole image by number;
    here the same share of depth is the middle of every tower. It needs patches that look at objects: those of the
    embedded LLaVA do not, in whose last block the attention that a token receives goes against that of [CLS]
    (correlation -.20), so that at 11 % of the tokens 23 of 100 questions are answered (random tokens 53, `fastervlm`
    100); on the embedded Qwen2.5-VL 93 are (random 61, `fastervlm` 93).

    Args:
        objects: share of the K tokens that anchors and their neighbours take at most.
        block: which block finds the anchors, counted from 0 over those that see the whole image; None: the middle.
        wrap: neighbours in the sequence instead of on the grid.

    Raises:
        ValueError: `objects` is not a number from 0 to 1, `block` not an integer of at least 0, or one that the tower
            does not have; `wrap` is not a bool.
    """

    objects: float = 0.1
    block: int | None = None
    wrap: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("objects", self.objects, 0, 1)
        if self.block is not None:
            check_count("block", self.block, least=0)
        check_choice("wrap", self.wrap, (True, False))

    def back(self, depth: int) -> int:
        """Blocks between the one that finds the anchors and the features, of a tower of so many."""
        if self.block is not None and 0 < depth <= self.block:
            raise ValueError(f"block={self.block}: the vision tower has {depth} that see the whole image, from 0 on")
        block = max(0, round(MIDDLE * depth) - 1) if self.block is None else self.block
        return max(0, depth - 1 - block)

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", back, "attention") for back in (0, self.back(depth))}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K); ties go to the lower index."""
        if keep == tokens.count:
            return Assignment(identity(len(tokens), keep, tokens.device))
        late, anchors = tokens.attention(rows="all").mean(1), min(round(keep * self.objects / 5), keep // 5)
        if anchors:
            middle = tokens.attention(self.back(tokens.depth), rows="all").mean(1)
            sure = around(top_sorted(middle, anchors), tokens.grid, self.wrap)
            late = late.scatter(1, sure, torch.inf)
        return Assignment(top_sorted(late, keep))


def around(at: Tensor, grid: tuple[int, int], wrap: bool = False) -> Tensor:
    """(n, 5 * a): tokens (n, a) of a grid and those above, below, left and right, for each that is not there itself."""
    h, w = grid
    shift = torch.tensor([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], device=at.device)
    near = at[..., None] + shift[:, 0] * w + shift[:, 1]
    if wrap:
        return near.clamp(0, h * w - 1).flatten(1)
    row, column = (at // w)[..., None] + shift[:, 0], (at % w)[..., None] + shift[:, 1]
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    return torch.where(inside, near, at[..., None]).flatten(1)
