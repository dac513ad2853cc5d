"""HoliTom, before the language model: what stands still over a window of frames is told once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_compress.budget import check_share, shares
from hf_compress.methods.base import VisionMethod, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.cluster import condense
from hf_compress.tensors.frames import cell_cosines, still_windows
from hf_compress.tensors.merge import by_owner
from hf_compress.tensors.select import identity, top_sorted

__all__ = ["HoliTom"]

NEIGHBOURS = 7  # of a token, over which its density is taken


@register("holitom", stage="vision", kind="video", paper="arXiv:2505.21334", needs={"visual", "video", "cls"})
@dataclass
class HoliTom(VisionMethod):
    """Cells that stand still over a window of frames become one token each; of what moves the salient tokens stay.

    On the embeddings (n, T * N, D) of a whole video: 1. A cell is still from a frame to the next if its cosine is above
    `threshold`. 2. The video is cut into the windows that save most tokens, (frames - 1) for each cell that is still in
    all of its window (`still_windows`). 3. Such a cell becomes the mean of its frames, in the slot of the first one.
    4. The K tokens are shared over what is left, the still cells of each window and the other cells of each frame, in
    proportion. 5. Of still cells those of highest density * reach stay (`density_peaks`, 7 neighbours), each `own` of
    itself and 1 - `own` of the mean of the others that are nearest to it. 6. Of the other cells of a frame those that
    the tower attends to most, and of the rest, for a share `contextual` of them, some that absorb it as in 5; what is
    in none vanishes. In the order of time. `ratio` is the fraction of the whole video. Cost O(T^2 * N) for the windows,
    O(S^2 * D) for S still cells.

    An image has nothing that stands still: it keeps what the tower attends to most, by default.

    Source: "HoliTom: Holistic Token Merging for Fast Video Large Language Models", arXiv:2505.21334, its part before
    the language model; `holitom_inner` is the one inside. The code takes .65 for a tenth of the tokens and .8 for .15
    to .25. It rounds every count up; here counts are exact. Where still cells alone save more than is asked, the code
    keeps fewer tokens; here the threshold is raised for that video until K are left.

    Args:
        threshold: cosine above which a cell stands still.
        own: what a token that others are merged into has of itself.
        contextual: share of the tokens that move which absorb others.

    Raises:
        ValueError: `threshold` is not a number from -1 to 1, `own` not one from 0 to 1, `contextual` not one of [0, 1).
    """

    threshold: float = 0.8
    own: float = 0.6
    contextual: float = 0.0

    scope: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, -1, 1)
        check_number("own", self.own, 0, 1)
        check_share(self.contextual, "contextual")

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", 0, "attention")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Kept tokens (n, K), groups and weights (n, T * N)."""
        n, V, frames = len(tokens), tokens.count, len(tokens.grids)
        if keep == V:
            return Assignment(identity(n, V, tokens.device))
        x, score = tokens.embeddings.detach().float(), tokens.attention(surrogate="all").mean(1)
        alike = cell_cosines(x.unflatten(1, (frames, -1)), [*range(1, frames), frames - 1])[:, :-1]
        owner, weight = (
            torch.stack(both) for both in zip(*[self.reduced(x[i], score[i], alike[i], keep) for i in range(n)])
        )
        groups, kept = by_owner(owner)
        return Assignment(kept, groups, weight)

    def reduced(self, x: Tensor, score: Tensor, alike: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Of each token of one video (V, D) the token whose slot it goes to, and its weight there."""
        (V, _), N = x.shape, alike.shape[1]
        lengths, still = windows(alike, self.threshold, V - keep)
        owner, weight = torch.full((V,), -1, device=x.device), torch.zeros(V, device=x.device)
        at, start, units = torch.arange(N, device=x.device), 0, []
        for length in lengths:
            one = still[start : start + length - 1].all(0) if length > 1 else torch.zeros_like(at, dtype=torch.bool)
            cells = (at[:, None] + N * torch.arange(start, start + length, device=x.device))[one]
            units += [cells, *((at + N * t)[~one][:, None] for t in range(start, start + length))]
            start += length
        sizes = [len(cells) for cells in units]
        for cells, count in zip(units, shares(keep, [float(s) for s in sizes], sizes)):
            if cells.shape[1] == 1:  # what moves
                some = int(count * check_share(self.contextual, "contextual"))
                first = cells[top_sorted(score[cells[:, 0]][None], count - some)[0], 0]
                owner[first], weight[first] = first, 1.0
                cells, count = cells[owner[cells[:, 0]] < 0], some
            owner[cells], weight[cells] = condense(x, cells, count, NEIGHBOURS, self.own)
        return owner, weight


def windows(alike: Tensor, threshold: float, most: int) -> tuple[list[int], Tensor]:
    """Lengths of windows that save `most` tokens at most, and the still cells, (T - 1, N) of cosines to the next frame.

    Above the threshold, or above the lowest higher cosine with which they do not save more.
    """
    levels = [threshold, *sorted({v for v in alike.flatten().tolist() if v > threshold})]
    low, high = 0, len(levels) - 1  # above the highest there is nothing, which saves nothing
    while low < high:
        middle = (low + high) // 2
        if still_windows(alike > levels[middle])[1] <= most:
            high = middle
        else:
            low = middle + 1
    still = alike > levels[low]
    return still_windows(still)[0], still
