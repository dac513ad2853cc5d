"""Attention rows and column sums from queries and keys, without an L x L map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Record = tuple[Tensor, Tensor, float]  # rotated queries (B, Hq, q, d), keys (B, Hkv, S, d), scaling
BLOCK = 256  # query rows per block where all rows are needed


def rows_attention(query: Tensor, key: Tensor, scaling: float, see: Tensor | None) -> Tensor:
    """Softmax rows of a few queries.

    Args:
        query: (B, Hq, R, d) rotated queries; the rows wanted only.
        key: (B, Hkv, S, d) rotated keys.
        see: (B, 1 or Hkv, R, S) bool, which keys a row sees; None: all.

    Returns:
        (B, Hq, R, S) fp32 probabilities, from O(R S d) work and O(R S) memory per head. Rows that see nothing are 0.
    """
    B, Hq, R, d = query.shape
    Hkv = key.shape[1]
    grouped = query.reshape(B, Hkv, Hq // Hkv * R, d)
    logits = (grouped @ key.transpose(2, 3)).float().view(B, Hkv, Hq // Hkv, R, -1) * scaling
    if see is not None:
        logits = logits.masked_fill(~see[:, :, None], float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0).view(B, Hq, R, -1)


def group_mean(x: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, ...) to (B, Hkv, ...): mean over the query heads that share a KV head."""
    return x.view(x.shape[0], kv_heads, -1, *x.shape[2:]).mean(2)


def column_sums(query: Tensor, key: Tensor, scaling: float, see: Callable[[slice], Tensor], rows: Tensor) -> Tensor:
    """Attention that each key receives from all rows: streamed in blocks of `BLOCK` rows.

    Args:
        query: (B, Hq, q, d); key: (B, Hkv, S, d).
        see: block of rows -> (B, 1, rows, S) bool.
        rows: (B, q) weight of every row (0 for padding); leading rows that count in no sample are not computed.

    Returns:
        (B, Hkv, S) fp32, the mean over the query heads of a group.
    """
    total = query.new_zeros(key.shape[0], key.shape[1], key.shape[2], dtype=torch.float32)
    first = int(rows.ne(0).any(0).long().argmax()) if query.shape[2] > BLOCK else 0
    for start in range(first, query.shape[2], BLOCK):
        part = slice(start, start + BLOCK)
        a = rows_attention(query[:, :, part], key, scaling, see(part))
        total += group_mean((rows[:, None, None, part] @ a)[:, :, 0], key.shape[1])
    return total


def received(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """(B, H, P) fp32: mean attention each key receives from all queries, no mask (vision towers)."""
    every = torch.ones(query.shape[0], query.shape[2], device=query.device)
    visible = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
    return column_sums(query, key, scaling, lambda _: visible, every) / query.shape[2]
