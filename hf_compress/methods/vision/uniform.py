"""Uniform selection: evenly spaced tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_compress.methods.base import VisionMethod, check_choice
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.select import spaced, spaced_grid

__all__ = ["Uniform"]


@register("uniform", stage="vision", kind="control", paper="control", needs={"visual"})
@dataclass
class Uniform(VisionMethod):
    """Evenly spaced tokens, on the 2-D grid or along the raster sequence.

    On the sequence token `floor((i + 1/2) * N / K)` is kept for i = 0..K-1. On the (h, w) grid about sqrt(K *
    h / w) rows are kept by that rule, each with K // rows columns by that rule; rows picked by that rule hold
    one more until the sum is K. Always K distinct tokens. Cost O(K) on the host, the same for all images.

    Control, no paper.

    Args:
        grid: spread over rows and columns; False: along the raster sequence, where columns may line up.

    Raises:
        ValueError: `grid` or `positions` is not one of its values.
    """

    grid: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("grid", self.grid, (True, False))

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K): depends on the grid and K only."""
        index = spaced_grid(*tokens.grid, keep) if self.grid else spaced(tokens.count, keep)
        return Assignment(torch.tensor(index).to(tokens.device, non_blocking=True).repeat(len(tokens), 1))
