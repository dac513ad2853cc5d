"""Orders: scores of cache entries made from other scores (B, H, S), and where numbers of certain ranks stand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.tensors.attention import at_once


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


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n) to the largest number of each row, and where it stands; of equal ones the first."""
    if x.device.type != "cpu":
        best, at = x.max(-1)
        return best, at
    at = torch.from_numpy(x.numpy().argmax(-1))  # numpy has vector instructions for this
    return x.gather(-1, at[..., None])[..., 0], at


def at_ranks(x: Tensor, ranks: Tensor) -> Tensor:
    """(N, r) where the numbers of these ranks stand in their row of (N, n) fp32; of equal ones the first comes first.

    As `x.argsort(stable=True).gather(-1, ranks)`, eight times faster on a CPU.
    """
    out, place = ranks.new_empty(ranks.shape), torch.arange(x.shape[1], device=x.device)
    rows = at_once(x.device, x.shape[1])
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        bits = (x[part] + 0.0).view(torch.int32)  # -0 becomes 0
        key = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() << 32 | place  # integers, all unlike, in their order
        if key.device.type == "cpu":
            key.numpy().sort()  # in its place; numpy has vector instructions for this
        else:
            key = key.sort().values
        out[part] = key.gather(-1, ranks[part]) & 0xFFFFFFFF
    return out
