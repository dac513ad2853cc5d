"""Which rows of a sequence stay, and copies of those."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_compress import budget


def best_rows(score: Tensor, among: Tensor, counts: Sequence[int], part: Tensor | None = None) -> Tensor:
    """(B, S) bool: the `counts[b]` rows of sample b with the highest score, ties going to the lower index.

    Args:
        score: (B, S); among: (B, S) bool, the rows to choose from.
        part: (B, S) int64, -1 for none: every part then keeps its share of the count, in proportion to its rows.
    """
    score = score.masked_fill(~among, float("-inf"))
    most = torch.minimum(torch.tensor(counts, device=score.device), among.sum(1))
    if part is None:
        order = score.argsort(dim=-1, descending=True, stable=True)
        chosen = torch.arange(score.shape[1], device=score.device) < most[:, None]
        return torch.zeros_like(among).scatter(1, order, chosen)
    keep = torch.zeros_like(among)
    for b, n in enumerate(most.tolist()):
        if not n:
            continue
        present = torch.bincount(part[b][among[b]]).tolist()
        for i, share in enumerate(budget.shares(n, [float(c) for c in present], present)):
            own = score[b].masked_fill(part[b] != i, float("-inf"))
            keep[b, own.argsort(descending=True, stable=True)[:share]] = True
    return keep


def compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that remain, lined up at the right end of a ragged batch.

    Args:
        keep: (B, q) bool.

    Returns:
        rows (B, L) int64 in original order, L the largest count but at least 1, and valid (B, L): the slots at the left
        that only fill up are rows that were removed.
    """
    counts = keep.sum(1).tolist()
    longest = max(1, *counts)
    if min(counts) == longest:
        rows = keep.nonzero()[:, 1].view(len(counts), longest)
        return rows, torch.ones_like(rows, dtype=torch.bool)
    rows = keep.long().argsort(dim=1, stable=True)[:, keep.shape[1] - longest :]
    filler = longest - torch.tensor(counts, device=keep.device)
    return rows, torch.arange(longest, device=keep.device)[None] >= filler[:, None]


def take(x: Tensor, rows: Tensor) -> Tensor:
    """(B or 1, S, D) gathered at rows (B, L)."""
    n, S, D = x.shape
    first = torch.arange(0, n * S, S, device=rows.device)[:, None]
    return x.reshape(n * S, D).index_select(0, (rows + first).flatten()).view(*rows.shape, D)  # rows, not elements
