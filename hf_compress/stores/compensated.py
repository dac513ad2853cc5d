"""Some heads whole, the others cut to both ends and one entry for all between (arXiv:2407.15891)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from hf_compress.signals import CacheView
from hf_compress.stores.dense import HeldLayer
from hf_compress.stores.ragged import Ragged
from hf_compress.stores.store import Store
from hf_compress.tensors.kvmerge import rerotated, take


@dataclass(frozen=True)
class CompensatedStore(Store):
    """Heads end to end, local ones cut to sinks, compensation entry and window.

    Args:
        retrieval: (layer, KV head) pairs that keep everything.
        share: of its entries that a local head keeps.
    """

    retrieval: frozenset[tuple[int, int]]
    share: Fraction
    sinks: int
    window: int
    rotated: bool = True

    def settle(self, held: Sequence[HeldLayer], views: Sequence[CacheView] | None) -> None:
        """Cut the prompt; what comes later stays as it is."""
        for layer, view in zip(held, views or []):
            self._cut(layer, view)

    def local(self, length: int) -> int:
        """Entries of a local head of a prompt of `length`: sinks, compensation entry and window."""
        return min(length, max(math.floor(length * self.share), self.sinks + 1 + self.window))

    def _cut(self, held: HeldLayer, view: CacheView) -> None:
        B, H, S, _ = view.keys.shape
        counts = torch.tensor([[self.local(n)] for n in view.lengths.flatten().tolist()], device=view.keys.device)
        whole = torch.tensor([(view.layer, h) in self.retrieval for h in range(H)], device=view.keys.device)
        counts = torch.where(whole, view.lengths[..., 0], counts)  # (B, H)
        dropped = view.lengths - counts[..., None] + 1  # what the compensation entry stands for, 1: itself
        if not bool((dropped > 1).any()):
            return
        newest = view.order >= self.sinks + dropped
        between = view.valid & (view.order >= self.sinks) & ~newest
        middle = between & (view.order == self.sinks + dropped // 2)
        stay = (view.valid & ~between) | middle
        n = int(counts.max())
        slots = stay.long().argsort(dim=-1, stable=True)[..., S - n :]  # the others in front only fill up
        held.select(slots, n - counts, self._compensated(view, slots, between, middle, dropped))
        lists = counts.tolist()
        lead = torch.zeros(B, H, self.sinks + 1, device=slots.device)
        lead[..., -1] = dropped[..., 0].log()
        held.pack(Ragged.of(held.keys, lists, lead), Ragged.of(held.values, lists))

    def _compensated(
        self, view: CacheView, slots: Tensor, between: Tensor, middle: Tensor, dropped: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (B, Hkv, n, d) of the slots, with means in place of the middle of what they stand for."""
        here = middle.gather(-1, slots)[..., None]

        def mean(x: Tensor) -> Tensor:
            total = (between[..., None, :].float() @ x.float()) / dropped[..., None]
            return torch.where(here, total.to(x.dtype), take(x, slots))

        if self.rotated:
            return mean(view.keys), mean(view.values)
        keys = rerotated(view.rotate, slots, mean(view.unrotate(view.keys.float())), view.keys)
        return torch.where(here, keys, take(view.keys, slots)), mean(view.values)
