"""Important entries of every head as they are, all others in few bits, to which they sink (arXiv:2402.18096)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from hf_compress.layout import Layout
from hf_compress.signals import CacheView
from hf_compress.stores.dense import HeldLayer
from hf_compress.stores.mixed import Mixed, choose, highest
from hf_compress.stores.packed import Dense, Packed
from hf_compress.stores.store import Store
from hf_compress.tensors.kvmerge import take
from hf_compress.tensors.pack import bits_per_element, divisor


@dataclass(frozen=True)
class DemotingStore(Store):
    """Of S entries floor(r S) are important: half of them the newest, half those of the highest running score.

    Codes are per token, in groups of channels. Before that keys are multiplied, channel by channel, by a balancer of
    the prompt, and divided by it again when they are read.

    Args:
        high: bits of important entries, 16: as they are; low: of the others.
        group: numbers that share step and minimum, or the largest divisor of the head size below.
        share: r, where there is no `ratio`.
        ratio: against 16 bits, from which r follows.
        demotes: what is generated enters, and others are demoted in exchange.
        size: channels of a head, where they are known.
    """

    high: int
    low: int
    group: int
    share: Fraction
    ratio: Fraction | None
    demotes: bool
    size: int

    @property
    def bits(self) -> float:
        high, low = self.widths(self.size)
        return float(low + self.part(self.size) * (high - low))

    def widths(self, size: int) -> tuple[Fraction, Fraction]:
        """Stored bits per number of important and of other entries, for heads of a size."""
        group = divisor(size, self.group)
        high = 16 if self.high == 16 else bits_per_element(self.high, group)
        return Fraction(high), Fraction(bits_per_element(self.low, group))

    def part(self, size: int) -> Fraction:
        """r."""
        high, low = self.widths(size)
        if not self.ratio or high == low:
            return self.share
        return min(max((16 * (1 - self.ratio) - low) / (high - low), Fraction(0)), Fraction(1))

    def settle(self, held: Sequence[HeldLayer], views: Sequence[CacheView] | None) -> None:
        """Pack the prompt; before later forwards, what the last one appended enters and others are demoted."""
        for i, layer in enumerate(held):
            if views is not None:
                self._prompt(layer, views[i])
            elif self.demotes and layer.body is not None and layer.keys.shape[2]:
                self._step(layer)

    def _prompt(self, held: HeldLayer, view: CacheView) -> None:
        part, n = self.part(view.keys.shape[3]), view.keys.shape[2]
        counts = [int(part * length) for length in view.lengths.flatten().tolist()]
        assert view.scores is not None
        member = _important(view.scores, view.valid, view.order, view.lengths, counts)
        most = max(counts), n - min(counts)
        factor = balance(view).to(torch.float16)
        keys = self._mixed(view.keys, member, most, factor)
        held.pack(keys, self._mixed(view.values, member, most, None))

    def _mixed(self, x: Tensor, member: Tensor, most: tuple[int, int], factor: Tensor | None) -> Mixed:
        high = self._high(take(x, choose(member, most[0])), factor)
        low = take(x, choose(~member, most[1])).float()
        low = low if factor is None else low / factor.float()
        return Mixed.of(member, high, Packed.of(low, self.low, (1, divisor(x.shape[3], self.group))), factor)

    def _high(self, x: Tensor, factor: Tensor | None) -> Packed | Dense:
        if self.high == 16:
            return Dense(x)
        x = x.float() if factor is None else x.float() / factor.float()
        return Packed.of(x, self.high, (1, divisor(x.shape[3], self.group)))

    def _step(self, held: HeldLayer) -> None:
        layout, (keys, values), T = held.layout, held.body or (None, None), held.keys.shape[2]
        assert layout is not None
        assert isinstance(keys, Mixed) and isinstance(values, Mixed)
        part, valid = self.part(held.keys.shape[3]), layout.valid[:, None]
        lengths, before = layout.derive(("entries", T), lambda: _entries(layout, T, len(held.keys)))
        counts, had = ([int(part * n) for n in rows] for rows in (lengths, before))
        was = torch.cat([keys.members(), valid[..., -T:].expand(*keys.member.shape[:2], T)], -1)
        order = layout.derive("order", lambda: valid.long().cumsum(-1) - 1)
        total = order[..., -1:] + 1
        stay = _important(held.side["scores"], was, order, total, counts)
        gone = max(a + (n - m) - b for a, b, n, m in zip(had, counts, lengths, before))
        most = max(counts), gone, len(layout) - min(counts)
        held.pack(
            keys.demote(self._high(held.keys, keys.factor), was, stay, most),
            values.demote(self._high(held.values, None), was, stay, most),
        )


def _important(score: Tensor, among: Tensor, order: Tensor, lengths: Tensor, counts: list[int]) -> Tensor:
    """(B, Hkv, S) bool: the newest counts[b] // 2 entries and those of the highest score, counts[b] in all."""
    budget = torch.tensor(counts, device=score.device)[:, None, None]
    recent = order >= lengths - (budget // 2).clamp(min=1)
    score = score.masked_fill(recent, torch.inf).masked_fill(~among, -torch.inf)
    return highest(score, budget) & among


def balance(view: CacheView) -> Tensor:
    """(B, Hkv, 1, d): sqrt(max |key| / max |query|) of every channel, 1 where one of them is zero."""
    k, q = (_largest(x, view.valid) for x in (view.keys, view.queries))
    q = q.unflatten(1, (k.shape[1], -1)).amax(2)
    return torch.where((k > 0) & (q > 0), k / q, 1.0).sqrt().clamp(1e-4, 1e4)


def _largest(x: Tensor, valid: Tensor) -> Tensor:
    """(B, H, 1, d) fp32: largest magnitude over the `valid` tokens (B, 1 or H, n) of (B, H, n, d)."""
    real = x if bool(valid.all()) else x * valid[..., None]
    return torch.maximum(real.amax(2, keepdim=True), -real.amin(2, keepdim=True)).float()


def _entries(layout: Layout, newest: int, rows: int) -> tuple[list[int], list[int]]:
    """Valid entries of every row: all of them, and without the newest slots."""
    if layout.all_valid:
        return [len(layout)] * rows, [len(layout) - newest] * rows
    return layout.valid.sum(-1).tolist(), layout.valid[..., : len(layout) - newest].sum(-1).tolist()
