"""SegEarth-R1's connector: two convolutions that each halve both sides of the grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.methods.cells import CellMethod
from hf_compress.modules.attention import heads, zero
from hf_compress.registry import register
from hf_compress.tensors.cells import Cells, means

__all__ = ["SegEarth"]


@register("segearth", stage="vision", kind="trained", paper="arXiv:2504.09644", needs={"visual"})
@dataclass
class SegEarth(CellMethod):
    """Means of cells, each joined by what two convolutions see around it.

    Two convolutions of 3 x 3 run over the grid of projected tokens (n, N, D), with c <= 512 channels and LN behind each
    and nothing between; each halves both sides (rounding up) as long as K places are left, so that at a sixteenth of
    the tokens a place is one output. The mean of a cell of tokens and a map, zero at first, of the mean of the places
    over it make an output. Cost O(N * D * c).

    Source: "SegEarth-R1: Geospatial Pixel Reasoning via Large Language Model", arXiv:2504.09644
    (earth-insights/SegEarth-R1), its connector, from 32 x 32 features of a Swin tower to 64 tokens. There it stands in
    place of a projector, its outputs are the map alone, at a sixteenth or at a quarter (one convolution), and LN runs
    over channels and places, which fixes the size of the image. Here LN runs over channels, and K may be any
    (`tensors.cells`): at a quarter the second convolution halves nothing.
    """

    def module(self, model: nn.Module) -> nn.Module:
        """The convolutions."""
        return Halved(model.config.get_text_config().hidden_size)


class Halved(nn.Module):
    """See `SegEarth`."""

    def __init__(self, width: int):
        super().__init__()
        inner = math.prod(heads(width))
        self.convolutions = nn.ModuleList(nn.Conv2d(c, inner, 3, padding=1) for c in (width, inner))
        self.norm, self.norms = nn.LayerNorm(width), nn.ModuleList(nn.LayerNorm(inner) for _ in range(2))
        self.out = zero(nn.Linear(inner, width))

    def forward(self, x: Tensor, layout: Cells) -> Tensor:
        """(n, N, D) to (n, K, D)."""
        picture, keep = self.norm(x).mT.unflatten(-1, layout.grid), len(layout.centres)
        for convolution, norm in zip(self.convolutions, self.norms):
            fits = math.prod(-(-n // 2) for n in picture.shape[-2:]) >= keep
            picture = F.conv2d(picture, convolution.weight, convolution.bias, 1 + fits, padding=1)
            picture = norm(picture.movedim(1, -1)).movedim(-1, 1)
        seen = F.interpolate(picture, layout.grid, mode="nearest").flatten(2).mT
        return means(x, layout) + self.out(means(seen, layout))
