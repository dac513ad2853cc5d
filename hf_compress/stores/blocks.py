"""The prompt packed as a whole, and what is generated in blocks of one size, each by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.signals import CacheView
from hf_compress.stores.dense import HeldLayer
from hf_compress.stores.packed import Stored
from hf_compress.stores.store import Store


class Blocks(Stored):
    """The prompt, and what was generated since in blocks of one size, each packed by itself.

    Args:
        prompt: a body of (B, Hkv, 1, n, d).
        later: a body of (B, Hkv, J, m, d), J blocks of m tokens; None: there are none yet.
        count: J.
    """

    def __init__(self, prompt: Stored, later: Stored | None = None, count: int = 0):
        self.prompt, self.later, self.count = prompt, later, count

    def __len__(self) -> int:
        return len(self.prompt) + (0 if self.later is None else self.count * len(self.later))

    def read(self) -> Tensor:
        parts = [part.read().flatten(2, 3) for part in (self.prompt, self.later) if part is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def grow(self, more: Stored, count: int) -> Blocks:
        """With `count` more blocks behind."""
        return Blocks(self.prompt, more if self.later is None else self.later.join(more), self.count + count)


@dataclass(frozen=True)
class BlockStore(Store):
    """Packs the prompt, and then every `gap` tokens as a block; what the layer remembers of packed entries goes.

    Args:
        gap: tokens of a block; 0: what is generated stays as it is.
    """

    gap: int

    def prompt(self, view: CacheView) -> tuple[Stored, Stored]:
        """Keys and values of a prompt, packed: bodies of (B, Hkv, 1, n, d)."""
        raise NotImplementedError

    def block(self, held: HeldLayer, valid: Tensor, cut: Callable[[Tensor], Tensor]) -> tuple[Stored, Stored]:
        """Keys and values of the blocks that are complete: bodies of (B, Hkv, J, gap, d).

        Args:
            valid: (B, 1, T) bool, of the tail.
            cut: (B, H, T, ...) of the tail to the (B, H, J, gap, ...) of its complete blocks.
        """
        raise NotImplementedError

    def settle(self, held: Sequence[HeldLayer], views: Sequence[CacheView] | None) -> None:
        for i, layer in enumerate(held):
            if views is not None:
                keys, values = self.prompt(views[i])
                self._pack(layer, Blocks(keys), Blocks(values))
            elif self.gap and layer.body is not None and layer.keys.shape[2] >= self.gap:
                self._grow(layer)

    def _grow(self, held: HeldLayer) -> None:
        layout, old, T = held.layout, held.body, held.keys.shape[2]
        assert layout is not None and old is not None and isinstance(old[0], Blocks) and isinstance(old[1], Blocks)
        J = T // self.gap
        valid = layout.valid[:, None, len(layout) - T :]
        keys, values = self.block(held, valid, lambda x: x[:, :, : J * self.gap].unflatten(2, (J, self.gap)))
        self._pack(held, old[0].grow(keys, J), old[1].grow(values, J))

    def _pack(self, held: HeldLayer, keys: Blocks, values: Blocks) -> None:
        before = held.keys.shape[2]
        held.pack(keys, values)
        n = before - held.keys.shape[2]
        held.side = {name: t[:, :, n:].clone() for name, t in held.side.items()}
