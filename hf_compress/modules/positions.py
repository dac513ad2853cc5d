"""Where things stand in an image, as vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 24  # patches of a side of the images that published tables were made for


def sincos(at: Tensor, width: int) -> Tensor:
    """(..., 2) places as fractions of the sides, rows first, to (..., width) fp32: sines and cosines of both.

    A side counts 24 steps, whatever the grid: finer grids lie between. Four quarters: sines and cosines of the row, of
    the column; channels beyond a multiple of four are zero.
    """
    n = width // 4
    rate = 10000 ** (-torch.arange(n, device=at.device).float() / max(1, n))
    angle = at.float()[..., None] * SIDE * rate
    return F.pad(torch.cat([angle.sin(), angle.cos()], -1).flatten(-2), (0, width - 4 * n))


def middles(grid: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """(h * w, 2) fp32: the middles of the cells of a grid, as fractions of its sides."""
    rows, columns = ((torch.arange(n, device=device).float() + 0.5) / n for n in grid)
    return torch.cartesian_prod(rows, columns)


def spread(count: int) -> Tensor:
    """(count, 2) fp32 places of which every beginning covers the square evenly: the Halton sequence of 2 and 3."""
    places = [[_mirrored(i, 2), _mirrored(i, 3)] for i in range(1, count + 1)]
    return torch.tensor(places, dtype=torch.float32)


def _mirrored(i: int, base: int) -> float:
    """The digits of i behind the point, the last one first."""
    out, part = 0.0, 1.0
    while i:
        part /= base
        i, digit = divmod(i, base)
        out += part * digit
    return out


class Arc(nn.Module):
    """Places as vectors of one length on an arc between two trained directions: one of rows, one of columns, added.

    Source: "TextHawk2", arXiv:2410.05261 (scalable positional embeddings), there in each head by itself.
    """

    def __init__(self, width: int):
        super().__init__()
        self.ends = nn.Parameter(torch.randn(2, 2, width))
        self.length = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, at: Tensor) -> Tensor:
        """(N, 2) places from 0 to 1, rows first, to (N, width)."""
        wide = torch.promote_types(self.ends.dtype, torch.float32)
        u, w = F.normalize(self.ends.to(wide), dim=-1).unbind(1)  # (2, width)
        angle = (u * w).sum(-1).clamp(-0.9999, 0.9999).acos()  # of random ends about a right one
        t = at.T.to(wide)[..., None]  # (2, N, 1)
        a, b = (((1 - t) * angle[:, None, None]).sin(), (t * angle[:, None, None]).sin())
        on = (a * u[:, None] + b * w[:, None]) / angle.sin()[:, None, None]
        return (on * self.length[:, None, None] * math.sqrt(u.shape[-1])).sum(0).to(self.ends.dtype)
