"""Two neighbouring layers as one set of directions and their own norms (arXiv:2405.14366)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.signals import CacheView
from hf_compress.stores.dense import HeldLayer
from hf_compress.stores.shared import Shared, check_same_rows
from hf_compress.stores.store import Store
from hf_compress.tensors.kvmerge import take
from hf_compress.tensors.pack import bits_per_element, dequantize, pack, pieces, quantize, unpack
from hf_compress.tensors.slerp import divergent, slerp

NOTHING, MERGED, OWN = range(3)  # what is stored for a slot: padding has nothing


class Merged:
    """Keys or values (B, Hkv, n, d) of one of the two layers.

    Args:
        n: slots.
        kind: shared (B, Hkv, n / 4) uint8, two bits that say what is stored for each slot.
        direction: shared (B, m, d) unit vectors of the slots merged, in the order of (head, slot), zeros at the end of
            samples with fewer; or their codes of `bits`, steps and minima.
        norm: (B, m) their lengths in this layer.
        own: (B, R, d) the slots that are not merged, in the same order.
    """

    tight = False

    def __init__(self, bits: int, n: int, kind: Shared, direction: Shared, norm: Tensor, own: Tensor):
        self.bits, self.n, self.kind, self.direction, self.norm, self.own = bits, n, kind, direction, norm, own
        self._mine = [*kind.claim(), *direction.claim()]

    def __len__(self) -> int:
        return self.n

    def read(self) -> Tensor:
        kind, B = unpack(self.kind.parts[0], 2)[..., : self.n], len(self.norm)
        e = self.direction.parts[0]
        if self.bits < 16:
            _, step, low = self.direction.parts
            e = dequantize(unpack(e, self.bits), step, low, self.own.dtype)
        # every vector that is stored, then a zero, and where each slot finds its own
        stored = torch.cat([e * self.norm[..., None], self.own, self.own.new_zeros(B, 1, self.own.shape[2])], 1)
        m, end = self.norm.shape[1], stored.shape[1] - 1
        flat = kind.flatten(1)
        merged, own = flat == MERGED, flat == OWN
        at = torch.where(merged, merged.cumsum(1) - 1, torch.where(own, m + own.cumsum(1) - 1, end))
        return take(stored, at.expand(B, -1)).unflatten(1, kind.shape[1:])

    def tensors(self) -> list[Tensor]:
        return [self.norm, self.own, *self._mine]

    def rows(self, which: Tensor) -> Merged:
        norm, own = (t[which.to(t.device)] for t in (self.norm, self.own))
        return Merged(self.bits, self.n, self.kind.rows(which), self.direction.rows(which), norm, own)

    def to(self, device: torch.device) -> Merged:
        if device == self.norm.device:
            return self
        shared = self.kind.to(device), self.direction.to(device)
        return Merged(self.bits, self.n, *shared, self.norm.to(device), self.own.to(device))


@dataclass(frozen=True)
class MergedStore(Store):
    """Packs pairs of layers at the end of the prompt; layers that come alone stay as they are, and later tokens too.

    Args:
        t: where the common direction stands between the first layer (0) and the second (1).
        retain: pairs whose cosine is in the lowest share of the range of cosines stay apart.
        width: bits of a number of the directions: 16 (as they are), 8 or 4.
        group: numbers that share step and minimum where they are quantised.
    """

    t: float
    retain: float
    width: int = 16
    group: int = 32

    def removed(self, size: int) -> float:
        """Fraction of the 16-bit numbers of two layers that is not stored, if the share `retain` stays apart.

        Not counted: two bits per slot and head that say what is stored.
        """
        bits = 16.0 if self.width == 16 else bits_per_element(self.width, self._group(size))
        return (1 - self.retain) * (1 - (size * bits / 16 + 2) / (2 * size))

    def settle(self, held: Sequence[HeldLayer], views: Sequence[CacheView] | None) -> None:
        """Merge the two layers."""
        if views is None or len(held) == 1:
            return
        check_same_rows([layer.layout for layer in held])
        valid = views[0].valid
        keys = self._merge(views[0].keys, views[1].keys, valid)
        values = self._merge(views[0].values, views[1].values, valid)
        for layer, k, v in zip(held, keys, values):
            layer.pack(k, v)

    def _merge(self, x: Tensor, y: Tensor, valid: Tensor) -> tuple[Merged, Merged]:
        """Keys or values (B, Hkv, n, d) of the two layers, which may lie on two devices."""
        home, wide = y.device, [x.float(), y.to(x.device).float()]
        direction, cosine, *norms = pieces(self._common, *wide)
        own = divergent(cosine[..., 0], valid, self.retain)
        merged = valid & ~own
        direction = _line_up(direction, merged)
        kind = (merged * MERGED + own * OWN).to(torch.uint8)
        shared = Shared(pack(F.pad(kind, (0, -kind.shape[2] % 4)), 2)), Shared(*self._codes(direction, x.dtype))
        parts = [(_line_up(n, merged)[..., 0].to(x.dtype), _line_up(t, own).to(x.dtype)) for n, t in zip(norms, wide)]
        first, second = (Merged(self.width, x.shape[2], *shared, *part) for part in parts)
        return first, second.to(home)

    def _common(self, *pair: Tensor) -> tuple[Tensor, ...]:
        """Common directions (..., n, d) of two layers' vectors, their cosines and both norms (..., n, 1)."""
        norms = [t.norm(dim=-1, keepdim=True) for t in pair]
        u, w = (t / n.clamp(min=torch.finfo(torch.float32).tiny) for t, n in zip(pair, norms))
        return slerp(u, w, self.t), (u * w).sum(-1, keepdim=True), *norms

    def _codes(self, direction: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if self.width == 16:
            return (direction.to(dtype),)
        codes, step, low = quantize(direction, self.width, self._group(direction.shape[-1]))
        return pack(codes, self.width), step, low

    def _group(self, size: int) -> int:
        return next(g for g in range(min(self.group, size), 0, -1) if size % g == 0)


def _line_up(x: Tensor, mask: Tensor) -> Tensor:
    """(B, H, n, d) to (B, m, d): the vectors chosen by `mask` (B, H, n) in front, zeros behind where they are fewer."""
    chosen = mask.flatten(1)
    counts = chosen.sum(1, keepdim=True)
    at = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(counts.max())]
    return take(x.flatten(1, 2), at) * (torch.arange(at.shape[1], device=x.device) < counts)[..., None]
