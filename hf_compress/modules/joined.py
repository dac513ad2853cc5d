"""Neighbours in a row of tokens, side by side."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Joined(nn.Module):
    """Windows of consecutive tokens, each one map of `slots` of its tokens side by side; at the start their mean.

    Of a window of fewer or more tokens than slots, a slot holds the mean of the tokens that lie in its part.

    Args:
        width: D; slots: how many tokens are joined.
    """

    def __init__(self, width: int, slots: int):
        super().__init__()
        self.slots, self.join = slots, nn.Linear(slots * width, width)
        with torch.no_grad():
            self.join.weight.copy_(torch.eye(width).repeat(1, slots) / slots)
            self.join.bias.zero_()

    def forward(self, x: Tensor, keep: int) -> Tensor:
        """(n, N, D) to (n, keep, D)."""
        out: Tensor = self.join(side_by_side(x, keep, self.slots))
        return out


def side_by_side(x: Tensor, keep: int, slots: int) -> Tensor:
    """(n, N, D) to (n, keep, slots * D): tokens of `keep` windows, as equal as can be (`tensors.merge.pool1d`)."""
    edge = -(-torch.arange(keep + 1, device=x.device) * x.shape[1] // keep)
    size, part = edge.diff()[:, None], torch.arange(slots, device=x.device)
    start, end = edge[:-1, None] + size * part // slots, edge[:-1, None] - (-size * (part + 1) // slots)
    count = end - start  # (K, slots), never 0
    place = torch.arange(int(count.max()), device=x.device)
    real = place < count[..., None]
    at = (start[..., None] + place).where(real, 0)
    share = (real / count[..., None]).to(x.dtype)
    return (x[:, at] * share[..., None]).sum(3).flatten(2)
