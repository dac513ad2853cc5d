"""MiKV: entries are demoted to few bits where others evict them (arXiv:2402.18096)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from hf_compress.layout import Layout
from hf_compress.methods.base import CacheMethod, check_choice, check_count, check_number, head_size
from hf_compress.methods.holding import Holding
from hf_compress.registry import register
from hf_compress.signals import COLUMNS, CacheView, Read
from hf_compress.stores.body import Store
from hf_compress.stores.dense import HeldLayer
from hf_compress.stores.mixed import Mixed, choose, highest
from hf_compress.stores.packed import Dense, Packed
from hf_compress.tensors.kvmerge import take
from hf_compress.tensors.pack import BITS, bits_per_element, divisor


@register("mikv", stage="cache", paper="arXiv:2402.18096", needs={"columns"})
@dataclass
class MiKV(Holding, CacheMethod):
    """Important entries as they are (or in `high` bits), all others in `low` bits; nothing is evicted.

    Of S entries floor(r S) of every head are important: half of them the newest, half those of the largest accumulated
    attention (H2O). Codes are per token, in groups of channels. Before that keys are multiplied, channel by channel, by
    the balancer sqrt(max |query| / max |key|) of the prompt, which takes outliers away, and divided by it again when
    they are read (the paper divides the queries; the products are the same). While decoding every new entry is
    important at first, and the lowest that is not recent is demoted in exchange; none comes back.

    r follows from `ratio` (against 16 bits per number): r e_high + (1 - r) e_low = 16 (1 - ratio), with e = bits + 32 /
    group, or 16. Which entries are important costs one bit per entry and head for keys and for values (the paper: an
    index each). The running score, four bytes per entry and head, is not counted.

    Source: No Token Left Behind, arXiv:2402.18096; there is no released code. Cost: that of H2O (with its packing 3 %
    of a prefill of LLaMA-7B layers at 2048 tokens on a CPU core, 6 % of narrow ones), and one small quantisation per
    step.

    Args:
        policy: "hold" demotes while decoding, "grow" packs the prompt only.
        share: r, where `ratio` is not given.
        high: 16 (as they are), or 8, 4, 2.
        low: 1, 2, 4 or 8, fewer than `high`.
        group: numbers that share step and minimum (64: half of a head of 128, as in the paper), or the largest divisor
            of the head size below.
    """

    policy: str = "hold"
    share: float = 0.2
    high: int = 16
    low: int = 2
    group: int = 64

    continues = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("high", self.high, (16, 8, 4, 2))
        check_choice("low", self.low, BITS)
        check_count("group", self.group, least=4)
        check_number("share", self.share, 0, 1)
        if self.low > self.high:
            raise ValueError(f"low={self.low} must not be more than high={self.high}")
        self._ratio: Fraction | None = None
        self._size = self.group

    def reads(self, depth: int) -> set[Read]:
        return {COLUMNS}

    def prepare(self, model: nn.Module, ratio: Fraction | None) -> None:
        self._size = head_size(model)

    def check(self, layers: int, ratio: Fraction | None) -> None:
        self._ratio = ratio
        least, most = (1 - b / 16 for b in self._widths(self._size))
        if ratio and not least <= ratio <= most:
            raise ValueError(
                f"ratio={float(ratio):.4g}: entries of {self.high} and {self.low} bits in groups of "
                f"{divisor(self._size, self.group)} "
                f"remove {float(least):.4g} to {float(most):.4g} of the bytes; choose a ratio between, or other bits"
            )

    def begin(self, view: CacheView) -> Tensor:
        return view.column_sums()

    def packing(self) -> Store:
        return self

    @property
    def bits(self) -> float:
        """Mean bits per number."""
        high, low = self._widths(self._size)
        return float(low + self._part(self._size) * (high - low))

    def _widths(self, size: int) -> tuple[Fraction, Fraction]:
        """Stored bits per number of important and of other entries, for heads of a size."""
        group = divisor(size, self.group)
        high = 16 if self.high == 16 else bits_per_element(self.high, group)
        return Fraction(high), Fraction(bits_per_element(self.low, group))

    def _part(self, size: int) -> Fraction:
        """r."""
        high, low = self._widths(size)
        if not self._ratio or high == low:
            return Fraction(self.share).limit_denominator(10**6)
        return min(max((16 * (1 - self._ratio) - low) / (high - low), Fraction(0)), Fraction(1))

    # -- the store --------------------------------------------------------------------------------------------------
    def settle(self, held: list[HeldLayer], views: Sequence[CacheView] | None) -> None:
        """Pack the prompt; before later forwards, what the last one appended enters and others are demoted."""
        for i, layer in enumerate(held):
            if views is not None:
                self._prompt(layer, views[i])
            elif self.policy == "hold" and layer.body is not None and layer.keys.shape[2]:
                self._step(layer)

    def _prompt(self, held: HeldLayer, view: CacheView) -> None:
        part, n = self._part(view.keys.shape[3]), view.keys.shape[2]
        counts = [int(part * length) for length in view.lengths.flatten().tolist()]
        assert view.scores is not None
        member = self._important(view.scores, view.valid, view.order, view.lengths, counts)
        most = max(counts), n - min(counts)
        factor = _balance(view).to(torch.float16)
        keys = self._mixed(view.keys, member, most, factor)
        held.pack(keys, self._mixed(view.values, member, most, None))

    def _important(self, score: Tensor, among: Tensor, order: Tensor, lengths: Tensor, counts: list[int]) -> Tensor:
        """(B, Hkv, S) bool: the newest counts[b] // 2 entries and those of the highest score, counts[b] in all."""
        budget = torch.tensor(counts, device=score.device)[:, None, None]
        recent = order >= lengths - (budget // 2).clamp(min=1)
        score = score.masked_fill(recent, torch.inf).masked_fill(~among, -torch.inf)
        return highest(score, budget) & among

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
        assert layout is not None and held.scores is not None
        assert isinstance(keys, Mixed) and isinstance(values, Mixed)
        part, valid = self._part(held.keys.shape[3]), layout.valid[:, None]
        lengths, before = layout.derive(("entries", T), lambda: _entries(layout, T, len(held.keys)))
        counts, had = ([int(part * n) for n in rows] for rows in (lengths, before))
        was = torch.cat([keys.members(), valid[..., -T:].expand(*keys.member.shape[:2], T)], -1)
        order = layout.derive("order", lambda: valid.long().cumsum(-1) - 1)
        total = order[..., -1:] + 1
        stay = self._important(held.scores, was, order, total, counts)
        gone = max(a + (n - m) - b for a, b, n, m in zip(had, counts, lengths, before))
        most = max(counts), gone, len(layout) - min(counts)
        held.body = (
            keys.demote(self._high(held.keys, keys.factor), was, stay, most),
            values.demote(self._high(held.values, None), was, stay, most),
        )
        held.keys, held.values = held.keys[:, :, T:].clone(), held.values[:, :, T:].clone()


def _balance(view: CacheView) -> Tensor:
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
