"""Attention of the language model from which images are hidden where text does not look (CMAI, arXiv:2411.15453)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from hf_compress.budget import check_share
from hf_compress.methods.base import CacheMethod
from hf_compress.methods.reader import Reader
from hf_compress.signals import Reading, Slots
from hf_compress.tensors.attention import at_once, rows_attention
from hf_compress.tensors.rows import compact


@dataclass
class Inhibition(CacheMethod, Reader):
    """Hides from every row of text the image tokens that neither it nor the text before it looks at.

    With A the attention of layer `after` (mean over heads), the focus of a row t of text on a token i is the sum over
    the rows s of text, t itself among them, of A[t, s] A[s, i]. Of the n image tokens that t sees the floor(n * hide)
    of least focus are hidden from it in all later layers; of equal ones the first. Rows of the image see everything.
    Layers with a sliding window take no part.
    Generated rows are rows of text: what earlier rows looked at is remembered, N numbers per entry. Cost: the attention
    rows of all text in one layer, T S H d, in blocks; and a mask of rows times entries in the later layers.

    The embedded LLaVA answers 100, 99 and 84 of 100 questions with 50, 89 and 94 % removed, as many with a tenth hidden
    (two of 22 tokens), and 100, 95 and 81 with half of them hidden.
    """

    hide: float = 0.1
    after: int = 1

    def reader(self) -> Reader:
        return self

    def choose(self, reading: Reading) -> Tensor | None:
        """(B, 1, q, S) bool, in the layers behind the one that decides."""
        if reading.layer < self.after:
            return None
        rows, entries, known = reading.rows, reading.entries, reading.memory
        if "hidden" not in known:
            known["hidden"] = hidden_from_text(reading, check_share(self.hide, "hide"))
            known["of row"], known["of entry"] = rows.index, entries.index
            return None
        hidden = known["hidden"]
        row, entry = places(known["of row"], rows), places(known["of entry"], entries)
        hidden = hidden.gather(1, row[..., None].expand(-1, -1, hidden.shape[2]))
        return ~hidden.gather(2, entry[:, None].expand(-1, hidden.shape[1], -1))[:, None]


def places(index: Tensor, slots: Slots) -> Tensor:
    """(B, S): where in `index` (B, S') the rows behind some `slots` stand: other layers may hold fewer."""
    most = int(torch.maximum(index.max(), slots.index.max())) + 1
    at = torch.arange(index.shape[1], device=index.device).expand_as(index)
    return index.new_zeros(len(index), most).scatter_(1, index, at).gather(1, slots.index)


def hidden_from_text(reading: Reading, share: Fraction) -> Tensor:
    """(B, q, S) bool: the entries of least focus, see `Inhibition`."""
    rows, entries = reading.rows, reading.entries
    (B, q), S = rows.index.shape, entries.index.shape[1]
    text = entries.valid & (entries.image < 0)
    cols, shown = numbered(entries.valid & (entries.image >= 0))
    looks = cols.new_zeros(B, cols.shape[1], S, dtype=torch.float32)  # of every row of text, at the images
    if (before := reading.side.get("looks")) is not None:
        looks[:, : before.shape[1]] = before
    speaking, real = compact(rows.valid & (rows.image < 0))
    out = torch.zeros(B, q, S + 1, dtype=torch.bool, device=cols.device)
    size = at_once(cols.device, B * reading.queries.shape[1] * S)
    for some, ok in zip(speaking.split(size, 1), real.split(size, 1)):
        n = some.shape[1]
        see = reading.visible.expand(B, -1, -1, -1)
        see = see.gather(2, some[:, None, :, None].expand(-1, see.shape[1], -1, S))
        at = some[:, None, :, None].expand(-1, reading.queries.shape[1], -1, reading.queries.shape[3])
        shares = rows_attention(reading.queries.gather(2, at), reading.keys, reading.scaling, see).mean(1)
        where = cols.clamp(max=S - 1)[:, None].expand(-1, n, -1)
        given = shares.gather(2, where) * (shown[:, None] & ok[..., None])
        looks.scatter_(2, (S - q + some)[:, None].expand(-1, looks.shape[1], -1), given.mT)
        focus = (shares * text[:, None]) @ looks.mT
        seen = see.any(1).gather(2, where) & shown[:, None] & ok[..., None]
        most = seen.sum(2, keepdim=True) * share.numerator // share.denominator
        least = focus.masked_fill(~seen, torch.inf).argsort(dim=2, stable=True).argsort(dim=2) < most
        gone = out.new_zeros(B, n, S + 1).scatter_(2, cols[:, None].expand(-1, n, -1), least)
        out.scatter_(1, some[..., None].expand(-1, -1, S + 1), gone)
    reading.side["looks"] = looks
    return out[..., :S]


def numbered(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N): where the True slots of `mask` (B, S) stand, in order, and S behind the last; which are real."""
    B, S = mask.shape
    number = mask.long().cumsum(1) - 1
    most = max(1, int(mask.sum(1).max()))
    slots = torch.arange(S, device=mask.device).expand_as(mask)
    out = slots.new_full((B, most + 1), S)
    out = out.scatter_(1, number.masked_fill(~mask, most), slots)[:, :most]
    return out, torch.arange(most, device=mask.device) < mask.sum(1, keepdim=True)
