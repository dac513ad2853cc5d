"""KIVI: keys per channel, values per token, in a few bits (arXiv:2402.02750)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

from torch import nn

from hf_compress.methods.base import CacheMethod, check_choice, check_count, head_size
from hf_compress.registry import register
from hf_compress.stores.kivi import KiviMix, KiviStore
from hf_compress.stores.store import Store
from hf_compress.tensors.pack import BITS

TOLERANCE = Fraction(105, 100)  # bytes over promised bytes
LADDER = ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2), (2, 1), (1, 1))  # bits of keys and of values


@register("kivi", stage="cache", kind="low bits", paper="arXiv:2402.02750")
@dataclass
class Kivi(CacheMethod):
    """Store all entries in 1, 2, 4 or 8 bits; nothing is evicted.

    Keys share step and minimum along the tokens of a channel, where outliers live, values along the channels of a
    token; the newest tokens stay as they are, what is generated is packed in turn. `ratio` (against 16 bits per number)
    chooses the bits, keys never fewer than values; between two widths some layers take the wider one, evenly spaced
    over the depth. It also limits the tokens that stay as they are: to as many as a prompt of 1024 tokens can have
    within 5 % of the promised bytes (the same for every prompt, so that rows of a batch are packed as alone; a shorter
    prompt takes more bytes than promised). Without `ratio`, `bits` and `residual` say all.

    The paper leaves 0 to `residual` - 1 keys unpacked, counts groups from the first token and moves one value per step.
    Here keys and values alike keep `residual` to `residual` + `group` - 1, in groups counted from the end of the
    prompt: rows of a left-padded batch are then packed as each is alone, bit for bit.

    Source: "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML 2024, arXiv:2402.02750. Cost:
    everything is unpacked at every step unless a fused kernel reads it.

    Args:
        bits: of keys and values, where `ratio` is not given.
        group: numbers that share step and minimum.
        residual: newest tokens that are never packed; fewer where `ratio` does not afford them.
    """

    bits: int = 2
    group: int = 32
    residual: int = 32

    example = {"group": 4, "residual": 4}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bits", self.bits, BITS)
        check_count("group", self.group, least=4, most=2**16)
        check_count("residual", self.residual)
        store = KiviStore(self.bits, self.bits, self.group, self.residual)
        self._size: int | None = None
        self._mix: tuple[KiviStore, KiviStore, Fraction] = store, store, Fraction(0)

    def prepare(self, model: nn.Module, ratio: Fraction | None) -> None:
        self._size = head_size(model)

    def check(self, layers: int, ratio: Fraction | None) -> None:
        if not ratio:
            return
        stores = [KiviStore(k, v, self.group, self.residual, self._size) for k, v in LADDER]
        stores = [s for s in stores if s.bits < 16]
        target = 16 * (1 - ratio)
        nearest = min(stores, key=lambda s: abs(s.bits - target))
        if abs(nearest.bits - target) <= Fraction(16, 100) and nearest.bits <= Fraction(102, 100) * target:
            self._mix = self._afforded(nearest, target), self._afforded(nearest, target), Fraction(0)
            return
        for wide, narrow in pairwise(stores):
            if narrow.bits < target < wide.bits:
                low, high = Fraction(narrow.bits), Fraction(wide.bits)
                share = (target - low) / (high - low)
                self._mix = self._afforded(wide, target, target), self._afforded(narrow, target, target), share
                return
        least, most = (1 - s.bits / 16 for s in (stores[0], stores[-1]))
        raise ValueError(
            f"ratio={float(ratio):.4g}: 8 to 1 bits with group={self.group} remove {least:.4g} to {most:.4g} of the "
            "bytes; choose a ratio between, another group, or evict entries as well (store='kivi4' of an evicting "
            "method)"
        )

    def _afforded(self, store: KiviStore, target: Fraction, bits: Fraction | None = None) -> KiviStore:
        """With so few unpacked tokens that 1024 tokens, of which the others take `bits`, are within 5 % of `target`."""
        bits = Fraction(store.bits) if bits is None else bits
        spare = 1024 * (TOLERANCE * target - bits) - 16  # a short group of keys costs as much as a whole one
        return replace(store, residual=max(0, min(self.residual, int(spare / (16 - bits)))))

    def packing(self) -> Store:
        return KiviMix(*self._mix)
