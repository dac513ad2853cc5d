"""Vectors of the moments of a video."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Frames(nn.Module):
    """A trained vector per frame, zeros at first, stretched to the length of the video.

    Args:
        frames: how many; width: D.
    """

    def __init__(self, frames: int, width: int):
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(frames, width))

    def forward(self, sizes: Sequence[int]) -> Tensor:
        """(N, D), at least fp32: that of its frame for every token of frames of so many."""
        known = self.vectors.to(torch.promote_types(self.vectors.dtype, torch.float32)).mT[None]
        vectors = F.interpolate(known, len(sizes), mode="linear", align_corners=False)[0].mT
        many = torch.tensor(list(sizes), device=vectors.device)
        return vectors.repeat_interleave(many, 0, output_size=sum(sizes))
