"""A grid of tokens cut into any number of cells."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_compress.budget import shares
from hf_compress.tensors.merge import group_sum, pool1d
from hf_compress.tensors.select import row_counts

__all__ = ["Cells", "Windows", "cells", "lists", "maxima", "means", "members", "windows"]


class Cells(NamedTuple):
    """K cells of an (h, w) grid of N tokens, in raster order.

    Attributes:
        grid: (h, w).
        groups: (N,) int64, the cell of each token, every one of which has some.
        centres: (K,) int64, the middle token of each, ascending.
        boxes: (K, 4) int64: top, left, bottom, right, the last two exclusive.
    """

    grid: tuple[int, int]
    groups: Tensor
    centres: Tensor
    boxes: Tensor

    @property
    def sizes(self) -> Tensor:
        """(K,) int64: the tokens of each cell."""
        return (self.boxes[:, 2:] - self.boxes[:, :2]).prod(1)

    @property
    def near(self) -> Tensor:
        """(K, K) bool: cells that touch, be it at a corner, and each cell itself: 3 x 3 where all are alike."""
        first, end = self.boxes[:, :2], self.boxes[:, 2:]
        return ((first[:, None] <= end) & (first <= end[:, None])).all(-1)


def cells(h: int, w: int, k: int, device: torch.device | str | None = None) -> Cells:
    """An (h, w) grid cut into k cells, 1 <= k <= h * w, in the rows of `row_counts` that hold any.

    Rows and the cells of a row are as equal as can be (`pool1d`); all are alike where rows and columns divide.
    """
    counts = [n for n in row_counts(h, w, k) if n]
    band, middle = (t.tolist() for t in pool1d(h, len(counts)))
    groups, centres, boxes, first = [], [], [], 0
    for i, n in enumerate(counts):
        column, mid = pool1d(w, n)
        top, bottom = band.index(i), h - band[::-1].index(i)
        left = torch.searchsorted(column, torch.arange(n + 1))
        box = torch.stack([torch.full((n,), top), left[:-1], torch.full((n,), bottom), left[1:]], 1)
        groups.append((first + column).repeat(bottom - top))
        centres.append(middle[i] * w + mid)
        boxes.append(box)
        first += n
    return Cells((h, w), *(torch.cat(parts).to(device) for parts in (groups, centres, boxes)))


class Windows(NamedTuple):
    """K windows of T frames of an (h, w) grid, each a cell of some frames that follow each other.

    Attributes:
        groups: (T * h * w,) int64, the window of each token, every one of which has some.
        centres: (K,) int64, the middle token of each, ascending.
    """

    groups: Tensor
    centres: Tensor


def windows(frames: int, h: int, w: int, k: int, depth: int, device: torch.device | str | None = None) -> Windows:
    """`frames` of an (h, w) grid cut into k windows, 1 <= k <= frames * h * w, of `depth` frames where they can be.

    Stretches of frames are as equal as can be and share the windows in proportion; each is cut as by `cells`. There are
    more of them where k windows do not fit, and fewer where there are fewer windows.
    """
    count = min(frames, k, max(-(-frames // depth), -(-k // (h * w))))
    stretch, middle = pool1d(frames, count)
    lengths = torch.bincount(stretch).tolist()
    groups, centres, first = [], [], 0
    for i, n in enumerate(shares(k, lengths, [h * w] * count)):
        layout = cells(h, w, n)
        groups.append((first + layout.groups).repeat(lengths[i]))
        centres.append(int(middle[i]) * h * w + layout.centres)
        first += n
    return Windows(torch.cat(groups).to(device), torch.cat(centres).to(device))


def means(x: Tensor, layout: Cells) -> Tensor:
    """(n, N, D) tokens to (n, K, D): the mean of each cell."""
    groups, sizes = layout.groups.expand(len(x), -1), layout.sizes
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (group_sum(wide, groups, len(sizes)) / sizes[:, None]).to(x.dtype)


def maxima(x: Tensor, layout: Cells) -> Tensor:
    """(n, N, D) tokens to (n, K, D): the maximum of each channel in each cell."""
    groups = layout.groups[None, :, None].expand_as(x)
    out = x.new_full((len(x), len(layout.centres), x.shape[-1]), -torch.inf)
    return out.scatter_reduce(1, groups, x, "amax")


def members(layout: Cells) -> tuple[Tensor, Tensor]:
    """(K, S) int64 tokens of each cell in raster order, S those of the largest one; (K, S) bool, False behind them."""
    return lists(layout.groups, layout.sizes)


def lists(groups: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(N,) groups of tokens to (K, S) int64 tokens of each, ascending, and (K, S) bool, False on what fills up.

    Args:
        sizes: (K,) int64, tokens of each group, where that is known.
    """
    sizes = torch.bincount(groups) if sizes is None else sizes
    place = torch.arange(int(sizes.max()), device=sizes.device)
    real = place < sizes[:, None]
    at = (sizes.cumsum(0) - sizes)[:, None] + place
    return groups.argsort(stable=True)[at.clamp(max=len(groups) - 1)], real
