"""KIVI: keys per channel, values per token, in a few bits (arXiv:2402.02750)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from hf_compress.methods.base import CacheMethod, check_choice, check_count
from hf_compress.registry import register
from hf_compress.stores.body import Store
from hf_compress.stores.kivi import KiviStore
from hf_compress.tensors.pack import BITS


@register("kivi", stage="cache", paper="arXiv:2402.02750")
@dataclass
class Kivi(CacheMethod):
    """Store all entries in 1, 2, 4 or 8 bits; nothing is evicted.

    Keys share step and minimum along the tokens of a channel, where outliers live, values along the channels of a
    token; the newest `residual` tokens stay as they are. `ratio` chooses the bits of keys and values (the nearest of
    what bits and `group` reach, residual not counted, must be within 0.02); without it `bits` says them.

    Source: KIVI, ICML 2024, arXiv:2402.02750. Cost: everything is unpacked at every step unless a fused kernel reads
    it.

    Args:
        bits: of keys and values, where `ratio` is not given.
        group: numbers that share step and minimum.
        residual: newest tokens that are not packed, a multiple of `group`.
    """

    bits: int = 2
    group: int = 32
    residual: int = 32

    evicts = False
    needs_budget = False
    policies = ("grow",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bits", self.bits, BITS)
        check_count("group", self.group, least=2)
        check_count("residual", self.residual)
        if self.residual % self.group:
            raise ValueError(f"residual={self.residual} must be a multiple of group={self.group}")
        self._chosen = KiviStore(self.bits, self.bits, self.group, self.residual)

    def check(self, layers: int, ratio: Fraction | None) -> None:
        if not ratio:
            return
        options = [KiviStore(k, v, self.group, self.residual) for k in BITS for v in BITS]
        self._chosen = min(options, key=lambda s: (abs(1 - s.bits / 16 - ratio), -s.key_bits))
        reached = sorted({round(1 - s.bits / 16, 4) for s in options if s.bits < 16})
        if abs(1 - self._chosen.bits / 16 - ratio) > 0.02:
            raise ValueError(
                f"ratio={float(ratio):.4g}: with group={self.group} whole bits reach {reached} (within 0.02); choose "
                "one of these, another group, or evict entries as well (store='kivi4' of an evicting method)"
            )

    def packing(self) -> Store | None:
        return self._chosen
