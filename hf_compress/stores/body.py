"""What a packed part of a layer's keys (or values) is, whatever the packing, and who packs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hf_compress.signals import CacheView
    from hf_compress.stores.dense import HeldLayer


class Body(Protocol):
    """The oldest entries of one layer's keys or values, packed; immutable."""

    def __len__(self) -> int:
        """Number of slots n."""

    def read(self) -> Tensor:
        """(B, Hkv, n, d): everything unpacked, zeros in slots that only fill up."""

    def tensors(self) -> list[Tensor]:
        """What is stored."""

    def rows(self, which: Tensor) -> Body:
        """The batch rows `which` (R,), in that order."""

    def to(self, device: torch.device) -> Body:
        """The same on another device."""


class Store(Protocol):
    """When and how the entries of a layer are packed."""

    @property
    def bits(self) -> float:
        """Mean stored bits per number of keys and values, 16 if nothing is packed."""

    @property
    def continues(self) -> bool:
        """Whether what is generated is packed too, under policy="grow"."""

    def settle(self, held: list[HeldLayer], views: Sequence[CacheView] | None) -> None:
        """Pack what is to be packed, in the layers of a group.

        Called with their views at the end of the prompt, and without before each later forward.
        """
