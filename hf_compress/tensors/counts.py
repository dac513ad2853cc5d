"""How many: counts that follow from the tokens of an image themselves. Nothing here waits for the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["mean_cosine", "neighbours", "nucleus"]

CHUNK = 2**24  # most similarities held at once (64 MiB)


@torch.no_grad()
def mean_cosine(x: Tensor) -> Tensor:
    """(n, N, D) to (n,) fp32: the mean cosine over all pairs of two tokens; 0 for N = 1. Cost O(n * N * D)."""
    N = x.shape[1]
    x = F.normalize(x.float(), dim=-1)
    pairs = x.sum(1).square().sum(-1) - x.square().sum((1, 2))  # without the pairs of a token and itself
    return pairs / max(1, N * (N - 1))


@torch.no_grad()
def neighbours(x: Tensor, threshold: float) -> Tensor:
    """(n, N, D) to (n, N) int64: how many other tokens have a cosine above the threshold to each.

    fp32, cost O(n * N^2 * D), in chunks of rows.
    """
    n, N, _ = x.shape
    x, rows = F.normalize(x.float(), dim=-1), max(1, CHUNK // (n * N))
    found = []
    for start in range(0, N, rows):
        near = x[:, start : start + rows] @ x.mT > threshold
        near.diagonal(start, 1, 2).fill_(False)
        found.append(near.sum(-1))
    return torch.cat(found, 1)


@torch.no_grad()
def nucleus(score: Tensor, mass: float) -> Tensor:
    """(n, N) scores to (n, N) bool: the fewest tokens whose softmax together is above `mass`, the highest ones first.

    All of them where the sum never gets above it. Ties: the lower index.
    """
    if mass >= 1:  # whatever rounding makes of the sum
        return torch.ones_like(score, dtype=torch.bool)
    p, order = score.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = F.pad(p.cumsum(-1)[:, :-1], (1, 0))  # of those that are higher
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, before <= mass)
