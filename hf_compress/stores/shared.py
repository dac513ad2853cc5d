"""Tensors that several layers of a cache store once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_compress.layout import Layout


class Shared:
    """Tensors that the bodies of several layers refer to, immutable; the batch comes first in each.

    Layers ask for the same change one after the other (`rows` in `reorder_cache`, `to` in `offload`): the last change
    is remembered, so they keep sharing. A tensor of one row serves a batch of any size. Whoever is built on a `Shared`
    first counts its bytes, so that bytes of layers sum to bytes of the cache.
    """

    def __init__(self, *parts: Tensor):
        self.parts = parts
        self._claimed = False
        self._last: tuple[object, weakref.ref[Shared]] | None = None

    def claim(self) -> list[Tensor]:
        """The tensors for the first who asks, nothing for the others."""
        first, self._claimed = not self._claimed, True
        return list(self.parts) if first else []

    def rows(self, which: Tensor) -> Shared:
        """The batch rows `which` (R,), in that order."""
        return self._once(which, lambda t: t if len(t) == 1 else t[which.to(t.device)])

    def to(self, device: torch.device) -> Shared:
        """The same on another device."""
        return self._once(("to", device), lambda t: t.to(device))

    def _once(self, key: object, change: Callable[[Tensor], Tensor]) -> Shared:
        if self._last is not None:
            last, made = self._last[0], self._last[1]()
            if made is not None and (last is key or (isinstance(key, tuple) and last == key)):
                return made
        made = Shared(*map(change, self.parts))
        self._last = (key, weakref.ref(made))
        return made

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_last": None}


def check_same_rows(layouts: Sequence[Layout | None]) -> None:
    """Raises ValueError unless layers with these layouts hold the same rows."""
    first = layouts[0]
    assert first is not None
    for other in layouts[1:]:
        assert other is not None
        if other is first:
            continue
        if len(other) != len(first) or not torch.equal(other.index.to(first.device), first.index):
            raise ValueError(
                f"layers that are compressed together hold {len(first)} and {len(other)} rows of the prompt: a decoder "
                "method drops rows between them; use a cache method that takes every layer by itself, or no decoder "
                "method"
            )
