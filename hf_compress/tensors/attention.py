"""Attention rows and column sums from queries and keys, without an L x L map."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Record = tuple[Tensor, Tensor, float]  # rotated queries (B, Hq, q, d), keys (B, Hkv, S, d), scaling
BLOCK = 256  # most query rows per block where all rows are needed
NUMBERS = {"cpu": 2**20}  # most numbers at once: what stays in the caches of a core, and off the CPU `MANY`
MANY = 2**26


def at_once(device: torch.device, each: int, least: int = 1) -> int:
    """How many pieces of `each` numbers to work on at once; larger temporaries cost more than the arithmetic."""
    return max(least, NUMBERS.get(device.type, MANY) // max(each, 1))


def rows_attention(query: Tensor, key: Tensor, scaling: float, see: Tensor | None) -> Tensor:
    """Softmax rows of a few queries.

    Args:
        query: (B, Hq, R, d) rotated queries; the rows wanted only.
        key: (B, Hkv, S, d) rotated keys.
        see: (B, 1 or Hkv, R, m) bool, which of the newest m keys a row sees, all older ones being seen; None: all.

    Returns:
        (B, Hq, R, S) fp32 probabilities, from O(R S d) work and O(R S) memory per head. Rows that see nothing are 0.
    """
    B, Hq, R, d = query.shape
    Hkv = key.shape[1]
    grouped = query.reshape(B, Hkv, Hq // Hkv * R, d)
    key = key if B == 1 else key.contiguous()  # else the product gathers the keys of a batch number by number
    logits = (grouped @ key.transpose(2, 3)).float().view(B, Hkv, Hq // Hkv, R, -1).mul_(scaling)
    if see is None:
        return logits.softmax(-1).view(B, Hq, R, -1)
    m = see.shape[-1]
    logits[..., -m:].masked_fill_(~see[:, :, None], float("-inf"))
    a = logits.softmax(-1).view(B, Hq, R, -1)
    return a if m < key.shape[2] else a.nan_to_num_(0.0)


def group_mean(x: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, ...) to (B, Hkv, ...): mean over the query heads that share a KV head."""
    return x.view(x.shape[0], kv_heads, -1, *x.shape[2:]).mean(2)


def column_sums(
    query: Tensor,
    key: Tensor,
    scaling: float,
    see: Callable[[slice], Tensor | None],
    rows: Tensor,
    ends: Sequence[int] | None = None,
) -> Tensor:
    """Attention that each key receives from all rows: streamed in blocks of rows, each over the keys it may see.

    With `ends` this takes half of the products of the attention and all of its exponentials: about as long as a causal
    attention that keeps nothing.

    Args:
        query: (B, Hq, q, d); key: (B, Hkv, S, d).
        see: block of rows -> (B, 1 or Hkv, rows, m) bool, which of the newest m keys they see; None: all.
        rows: (B, q) weight of every row (0 for padding); leading rows that count in no sample are not computed.
        ends: of every row, how many of the first keys it may see at most; `see` then counts m back from the largest
            number in the block. None: all.

    Returns:
        (B, Hkv, S) fp32, the mean over the query heads of a group.
    """
    B, Hq, q, _ = query.shape
    key = key.contiguous()  # once for all blocks
    total = query.new_zeros(key.shape[:3], dtype=torch.float32)
    step = min(BLOCK, at_once(query.device, B * Hq * key.shape[2], least=16))
    first = int(rows.ne(0).any(0).long().argmax()) if q > step else 0
    for start in range(first, q, step):
        part = slice(start, start + step)
        n = key.shape[2] if ends is None else max(ends[part])
        a = rows_attention(query[:, :, part], key[:, :, :n], scaling, see(part))
        total[:, :, :n] += group_mean((rows[:, None, None, part] @ a)[:, :, 0], key.shape[1])
    return total


def received(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """(B, H, P) fp32: mean attention each key receives from all queries, no mask (vision towers)."""
    every = torch.ones(query.shape[0], query.shape[2], device=query.device)
    return column_sums(query, key, scaling, lambda _: None, every) / query.shape[2]
