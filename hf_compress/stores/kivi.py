"""The low-bit store: which part of a layer is packed when (arXiv:2402.02750)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.signals import CacheView
from hf_compress.stores.dense import HeldLayer
from hf_compress.stores.packed import Packed
from hf_compress.tensors.pack import bits_per_element


@dataclass(frozen=True)
class KiviStore:
    """Keys in groups of tokens per channel, values in groups of channels per token, the newest tokens unpacked.

    Keys are packed `residual` tokens at a time, values as soon as they are not among the newest `residual`. What a
    forward appended is packed at the next one, so that rejected candidates can be cropped.

    Args:
        key_bits, value_bits: 1, 2, 4 or 8.
        group: numbers that share step and minimum; for values the largest divisor of the head size up to it.
        residual: a multiple of `group`.
    """

    key_bits: int
    value_bits: int
    group: int = 32
    residual: int = 32

    @property
    def bits(self) -> float:
        """Mean bits per number, residual not counted."""
        return (bits_per_element(self.key_bits, self.group) + bits_per_element(self.value_bits, self.group)) / 2

    def settle(self, held: list[HeldLayer], views: list[CacheView] | None) -> None:
        """Pack what has left the residual."""
        for layer in held:
            self._settle(layer)

    def _settle(self, held: HeldLayer) -> None:
        k = held.keys.shape[2] // self.residual * self.residual
        v = max(0, held.values.shape[2] - self.residual)
        if not k and not v:
            return
        keys, values = self._keys(held, k), self._values(held.values[:, :, :v])
        if held.body is not None:
            old_k, old_v = held.body
            assert isinstance(old_k, Packed) and isinstance(old_v, Packed)
            keys, values = old_k.append(keys), old_v.append(values)
        held.body = keys, values
        held.keys, held.values = held.keys[:, :, k:].clone(), held.values[:, :, v:].clone()

    def _keys(self, held: HeldLayer, n: int) -> Packed:
        assert held.layout is not None
        x = held.keys
        if not held.layout.all_valid:  # padding would widen the range of its group
            x = _nearest_valid(x, held.layout.valid[..., -x.shape[2] :])
        return Packed.of(x[:, :, :n], self.key_bits, self.group, channel=True)

    def _values(self, x: Tensor) -> Packed:
        d = x.shape[-1]
        group = next(g for g in range(min(self.group, d), 0, -1) if d % g == 0)
        return Packed.of(x, self.value_bits, group, channel=False)


def _nearest_valid(x: Tensor, valid: Tensor) -> Tensor:
    """(B, Hkv, n, d) with invalid slots replaced by the valid one before them (the first one, at the start)."""
    valid = valid if valid.ndim == 3 else valid[:, None]
    at = torch.arange(x.shape[2], device=x.device)
    last = torch.where(valid, at, -1).cummax(-1).values
    first = valid.long().argmax(-1, keepdim=True)
    source = torch.where(last < 0, first, last).expand(x.shape[:3])
    return x.gather(2, source[..., None].expand_as(x))
