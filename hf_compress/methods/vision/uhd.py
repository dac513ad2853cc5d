"""LLaVA-UHD: every slice of an image is resampled by the same trained queries, each of which sees its own region."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.methods.base import check_count
from hf_compress.methods.cells import CellMethod
from hf_compress.modules.positions import middles, sincos
from hf_compress.modules.regions import RegionPooling
from hf_compress.registry import register
from hf_compress.tensors.ambient import own_precision
from hf_compress.tensors.cells import Cells

__all__ = ["UHD"]


@register("uhd", stage="vision", kind="trained", paper="arXiv:2403.11703", needs={"visual"})
@dataclass
class UHD(CellMethod):
    """K regions of every slice, each asked by a trained query for its place.

    A table of `side` x `side` trained queries lies over the slice, whatever its shape; region k takes the query at its
    middle, between four of them. q = LN(query) + place, k = LN(LN(x) + place) and v = LN(x) of the projected tokens
    (n, N, D); every query sees the tokens of its region alone (`modules.regions`). Cost O(N * D * C), C <= 512 channels
    of attention.

    Source: "LLaVA-UHD: an LMM Perceiving Any Aspect Ratio and High-Resolution Images", ECCV 2024, arXiv:2403.11703
    (thunlp/LLaVA-UHD). As its code, whose 12 x 12 queries look at regions; in the paper 64 look at the whole slice (see
    `mqt`). Slices, and the tokens between them, are those that the processor of the model makes, of which each is
    resampled alone; in the source they follow the shape of the image, and the resampler stands in place of the
    projector. Here it begins as the means of the regions, and they are any K (`tensors.cells`).

    Args:
        side: of the table of queries.

    Raises:
        ValueError: `side` is no integer of at least 1, or `positions` none of its values.
    """

    side: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("side", self.side)

    def module(self, model: nn.Module) -> nn.Module:
        """The table and its attention."""
        return Slice(model.config.get_text_config().hidden_size, self.side)


class Slice(nn.Module):
    """See `UHD`."""

    def __init__(self, width: int, side: int):
        super().__init__()
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(width, side, side), std=0.02))
        self.norm, self.norm_query, self.norm_key = (nn.LayerNorm(width) for _ in range(3))
        self.attention = RegionPooling(width)

    def forward(self, x: Tensor, layout: Cells) -> Tensor:
        """(n, N, D) to (n, K, D)."""
        at = layout.boxes.float().unflatten(1, (2, 2)).mean(1) / torch.tensor(layout.grid, device=x.device)
        query = self.norm_query(sampled(self.query, at)) + sincos(at, x.shape[-1]).to(x.dtype)
        value = self.norm(x)
        key = self.norm_key(value + sincos(middles(layout.grid, x.device), x.shape[-1]).to(x.dtype))
        out: Tensor = self.attention(query.expand(len(x), -1, -1), key, value, x, layout)
        return out


@own_precision
def sampled(table: Tensor, at: Tensor) -> Tensor:
    """(K, D): a table (D, side, side) at places (K, 2), rows first, as fractions of the sides; as it ends beyond."""
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    found = F.grid_sample(
        wide[None], 2 * at.flip(-1)[None, None].to(wide) - 1, padding_mode="border", align_corners=False
    )
    return found[0, :, 0].mT.to(table.dtype)
