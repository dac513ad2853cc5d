"""Fewer frames: evenly spaced ones whole, the simplest way to spend fewer tokens on a video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_compress.methods.base import VisionMethod
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.select import spaced, spaced_grid

__all__ = ["FewerFrames"]


@register("frames", stage="vision", kind="control", paper="control", needs={"visual", "video"})
@dataclass
class FewerFrames(VisionMethod):
    """Evenly spaced frames of a video whole, as if it had been sampled more sparsely.

    Of T frames of N tokens the K // N that `spaced` picks keep all their tokens; a rest of K % N tokens is one more
    frame among them, the last, of which evenly spaced tokens stay as `uniform` picks them. `ratio` is the fraction of
    the whole video. A tower that sees frames one by one gives what it would give of the shorter video; on M-RoPE the
    frames keep their times. An image keeps evenly spaced tokens, those of `uniform`. Cost O(K) on the host.

    Control, no paper: what a method for videos has to beat, beside `random`, `uniform` (fewer tokens of every frame)
    and `strided`.
    """

    scope: ClassVar[str] = "video"

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K): depends on the grids and K only."""
        h, w = tokens.grids[0]
        whole, rest = divmod(keep, h * w)
        picked = spaced(len(tokens.grids), whole + (rest > 0))
        cells = [range(h * w)] * whole + [spaced_grid(h, w, rest)] * (rest > 0)
        index = torch.tensor([t * h * w + cell for t, mine in zip(picked, cells) for cell in mine])
        return Assignment(index.to(tokens.device, non_blocking=True).repeat(len(tokens), 1))
