"""Truncated singular value decompositions of a batch, each matrix at its own rank."""

from __future__ import annotations

import torch
from torch import Tensor


def factors(x: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """The best approximations of (B, n, W) matrices by products of two factors.

    Args:
        x: rows that do not count must be zero.
        ranks: (B,) of every matrix, at most min(n, W).

    Returns:
        left (B, n, r) = U S and right (B, r, W), fp32, r the largest rank; zero beyond the rank of each matrix.
    """
    u, s, v = torch.linalg.svd(x.float(), full_matrices=False)
    r = int(ranks.max())
    inside = torch.arange(r, device=x.device) < ranks.to(x.device)[:, None]
    # only the right factor is cut as well, so that nothing beyond the rank is stored as if it mattered
    return u[..., :r] * (s[:, :r] * inside)[:, None], v[:, :r] * inside[..., None]
