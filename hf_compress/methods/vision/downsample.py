"""Downsampling: the smaller picture, the simplest way to spend fewer tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from hf_compress.methods.base import PixelMethod
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.merge import pool_cells
from hf_compress.tensors.select import identity

__all__ = ["Downsample"]


@register("downsample", stage="vision", kind="control", paper="control", needs={"visual"})
@dataclass
class Downsample(PixelMethod):
    """The image itself made smaller, so that it yields at most K tokens.

    Where the checkpoint takes any resolution the pixels are resized, and tower and language model both save.
    On fixed-resolution checkpoints the pixels cannot shrink: there the feature grid is average-pooled into
    cells instead, and only the language model saves.

    The target grid (h', w') is no larger than the original and has h' * w' <= K. Losing area and bending the
    aspect are weighed against each other: of all such grids it minimises the larger of K / (h' * w') and of
    the factor between the aspects h' / w' and h / w (ties: more tokens, then more columns). K is therefore an
    upper bound, not met exactly: 58 of 24 x 24 gives 7 x 8. Cost O(K * log K) on the host, O(N * D) for
    pooling.

    Control, no paper.
    """

    at_most: ClassVar[bool] = True

    def resize(self, grid: tuple[int, int], keep: int) -> tuple[int, int]:
        """The grid (h', w') with h' * w' <= keep that is nearest to `keep` tokens of the shape of `grid`."""
        h, w = grid
        best, cost = (1, 1), (math.inf, 0, 0)
        for a in range(1, min(h, keep) + 1):
            for b in range(1, min(w, keep // a) + 1):
                new = (max(keep / (a * b), a * w / (b * h), b * h / (a * w)), -a * b, a)
                if new < cost:
                    best, cost = (a, b), new
        return best

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Mean of every cell of the grid of `resize`, in the slot of its middle token: kept (n, h' * w')."""
        n, (h, w) = len(tokens), tokens.grid
        if keep == tokens.count:
            return Assignment(identity(n, keep, tokens.device))
        groups, centres = pool_cells(h, w, *self.resize((h, w), keep), tokens.device)
        return Assignment(centres.repeat(n, 1), groups.repeat(n, 1))
