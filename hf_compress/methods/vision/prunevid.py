"""PruneVid, before the language model: still cells of a segment are told once, and the rest is clustered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_compress.budget import check_share, shares
from hf_compress.methods.base import VisionMethod, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.cluster import condense, density_peaks
from hf_compress.tensors.counts import mean_cosine
from hf_compress.tensors.frames import contiguous
from hf_compress.tensors.merge import by_owner
from hf_compress.tensors.select import identity

__all__ = ["PruneVid"]

NEIGHBOURS = 7  # of a frame or token, over which its density is taken


@register("prunevid", stage="vision", kind="video", paper="arXiv:2412.16117", needs={"visual", "video"})
@dataclass
class PruneVid(VisionMethod):
    """Cells that stand still over a segment become one token each; these, and what moves in each frame, are clustered.

    On the embeddings (n, T * N, D) of a whole video: 1. The means of its frames are clustered (`density_peaks`, 7
    neighbours) into floor(T * `segments`), at least one, and made contiguous in time (`contiguous`). 2. A cell is still
    if its mean cosine over all pairs of frames of the segment is above `threshold`; it becomes the mean of its frames,
    in the slot of the first one. A segment of one frame has no still cells. 3. The K tokens are shared over what is
    left, the still cells of each segment and the other cells of each frame, in proportion. 4. Each of these sets is
    clustered into as many, plain means of the clusters in the slots of their centres. In the order of time. `ratio` is
    the fraction of the whole video. Cost O(S^2 * D) for S still cells, O(N^2 * D) per frame.

    An image is a segment of one frame: K clusters of its tokens. That is not what it is for: of the built-in Qwen2.5-VL
    it leaves 60 and 46 % right answers about still scenes with 50 and 75 % removed, where `random` leaves 93 and 83 %
    and `avgpool` 94 and 90 (100 questions). Its centres miss what is asked about: a token that is like few others, such
    as one of an object, has next to no density. Of the tokens that show an object 23 and 12 % are centres, where
    `random` keeps 49 and 23 % (20 scenes); the others end up in means with the background. Of clips of the built-in
    video model it answers 86 % with half removed (random 81), 65 % with 75 % removed (67), 52 with 90 (47): 8 % of its
    centres show an object then (random: 19), and questions about places and directions fall behind.

    Source: "PruneVid: Visual Token Pruning for Efficient Video Large Language Models", arXiv:2412.16117, its part
    before the language model. There half of every set of more than 14 tokens stays, and the question then prunes in
    a layer of the language model, which is not there; here the sets share an exact budget. Where still cells alone save
    more than is asked, only the stillest of a video are merged.

    Args:
        segments: how many segments, as a share of the frames.
        threshold: mean cosine above which a cell stands still.

    Raises:
        ValueError: `segments` is not a number of [0, 1), `threshold` not one from -1 to 1.
    """

    segments: float = 0.25
    threshold: float = 0.8

    scope: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.segments, "segments")
        check_number("threshold", self.threshold, -1, 1)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Kept tokens (n, K), groups and weights (n, T * N)."""
        n, V, frames = len(tokens), tokens.count, len(tokens.grids)
        if keep == V:
            return Assignment(identity(n, V, tokens.device))
        x = tokens.embeddings.detach().float().unflatten(1, (frames, -1))
        some = max(1, int(frames * check_share(self.segments, "segments")))
        labels = density_peaks(x.mean(2), some, NEIGHBOURS)[1].tolist()
        owner, weight = (
            torch.stack(both)
            for both in zip(*[self.reduced(video, contiguous(mine), keep) for video, mine in zip(x, labels)])
        )
        groups, kept = by_owner(owner)
        return Assignment(kept, groups, weight)

    def reduced(self, x: Tensor, lengths: list[int], keep: int) -> tuple[Tensor, Tensor]:
        """Of each token of one video (T, N, D) the token whose slot it goes to, and its weight there."""
        (frames, N, _), start, units = x.shape, 0, []
        at = torch.arange(frames * N, device=x.device).view(frames, N)
        for still, length in zip(self.still(x, lengths, frames * N - keep), lengths):
            mine = at[start : start + length]
            units += [mine.T[still], *(frame[~still][:, None] for frame in mine)]
            start += length
        sizes = [len(cells) for cells in units]
        owner, weight = torch.full((frames * N,), -1, device=x.device), torch.zeros(frames * N, device=x.device)
        for cells, count in zip(units, shares(keep, [float(s) for s in sizes], sizes)):
            owner[cells], weight[cells] = condense(x.flatten(0, 1), cells, count, NEIGHBOURS)
        return owner, weight

    def still(self, x: Tensor, lengths: list[int], most: int) -> Tensor:
        """(segments, N) bool: the still cells, the stillest as long as they save no more than `most` tokens."""
        steady = torch.stack([mean_cosine(mine.transpose(0, 1)) for mine in x.split(lengths)])
        steady[torch.tensor(lengths, device=x.device) == 1] = -torch.inf
        saves = torch.tensor(lengths, device=x.device)[:, None].expand_as(steady) - 1
        order = steady.flatten().argsort(descending=True, stable=True)
        fits = saves.flatten()[order].cumsum(0) <= most
        return torch.zeros_like(fits).scatter(0, order, fits).view_as(steady) & (steady > self.threshold)
