"""The tokens that are left inside a vision tower while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_compress.signals import Assignment


@dataclass
class Reduction:
    """Tokens still present in one run of the tower.

    Attributes:
        steps: blocks after whose attention tokens go: those in front of the features of this call.
        groups: (n, M) the current row that each of the M original tokens went into; None before the first reduction.
        sizes: (n, m) float, original tokens per current row.
        stages: `groups` by number of current rows, for the hidden states of earlier blocks.
        step: assignment of the block that is running, between its norm and its exit.
    """

    steps: int = 0
    groups: Tensor | None = None
    sizes: Tensor | None = None
    keys: Tensor | None = None
    step: Assignment | None = None
    stages: dict[int, Tensor] = field(default_factory=dict)

    def apply(self, step: Assignment, present: int) -> None:
        """Compose the map with one more step over `present` rows."""
        into = step.groups
        if into is None:
            into = step.kept.new_full((step.kept.shape[0], present), -1)
            into = into.scatter(1, step.kept, torch.arange(step.kept.shape[1], device=into.device).expand_as(step.kept))
        old = self.groups if self.groups is not None else torch.arange(present, device=into.device).expand_as(into)
        self.groups = torch.where(old < 0, old, into.gather(1, old.clamp(min=0)))
        sizes = torch.ones(into.shape, dtype=torch.float32, device=into.device) if self.sizes is None else self.sizes
        rows = step.kept.shape[1]
        merged = sizes.new_zeros(into.shape[0], rows + 1).scatter_add(1, into % (rows + 1), sizes)
        self.sizes = merged[:, :rows]
        self.stages[rows] = self.groups

    def spread(self, x: Tensor) -> Tensor:
        """(n, m, D) back to (n, M, D): every original token repeats its group; dropped ones repeat row 0."""
        groups = self.stages.get(x.shape[1])
        if groups is None:
            return x
        return x.gather(1, groups.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
