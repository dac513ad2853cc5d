"""What a packed part of a layer's keys (or values) is, whatever the packing."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Body(Protocol):
    """The oldest entries of one layer's keys or values, packed; immutable."""

    @property
    def tight(self) -> bool:
        """Whether slots that only fill up take no bytes."""

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
