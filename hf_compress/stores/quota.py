"""How many entries the heads of a layer may hold, and where a cache that is held at that stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quota:
    """The budget of one layer.

    Attributes:
        budget: (B,) or (B, Hkv) entries per head.
        least, most: bounds of it, known without asking the device.
        cursor: (B,), or of all rows, where a method that goes round the slots goes on; None: it does not.
        in_order: whether the slots stand from the oldest to the newest.
        ages: (B, 1 or Hkv, S) the slots from the oldest to the newest, if somebody counts.
    """

    budget: Tensor
    least: int
    most: int
    cursor: Tensor | int | None = None
    in_order: bool = True
    ages: Tensor | None = None

    @classmethod
    def of(cls, budget: Tensor, device: torch.device) -> Quota:
        """Of a budget on the host, for tensors on `device`."""
        return cls(budget.to(device, non_blocking=True), int(budget.min()), int(budget.max()))

    def at(self, cursor: Tensor | None) -> Quota:
        """With a cursor (B, 1, 1)."""
        if cursor is None:
            return replace(self, cursor=None)
        rows = cursor[:, 0, 0]
        return replace(self, cursor=int(rows[0]) if bool((rows == rows[0]).all()) else rows)

    def each(self, change: Callable[[Tensor], Tensor]) -> Quota:
        """With the same change in all tensors; the batch comes first in each."""
        ages = None if self.ages is None else change(self.ages)
        cursor = change(self.cursor) if torch.is_tensor(self.cursor) else self.cursor
        return replace(self, budget=change(self.budget), ages=ages, cursor=cursor)
