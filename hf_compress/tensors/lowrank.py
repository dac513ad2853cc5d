"""Low-rank approximation without a decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.tensors.pack import pieces


@torch.no_grad()
def power_iteration(x: Tensor, rank: int, rounds: int = 3) -> tuple[Tensor, Tensor]:
    """Factors of about the best approximation x = left @ right^T of a rank.

    Subspace iteration as in PowerSGD (arXiv:1905.13727), from a fixed random start; the columns are made orthonormal in
    every round (in exact arithmetic the last one would do). Exact if `rank` is the rank of x. In fp64, so that rows of
    padding above x change nothing that rounding to 16 bits would show.

    Args:
        x: (..., n, d) fp32.
        rank: 1 to min(n, d).
        rounds: products with x x^T, at least 1.

    Returns:
        left (..., n, rank), orthonormal columns, and right (..., d, rank). Cost O(rounds n d rank).
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(x.shape[-1], rank, generator=generator).to(x.device, torch.float64)
    left, right = pieces(lambda part: _iterate(part.double(), start, rounds), x)
    return left.to(x), right.to(x)


def _iterate(x: Tensor, right: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    for _ in range(rounds):
        left = torch.linalg.qr(x @ right).Q
        right = x.mT @ left
    return left, right
