"""Parts of compressors whose outputs each look at a cell of the grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.modules.attention import Pooling
from hf_compress.tensors.cells import Cells, members


class RegionPooling(Pooling):
    """`Pooling` with one query per cell, which sees the tokens of its cell alone."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, x: Tensor, layout: Cells
    ) -> Tensor:
        """(n, K, D): queries (n, K, D) of the cells; keys and values (n, N, C) and tokens (n, N, D) of the grid."""
        at, real = members(layout)
        found = super().forward(query[:, :, None], key[:, at], value[:, at], x[:, at], real[:, None])
        return found[:, :, 0]


class CellKernel(nn.Module):
    """A weighted mean of each cell, every channel with weights of its own; at the start the mean.

    They are those of a depth-wise convolution whose stride is its kernel, where cells are `side` x `side`; for others
    the kernel is stretched.

    Args:
        width: D; side: of the kernel.
    """

    def __init__(self, width: int, side: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, side, side))

    def forward(self, x: Tensor, layout: Cells) -> Tensor:
        """(n, N, D) to (n, K, D)."""
        at, real = members(layout)
        sides = layout.boxes[:, 2:] - layout.boxes[:, :2]
        shapes, shape_of = sides.unique(dim=0, return_inverse=True)
        stretched = [self._stretched(int(h), int(w), at.shape[1]) for h, w in shapes]
        weight = torch.stack(stretched)[shape_of] / layout.sizes[:, None, None]  # (K, S, D)
        return (x[:, at] * (weight * real[..., None]).to(x.dtype)).sum(2)

    def _stretched(self, h: int, w: int, most: int) -> Tensor:
        """(most, D): the kernel over h x w tokens in raster order, zeros behind."""
        kernel = F.interpolate(self.weight[None], (h, w), mode="bilinear")[0].flatten(1).mT
        return F.pad(kernel, (0, 0, 0, most - h * w))


def looked_up(tower: int, levels: int) -> nn.Module:
    """Maps of hidden states of several levels side by side, (..., levels * C) to (..., C)."""
    return nn.Sequential(
        nn.LayerNorm(levels * tower),
        nn.Linear(levels * tower, tower),
        nn.GELU(),
        nn.Linear(tower, tower),
        nn.LayerNorm(tower),
    )
