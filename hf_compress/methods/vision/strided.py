"""Uniform in time: every cell of a video at evenly spaced moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_compress.methods.base import VisionMethod
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.select import spaced, spaced_grid

__all__ = ["Strided"]


@register("strided", stage="vision", kind="control", paper="control", needs={"visual", "video"})
@dataclass
class Strided(VisionMethod):
    """Every cell of a video at evenly spaced moments, its neighbours at the moments between.

    Of the T * N tokens, cell by cell and in each in the order of time, those that `spaced` picks stay; the moments of
    the cell in row y and column x are turned by y + x, so that no moment is left out where K is N and more. `ratio` is
    the fraction of the whole video. An image keeps evenly spaced tokens, those of `uniform`. Cost O(K) on the host.

    Control, no paper: what a method for videos has to beat, beside `random`, `uniform` (fewer tokens of every frame,
    the same in all) and `frames`.
    """

    scope: ClassVar[str] = "video"

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K): depends on the grids and K only."""
        frames, (h, w) = len(tokens.grids), tokens.grids[0]
        if frames == 1:
            index = spaced_grid(h, w, keep)
        else:
            picked = (divmod(place, frames) for place in spaced(frames * h * w, keep))
            index = sorted((t + cell // w + cell % w) % frames * h * w + cell for cell, t in picked)
        return Assignment(torch.tensor(index).to(tokens.device, non_blocking=True).repeat(len(tokens), 1))
