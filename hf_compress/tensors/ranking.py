"""Scores of cache entries made from other scores: pure functions over (B, H, S) tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def tiered(score: Tensor, tier: Tensor) -> Tensor:
    """Scores that put every entry of a higher tier above all of the lower ones; within a tier the order is kept.

    Args:
        score: (B, H, S) fp32, from 2^-28 (what is below counts as equal) to 2^28.
        tier: (B, 1 or H, S) int64, 0 to 3. A tier is a factor of 2^56, so nothing is rounded.

    Returns:
        scores between 2^-125 and 2^99, below those that protect entries (`select.CERTAIN`).
    """
    return torch.ldexp(score.clamp(min=2.0**-28, max=2.0**28 - 16), 56 * tier - 97)


def pooled_votes(rows: Tensor, voters: Sequence[int], newest: Tensor, kernel: int) -> Tensor:
    """(B, 1, S): the ranking of a layer's entries by its best heads; the window ranks first.

    Args:
        rows: (B, Hq, w, S) attention of the window.
        voters: query heads; their sums over the window are averaged, then pooled along the tokens.
        newest: (B, 1, S) bool, the window.
        kernel: width of the average pooling, odd.
    """
    votes = rows.sum(2)[:, list(voters)].mean(1, keepdim=True).masked_fill(newest, 0.0)
    return F.avg_pool1d(votes, kernel, 1, kernel // 2).masked_fill(newest, torch.inf)
