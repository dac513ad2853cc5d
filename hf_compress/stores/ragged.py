"""Entries of heads that hold different numbers of them, end to end: resident bytes are the budget."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.layout import Layout


class Ragged:
    """(B, Hkv) segments of different lengths in one (total, d) tensor.

    Args:
        flat: (total, d), segment after segment, heads of a row adjacent.
        counts: (B, Hkv) nested list, the length of each segment.
        lead: (B, Hkv, m) fp32, of keys: added to the logits of the first m entries of each segment. An entry that
            stands for n others has ln n there. None: nothing is added.
        span: slots of the layer, at least the longest segment; None: as many. Rows that are chosen keep it.
    """

    tight = True

    def __init__(self, flat: Tensor, counts: list[list[int]], lead: Tensor | None = None, span: int | None = None):
        self.flat, self.counts, self.lead = flat, counts, lead
        self.span = max(max(row) for row in counts) if span is None else span

    @classmethod
    def of(cls, x: Tensor, counts: list[list[int]], lead: Tensor | None = None) -> Ragged:
        """From (B, Hkv, n, d) whose heads fill the last `counts[b][h]` slots."""
        return cls(x[_filled(counts, x.shape[2], x.device)], counts, lead)

    def __len__(self) -> int:
        return self.span

    @functools.cached_property
    def bounds(self) -> Tensor:
        """(B Hkv + 1,) int64, where segments begin, and the end of the last one."""
        ends = itertools.accumulate((n for row in self.counts for n in row), initial=0)
        return torch.tensor(list(ends), device=self.flat.device)

    def read(self) -> Tensor:
        B, H, n = len(self.counts), len(self.counts[0]), len(self)
        out = self.flat.new_zeros(B, H, n, self.flat.shape[-1])
        out[_filled(self.counts, n, out.device)] = self.flat
        return out

    def bias(self) -> Tensor | None:
        """(B, Hkv, n) fp32, what is added to the logits of the slots that `read` gives; None: nothing."""
        if self.lead is None:
            return None
        place = torch.arange(len(self), device=self.lead.device) - len(self)
        place = place + torch.tensor(self.counts, device=place.device)[..., None]  # in the segment; < 0 on fillers
        lead = F.pad(self.lead, (1, 1))
        return lead.gather(-1, (place + 1).clamp(0, lead.shape[-1] - 1))

    def segments(self) -> tuple[Tensor, ...]:
        """(count, d) views, row by row and head by head."""
        return self.flat.split([n for row in self.counts for n in row])

    def tensors(self) -> list[Tensor]:
        return [self.flat] if self.lead is None else [self.flat, self.lead]

    def rows(self, which: Tensor) -> Ragged:
        parts = self.flat.split([sum(row) for row in self.counts])
        order = which.tolist()
        lead = None if self.lead is None else self.lead[which.to(self.lead.device)]
        return Ragged(torch.cat([parts[b] for b in order]), [self.counts[b] for b in order], lead, self.span)

    def to(self, device: torch.device) -> Ragged:
        lead = None if self.lead is None else self.lead.to(device)
        return Ragged(self.flat.to(device), self.counts, lead, self.span)


def _filled(counts: list[list[int]], n: int, device: torch.device) -> Tensor:
    """(B, Hkv, n) bool: the newest `counts[b][h]` slots."""
    return torch.arange(n, device=device) >= n - torch.tensor(counts, device=device)[..., None]


def visible(tail: Layout, q: int) -> Tensor | None:
    """(B, 1, q, T) bool: what of a tail its newest q rows see; None: all."""
    T = len(tail)
    if q == 1 and tail.all_valid:
        return None
    see = (tail.position[:, None, None] <= tail.position[:, None, -q:, None]) & tail.valid[:, None, None]
    return see | torch.eye(T, dtype=torch.bool, device=see.device)[T - q :]


def attend(
    query: Tensor, scaling: float, keys: Ragged, values: Ragged, tail: tuple[Tensor, Tensor], see: Tensor | None
) -> Tensor:
    """Attention over segments and a dense tail, without padding anything.

    Every query sees its whole segment.

    Args:
        query: (B, Hq, q, d) rotated; query head h belongs to KV head h // (Hq // Hkv).
        tail: keys and values (B, Hkv, T, d) appended since.
        see: (B, 1, q, T) bool, which of the tail each query sees; None: all.

    Returns:
        (B, q, Hq, d') in the precision of the values.
    """
    B, Hq, q, d = query.shape
    H, T = tail[0].shape[1:3]
    grouped = query.reshape(B, H, -1, d) * scaling
    newest = (grouped @ tail[0].mT).float()
    if see is not None:
        newest = newest.view(B, H, -1, q, T).masked_fill(~see[:, :, None], float("-inf")).view(B, H, -1, T)
    flat, newest = grouped.flatten(0, 1), newest.flatten(0, 1)
    out, late = tail[1].new_empty(*flat.shape[:2], tail[1].shape[3]), torch.empty_like(newest)
    lead = None if keys.lead is None else keys.lead.flatten(0, 1)
    for i, (k, v) in enumerate(zip(keys.segments(), values.segments())):
        logits = (flat[i] @ k.T).float()
        if lead is not None:
            logits[:, : lead.shape[1]] += lead[i, : len(k)]
        weights = torch.cat([logits, newest[i]], 1).softmax(1)
        out[i] = weights[:, : len(k)].to(v.dtype) @ v
        late[i] = weights[:, len(k) :]
    out = out + late.to(out.dtype) @ tail[1].flatten(0, 1)
    return out.view(B, Hq, q, -1).transpose(1, 2)
