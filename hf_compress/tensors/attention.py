"""Attention rows and column sums from queries and keys, without an L x L map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_compress.tensors.ambient import own_precision

Record = tuple[Tensor, Tensor, float]  # rotated queries (B, Hq, q, d), keys (B, Hkv, S, d), scaling
See = Callable[[slice], Tensor | None]
BLOCK = 256  # most query rows per block where all rows are needed
NUMBERS = {"cpu": 2**19}  # most numbers at once: what stays in the caches of each core, and off the CPU `MANY`
MANY = 2**26


def at_once(device: torch.device, each: int, least: int = 1) -> int:
    """How many pieces of `each` numbers to work on at once; larger temporaries cost more than the arithmetic."""
    cores = torch.get_num_threads() if device.type == "cpu" else 1
    return max(least, NUMBERS.get(device.type, MANY) * cores // max(each, 1))


@own_precision
def rows_attention(query: Tensor, key: Tensor, scaling: float, see: Tensor | None) -> Tensor:
    """Softmax rows of a few queries.

    Args:
        query: (B, Hq, R, d) rotated queries; the rows wanted only.
        key: (B, Hkv, S, d) rotated keys.
        see: (B, 1 or Hkv, R, m) bool, which of the newest m keys a row sees, all older ones being seen; None: all.

    Returns:
        (B, Hq, R, S) fp32 probabilities, from O(R S d) work and O(R S) memory per head. Rows that see nothing are 0.
    """
    logits = rows_logits(query, key, scaling, see, float("-inf"))
    a = logits.softmax(-1)
    return a if see is None or see.shape[-1] < key.shape[2] else a.nan_to_num_(0.0)


@own_precision
def rows_logits(query: Tensor, key: Tensor, scaling: float, see: Tensor | None, hidden: float = 0.0) -> Tensor:
    """What `rows_attention` takes the softmax of, (B, Hq, R, S) fp32; `hidden` where a row does not see."""
    B, Hq, R, d = query.shape
    Hkv = key.shape[1]
    grouped = query.reshape(B, Hkv, Hq // Hkv * R, d)
    key = key if B == 1 else key.contiguous()  # else the product gathers the keys of a batch number by number
    logits = (grouped @ key.transpose(2, 3)).float().view(B, Hkv, Hq // Hkv, R, -1).mul_(scaling)
    if see is not None:
        logits[..., -see.shape[-1] :].masked_fill_(~see[:, :, None], hidden)
    return logits.view(B, Hq, R, -1)


def group_mean(x: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, ...) to (B, Hkv, ...): mean over the query heads that share a KV head."""
    return x.view(x.shape[0], kv_heads, -1, *x.shape[2:]).mean(2)


@torch.no_grad()
@own_precision
def column_sums(
    query: Tensor, key: Tensor, scaling: float, see: See, rows: Tensor, ends: Sequence[int] | None = None
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
        (B, Hkv, S) fp32, the mean over the query heads of a group. Rows that see nothing give nothing.
    """
    total = query.new_zeros(key.shape[:3], dtype=torch.float32)
    for block in _blocks(query, key, scaling, see, ends, _first(rows)):
        block.add(total, rows)
    return total.div_(query.shape[1] // key.shape[1])


@torch.no_grad()
@own_precision
def flow(query: Tensor, key: Tensor, scaling: float, see: See, rows: Tensor, ends: Sequence[int]) -> Tensor:
    """What weights of rows become after one step of the attention: (B, Hq, S) fp32, for every query head by itself.

    Args:
        rows: (B, Hq, q) weight of every row in every head; the others as of `column_sums`.
    """
    (B, Hq), H = query.shape[:2], key.shape[1]
    total = query.new_zeros(B, H, Hq // H, key.shape[2], dtype=torch.float32)
    weight = rows.float().unflatten(1, (H, -1))
    for block in _blocks(query, key, scaling, see, ends):
        some = weight[block.samples, block.heads, :, block.rows]
        powers = block.powers.unflatten(2, some.shape[2:])
        share = (some / block.sums.unflatten(2, some.shape[2:]))[..., None, :]
        total[block.samples, block.heads, :, : powers.shape[-1]] += (share @ powers)[..., 0, :]
    return total.flatten(1, 2)


@torch.no_grad()
@own_precision
def attention_and_sums(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, see: See, rows: Tensor, ends: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """The attention itself and `column_sums` in one pass; on a CPU about as long as its attention kernel alone.

    Args:
        value: (B, Hkv, S, dv); the others as of `column_sums`.

    Returns:
        (B, q, Hq, dv) in the precision of `value`, zero on rows that see nothing; (B, Hkv, S) fp32.
    """
    (B, Hq, q, _), H = query.shape, key.shape[1]
    total = query.new_zeros(key.shape[:3], dtype=torch.float32)
    out = value.new_empty(B, q, Hq, value.shape[3])
    by_head, value = out.view(B, q, H, Hq // H, -1).permute(0, 2, 3, 1, 4), value.contiguous()
    for block in _blocks(query, key, scaling, see, ends):
        block.add(total, rows)
        block.read(value, by_head)
    return out, total.div_(Hq // H)


@torch.no_grad()
@own_precision
def column_max(
    query: Tensor, key: Tensor, scaling: float, see: See, rows: Tensor, columns: int, ends: Sequence[int] | None = None
) -> Tensor:
    """The largest share of its attention that any row of any query head of the group gives to each of the first keys.

    Args:
        columns: how many of them, never more than the first row may see; the others as of `column_sums`.

    Returns:
        (B, Hkv, columns) fp32.
    """
    best = query.new_zeros(*key.shape[:2], columns, dtype=torch.float32)
    for block in _blocks(query, key, scaling, see, ends, _first(rows)):
        at = block.samples, block.heads
        best[at] = torch.maximum(best[at], block.powers[..., :columns].mul_(block.weight(rows).mT).amax(2))
    return best


class _Block(NamedTuple):
    """Softmax rows of some samples, KV heads and query rows, before they are divided by their sums."""

    samples: slice
    heads: slice
    rows: slice
    powers: Tensor  # (b, h, g R, n) fp32
    sums: Tensor  # (b, h, g R)

    def weight(self, rows: Tensor) -> Tensor:
        """(b, h, 1, g R): the weight of every row, `rows` (B, q), over its sum."""
        some = rows[self.samples, None, None, self.rows]
        return (some / self.sums.unflatten(2, (-1, some.shape[-1]))).flatten(2)[:, :, None]

    def add(self, total: Tensor, rows: Tensor) -> None:
        """Its column sums into `total` (B, H, S)."""
        total[self.samples, self.heads, : self.powers.shape[-1]] += (self.weight(rows) @ self.powers)[:, :, 0]

    def read(self, value: Tensor, out: Tensor) -> None:
        """Its attention over values (B, H, S, dv) into `out` (B, H, g, q, dv)."""
        value = value[self.samples, self.heads, : self.powers.shape[-1]]
        out = out[self.samples, self.heads, :, self.rows]
        if value.dtype == self.powers.dtype:
            torch.div((self.powers @ value).view(out.shape), self.sums.view(*out.shape[:-1], 1), out=out)
        else:  # sums of 16-bit numbers that are no shares could overflow
            out.copy_((self.powers.div_(self.sums[..., None]).to(value.dtype) @ value).view(out.shape))


def _blocks(
    query: Tensor, key: Tensor, scaling: float, see: See, ends: Sequence[int] | None, first: int = 0
) -> Iterator[_Block]:
    """All rows from the `first` on, in blocks that share their memory."""
    (B, Hq, q, _), (_, H, S, _) = query.shape, key.shape
    key, groups = key.contiguous(), Hq // H
    step = min(BLOCK, q, at_once(query.device, groups * S, least=16))
    heads = heads_at_once(B, H, at_once(query.device, groups * step * S))
    spare = query.new_empty(
        max((b.stop - b.start) * (h.stop - h.start) for b, h in heads) * groups * step * S, dtype=torch.float32
    )
    small = query.device.type == "cpu" and _small(query, key, scaling)
    for start in range(first, q, step):
        part = slice(start, min(start + step, q))
        n = S if ends is None else max(ends[part])
        seen = see(part)
        hidden = None if seen is None else excluded(seen)
        for b, h in heads:
            some = query[b, h.start * groups : h.stop * groups, part].unflatten(1, (-1, groups))
            mask = None if hidden is None else hidden[b, h if hidden.shape[1] > 1 else slice(None)]
            e = _powers(some, key[b, h, :n], scaling, mask, spare, small)
            yield _Block(b, h, part, e, e.sum(-1).clamp_(min=torch.finfo(e.dtype).tiny))


def _first(rows: Tensor) -> int:
    """The first row that counts in some sample; where one block has them all nobody asks the device."""
    return int(rows.ne(0).any(0).long().argmax()) if rows.shape[1] > BLOCK else 0


def _small(query: Tensor, key: Tensor, scaling: float) -> bool:
    """Whether no logit can be so large or small that sums over its power of 2 leave fp32 (Cauchy and Schwarz)."""
    longest = [torch.linalg.vector_norm(x, dim=-1).max().float() for x in (query, key)]
    return float(longest[0] * longest[1]) * abs(scaling) / math.log(2) < 64


def _powers(q: Tensor, key: Tensor, scaling: float, mask: Tensor | None, spare: Tensor, small: bool) -> Tensor:
    """(B, H, g R, n): softmax rows before they are divided by their sums; queries (B, H, g, R, d), keys (B, H, n, d).

    In `spare`, fp32: fresh memory costs more than the arithmetic. `mask` is added to the logits of the newest keys.
    """
    B, H, g, R, d = q.shape
    n, unit = key.shape[2], scaling / math.log(2)  # powers of 2: exp is many times slower where it is (almost) 0
    e = spare[: B * H * g * R * n].view(B * H, g * R, n)
    q, key = q.reshape(B * H, g * R, d), key.reshape(B * H, n, d)
    if q.dtype == e.dtype:
        torch.baddbmm(e, q, key.mT, beta=0, alpha=unit, out=e)
    else:
        e.copy_(q @ key.mT).mul_(unit)
    if mask is not None:
        e.view(B, H, g, R, n)[..., n - mask.shape[-1] :].add_(mask[:, :, None])
    if not small:
        e.sub_(e.amax(-1, keepdim=True).clamp_(min=torch.finfo(e.dtype).min))
    return e.exp2_().view(B, H, g * R, n)


def excluded(allowed: Tensor) -> Tensor:
    """0 where allowed, else -inf: adding that to many heads takes a tenth of the time of writing through a mask."""
    return torch.zeros_like(allowed, dtype=torch.float32).masked_fill_(~allowed, float("-inf"))


def heads_at_once(B: int, H: int, most: int) -> list[tuple[slice, slice]]:
    """Samples and heads to work on together, `most` pairs of them at once."""
    if most >= B * H:
        return [(slice(0, B), slice(0, H))]
    return [(slice(b, b + 1), slice(h, min(h + most, H))) for b in range(B) for h in range(0, H, most)]


def received(query: Tensor, key: Tensor, scaling: float, real: Tensor | None = None) -> Tensor:
    """(B, H, P) fp32: mean attention each key receives from all queries (vision towers); `real` (B, P), None: all."""
    if real is not None:
        total = column_sums(query, key, scaling, lambda _: real[:, None, None], real.float())
        return total / real.sum(1)[:, None, None]
    every = torch.ones(query.shape[0], query.shape[2], device=query.device)
    return column_sums(query, key, scaling, lambda _: None, every) / query.shape[2]
