"""The low-bit store: which part of a layer is packed when (arXiv:2402.02750)."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from hf_compress.layout import Layout
from hf_compress.signals import CacheView
from hf_compress.stores.dense import HeldLayer
from hf_compress.stores.packed import Packed, Stored, Tight
from hf_compress.stores.store import Store
from hf_compress.tensors.pack import bits_per_element, divisor, nearest_valid


@dataclass(frozen=True)
class KiviStore(Store):
    """Keys in groups of tokens per channel, values in groups of channels per token, the newest tokens unpacked.

    At the end of the prompt all but its newest `residual` tokens are packed, later `group` tokens at a time; at least
    the newest `residual` always stay. Groups of keys are counted from the end of the prompt, so that rows of a left
    padded batch, which end together, are packed as each would be alone. What a forward appended is packed at the next
    one at the earliest, so that it can be taken back.

    Args:
        key_bits, value_bits: 1, 2, 4 or 8.
        group: numbers that share step and minimum; for values the largest divisor of the head size up to it.
        residual: newest tokens that are never packed.
        size: channels of a value, where they are known; else as many as fill groups.
    """

    key_bits: int
    value_bits: int
    group: int = 32
    residual: int = 32
    size: int | None = None

    continues = True

    @property
    def bits(self) -> float:
        """Mean bits per number, residual not counted."""
        channels = divisor(self.size or self.group, self.group)
        return (bits_per_element(self.key_bits, self.group) + bits_per_element(self.value_bits, channels)) / 2

    def entries(self, length: int, share: Fraction, sizes: tuple[int, int], index: int = 0, outside: int = 0) -> int:
        """As `Store.entries`; those that stay `outside` are counted as the unpacked ones first.

        A prompt so short that the share is less than `residual` entries as they are keeps as many as that, unpacked.
        """
        room = share * length * 16 * sum(sizes)
        fits = lambda n: self._size(n, max(0, self.residual - outside), sizes) + 8 * index * n <= room
        return max(min(length, 1), bisect.bisect_left(range(length), True, key=lambda n: not fits(n + 1)))

    def _size(self, entries: int, unpacked: int, sizes: tuple[int, int]) -> int:
        """Bits of so many entries of a head, scales and unpacked ones included."""
        (key, value), packed = sizes, max(0, entries - unpacked)
        scales = 32 * key * (packed // self.group + 1) + 32 * packed * (value // divisor(value, self.group))
        codes = packed * (key * self.key_bits + value * self.value_bits)
        return 16 * (entries - packed) * (key + value) + codes + (scales if packed else 0)

    def settle(self, held: Sequence[HeldLayer], views: Sequence[CacheView] | None) -> None:
        """Pack what has left the residual."""
        for layer in held:
            if views is not None or layer.body is not None:
                self._settle(layer, at_prompt=views is not None)

    def _settle(self, held: HeldLayer, at_prompt: bool) -> None:
        layout, bits = held.layout, (self.key_bits, self.value_bits)
        assert layout is not None
        old: list[Grown | None] = [None, None]
        start = len(layout)
        if at_prompt:
            held.keys, held.values = held.whole()  # evicted to heads of different lengths, they lie end to end
        else:
            keys, values = held.body or (None, None)
            assert isinstance(keys, Grown) and isinstance(values, Grown)
            old, start, bits = [keys, values], keys.start, (keys.packed.bits, values.packed.bits)
        n = max(0, held.keys.shape[2] - self.residual - (len(layout) - start) % self.group)
        if not n and not at_prompt:
            return
        x = held.keys
        if not layout.all_valid:
            valid = layout.valid[..., -x.shape[2] :]
            x = nearest_valid(x, valid if valid.ndim == 3 else valid[:, None])
        new = (
            Packed.of(x[:, :, :n], bits[0], (self.group, 1)),
            Packed.of(held.values[:, :, :n], bits[1], (1, divisor(held.values.shape[3], self.group))),
        )
        counts = _uneven(layout, len(layout) - held.keys.shape[2] + n)
        held.pack(Grown.of(new[0], old[0], start, counts), Grown.of(new[1], old[1], start, counts))


@dataclass(frozen=True)
class KiviMix(Store):
    """Some layers in the wider of two stores, evenly spaced over the depth.

    Args:
        share: of the layers that take the wider one.
    """

    wide: KiviStore
    narrow: KiviStore
    share: Fraction

    continues = True

    def settle(self, held: Sequence[HeldLayer], views: Sequence[CacheView] | None) -> None:
        for n, layer in enumerate(held):
            view = None if views is None else views[n]
            i = 0 if view is None else view.depth  # what was packed first says it later
            store = self.wide if int((i + 1) * self.share) > int(i * self.share) else self.narrow
            store.settle([layer], None if view is None else [view])


class Grown(Stored):
    """The keys (or values) of a layer that are packed by now.

    Args:
        start: slots of the layer at the end of the prompt.
    """

    def __init__(self, packed: Packed | Tight, start: int):
        self.packed, self.start = packed, start

    @classmethod
    def of(cls, new: Packed, old: Grown | None, start: int, counts: list[list[int]] | None) -> Grown:
        """`new` behind what was packed before; `counts` of slots that the heads fill, if they differ."""
        if old is not None:
            new = (old.packed.loose() if isinstance(old.packed, Tight) else old.packed).join(new)
        return cls(new if counts is None else new.tightened(counts), start)

    @property
    def tight(self) -> bool:  # type: ignore[override]
        return self.packed.tight

    def __len__(self) -> int:
        return len(self.packed)

    def read(self) -> Tensor:
        return self.packed.read()


def _uneven(layout: Layout, n: int) -> list[list[int]] | None:
    """How many of the oldest n slots each head fills, if heads differ and all fill the newest of these slots."""
    if not layout.per_head or layout.all_valid:
        return None
    valid = layout.valid[..., :n]
    counts: list[list[int]] = valid.sum(-1).tolist()
    if all(len(set(heads)) == 1 for heads in counts) or bool((valid[..., 1:] < valid[..., :-1]).any()):
        return None
    return counts
