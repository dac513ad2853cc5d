"""What the frames of a video have in common: pure functions from the cells of T frames."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.tensors.select import top_mask

__all__ = ["cell_cosines", "contiguous", "scenes", "still_windows", "transitions"]


@torch.no_grad()
def cell_cosines(x: Tensor, reference: Sequence[int]) -> Tensor:
    """(n, T, N, D) to (n, T, N) fp32: the cosine of each cell to the same one of frame `reference[t]`."""
    x = F.normalize(x.float(), dim=-1)
    return (x * x[:, list(reference)]).sum(-1)


@torch.no_grad()
def transitions(x: Tensor) -> Tensor:
    """(n, T, N, D) to (n, T - 1) fp32: the cosine of the mean of each frame to that of the next."""
    whole = F.normalize(x.float().mean(2), dim=-1)
    return (whole[:, 1:] * whole[:, :-1]).sum(-1)


@torch.no_grad()
def scenes(similarity: Tensor, threshold: float, least: int) -> Tensor:
    """(n, T) int64: the scene of each frame, numbered from 0 in the order of time.

    A scene ends wherever the similarity (n, T - 1) to the next frame is below the threshold, and at the lowest ones
    (ties: the earlier) until there are `least` scenes, or one per frame.
    """
    ends = (similarity < threshold) | top_mask(-similarity, least - 1)
    return F.pad(ends.long().cumsum(1), (1, 0))


@torch.no_grad()
def still_windows(still: Tensor) -> tuple[list[int], int]:
    """Windows of T frames in which most cells need to be told once only, by dynamic programming.

    A window of m frames saves m - 1 tokens for each cell that is still in all of it. Of equally good partitions the
    last frames stand alone, else in the shortest window. Cost O(T^2 * N).

    Args:
        still: (T - 1, N) bool, cells that are alike in a frame and the next.

    Returns:
        the lengths of the windows, in the order of time, and how many tokens they save.
    """
    last, best, lengths = len(still), [0], [1]  # of the frames up to each one: tokens saved, length of the last window
    counts = [still[s:].long().cumprod(0).sum(1).tolist() for s in range(last)]  # by first frame and further frames
    for end in range(1, last + 1):
        saved, length = best[-1], 1
        for start in range(end - 1, -1, -1):
            gain = (best[start - 1] if start else 0) + counts[start][end - start - 1] * (end - start)
            if gain > saved:
                saved, length = gain, end - start + 1
        best.append(saved)
        lengths.append(length)
    out, end = [], last
    while end >= 0:
        out.append(lengths[end])
        end -= lengths[end]
    return out[::-1], best[-1]


def contiguous(labels: Sequence[int]) -> list[int]:
    """Lengths of stretches of frames, in the order of time, out of the label of each frame.

    Of every label its longest runs stay, if they have more than one frame; the frames between them join the longer of
    the two neighbours (ties: the earlier). All frames are one stretch where nothing stays.
    """
    runs = [(label, len(list(mine))) for label, mine in groupby(labels)]
    longest = {label: max(n for other, n in runs if other == label) for label, _ in runs}
    stays = [n == longest[label] > 1 for label, n in runs]
    kept = [(i, runs[i][1]) for i in range(len(runs)) if stays[i]]
    if not kept:
        return [len(labels)]
    out = [n for _, n in kept]
    for i, (_, n) in enumerate(runs):
        if not stays[i]:
            behind = sum(at < i for at, _ in kept)  # of the stretches, those that are earlier
            later = behind < len(kept) and (behind == 0 or kept[behind][1] > kept[behind - 1][1])
            out[behind if later else behind - 1] += n
    return out
