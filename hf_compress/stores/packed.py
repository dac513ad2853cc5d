"""Keys and values in 1, 2, 4 or 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.tensors.pack import dequantize, pack, quantize, unpack


class Packed:
    """(B, Hkv, n, d) as packed codes, with step and minimum per group.

    Args:
        bits: 1, 2, 4 or 8.
        channel: groups run over consecutive tokens of one channel (keys), else over channels of one token (values).
        codes: (B, Hkv, d, n * bits / 8) uint8 if `channel`, else (B, Hkv, n, d * bits / 8).
        step, low: (B, Hkv, d, n / group) or (B, Hkv, n, d / group).
    """

    def __init__(self, bits: int, channel: bool, codes: Tensor, step: Tensor, low: Tensor):
        self.bits, self.channel, self.codes, self.step, self.low = bits, channel, codes, step, low

    @classmethod
    def of(cls, x: Tensor, bits: int, group: int, *, channel: bool) -> Packed:
        """From (B, Hkv, n, d); `group` divides n if `channel`, else d."""
        codes, step, low = quantize(x.mT if channel else x, bits, group)
        return cls(bits, channel, pack(codes, bits), step, low)

    def __len__(self) -> int:
        return self.codes.shape[3] * 8 // self.bits if self.channel else self.codes.shape[2]

    def read(self) -> Tensor:
        x = dequantize(unpack(self.codes, self.bits), self.step, self.low, torch.float32)
        return x.mT if self.channel else x

    def append(self, more: Packed) -> Packed:
        """These slots followed by those of `more`, packed alike."""
        dim = 3 if self.channel else 2
        parts = zip((self.codes, self.step, self.low), (more.codes, more.step, more.low))
        return Packed(self.bits, self.channel, *(torch.cat(pair, dim) for pair in parts))

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.step, self.low]

    def rows(self, which: Tensor) -> Packed:
        return Packed(self.bits, self.channel, *(t[which.to(t.device)] for t in self.tensors()))

    def to(self, device: torch.device) -> Packed:
        return Packed(self.bits, self.channel, *(t.to(device) for t in self.tensors()))
