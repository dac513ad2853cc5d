"""Attention of the language model that undoes merging (DyMU, arXiv:2504.17040)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.methods.base import CacheMethod
from hf_compress.methods.reader import Reader
from hf_compress.signals import Reading
from hf_compress.tensors.rows import compact


@dataclass
class Unmerging(CacheMethod, Reader):
    """Every layer attends as if no token had gone: an entry stands at the places of all tokens that went into it.

    Keys, values and queries of an entry are repeated at the rows of its members, keys and queries turned on from the
    place of the entry to theirs; every member attends to what stands before it, and an entry becomes the mean of what
    its members read. This is the attention of the unmerged prompt in which the members of a group are equal in every
    layer; in a model that knows nothing of merging they would part behind the first. Only the maps of each row, and
    the cache, become smaller: the attention costs what it does without compression, and its mask of all rows against
    all is materialised. Positions are one number, and rows are causal; others are refused.

    On the embedded LLaVA `dymu` answers 100, 89 and 69 of 100 questions with 50, 89 and 94 % removed, 100, 88 and 69 at
    original positions, and unmerged 100, 90 and 71.
    """

    turns: ClassVar[bool] = True

    def reader(self) -> Reader:
        return self

    def attend(self, reading: Reading) -> Tensor:
        """(B, q, Hq, d): means over the members of every row."""
        (Hq, q), (H, S) = reading.queries.shape[1:3], reading.keys.shape[1:3]
        slot, row, real = unfolded(reading)
        by = row - reading.entries.index.gather(1, slot)
        fed, ok = compact(real & (slot >= S - q))
        into, place = slot.gather(1, fed) - (S - q), row.gather(1, fed)
        keys, values = (
            x.gather(2, slot[:, None, :, None].expand(-1, H, -1, x.shape[3])) for x in (reading.keys, reading.values)
        )
        at = into.clamp(min=0)[:, None, :, None].expand(-1, Hq, -1, reading.queries.shape[3])
        queries = reading.turn(reading.queries.gather(2, at), by.gather(1, fed))
        keys = reading.turn(keys, by).repeat_interleave(Hq // H, 1)
        see = real[:, None, None] & (row[:, None, None] <= place[:, None, :, None])
        see = see | (~real[:, None, None] & (place < 0)[:, None, :, None])  # no softmax of nothing
        out = F.scaled_dot_product_attention(
            queries, keys, values.repeat_interleave(Hq // H, 1), see, scale=reading.scaling
        )
        share = F.one_hot(into.clamp(min=0), q).mT * ok[:, None]  # (B, q, members)
        share = (share / share.sum(2, keepdim=True).clamp(min=1)).to(out.dtype)
        return (share[:, None] @ out).transpose(1, 2)


def unfolded(reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
    """(B, E) each: the tokens that the entries stand for, ascending: the slot of the entry, the row of the caller, and
    which are real.

    The rows that went into an entry are remembered with it, counted from 1: `side["members"]` (B, M, S).
    """
    index, valid = reading.entries.index, reading.entries.valid
    (B, S), members = index.shape, reading.side.get("members")
    members = index.new_zeros(B, 1, S) if members is None else members.long()
    if (owner := reading.owner) is not None:
        members = united(members, grouped(owner, index, valid))
    reading.side["members"] = members
    alone = (members == 0).all(1, keepdim=True)
    rows = torch.cat([torch.where(alone & valid[:, None], index[:, None] + 1, 0), members], 1) - 1
    slot = torch.arange(S, device=index.device).expand_as(rows)
    real = rows >= 0
    order = rows.masked_fill(~real, int(index.max()) + 1).flatten(1).argsort(dim=1, stable=True)
    order = order[:, : max(1, int(real.flatten(1).sum(1).max()))]
    slot, rows, real = (x.flatten(1).gather(1, order) for x in (slot, rows, real))
    return slot, rows.masked_fill(~real, -1), real


def grouped(owner: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """(B, M, S): the rows, counted from 1, that the entries of rows `index` (B, S) stand for, 0 behind the last.

    Args:
        owner: (B, R), see `Reading`.
    """
    (B, S), R = index.shape, owner.shape[1]
    most = max(R, int(index.max()) + 1)
    slots = index.new_full((B, most + 1), S)  # S: nothing that is stored
    slots.scatter_(1, index.masked_fill(~valid, most), torch.arange(S, device=index.device).expand_as(index))
    slots[:, most] = S
    slot = slots.gather(1, owner.masked_fill(owner < 0, most))
    order = slot.argsort(dim=1, stable=True)
    ranked, at = slot.gather(1, order), torch.arange(R, device=slot.device).expand_as(slot)
    begins = torch.cat([torch.zeros_like(at[:, :1]), at[:, 1:] * (ranked[:, 1:] != ranked[:, :-1])], 1).cummax(1).values
    rank = torch.empty_like(at).scatter_(1, order, at - begins).masked_fill(slot == S, 0)
    out = index.new_zeros(B, int(rank.max()) + 1, S + 1)
    out.view(B, -1).scatter_(1, rank * (S + 1) + slot, at + 1)
    return out[..., :S]


def united(a: Tensor, b: Tensor) -> Tensor:
    """(B, M, S) of (B, M', S) and (B, M'', S), of which at most one says something of an entry."""
    more = b.shape[1] - a.shape[1]
    return torch.maximum(F.pad(a, (0, 0, 0, max(0, more))), F.pad(b, (0, 0, 0, max(0, -more))))
