"""SparseFormer: latent tokens that look at the image through boxes which they move."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.methods.base import check_count
from hf_compress.methods.cells import CellMethod
from hf_compress.modules.attention import Attention, Mlp, heads, zero
from hf_compress.registry import register
from hf_compress.tensors.ambient import own_precision
from hf_compress.tensors.cells import Cells

__all__ = ["SparseFormer"]

CHANNELS, BOTTLENECK, MIXED = 64, 128, 32  # of the map that is sampled, in front of the mixing matrices, points behind
WAVES, LONGEST = 8, 128  # wavelengths of the sines that tell a token its box
START = 0.5  # sides of a box
MOST = 2.0  # of the logarithm of the growth of a side in one stage: else one bad step loses the image for good


@register("sparseformer", stage="vision", kind="trained", paper="arXiv:2312.01987", needs={"visual"})
@dataclass
class SparseFormer(CellMethod):
    """K latent tokens, each with a box in which it samples a few points, mixes them and moves the box, step by step.

    The projected tokens become a map of 64 channels. A latent token begins as one start vector, its box at the
    middle of its cell with sides of one half. `repeats` times, with the same weights but a vector of the stage: sample
    `points` points of the map in the box, by bilinear interpolation; mix channels, then points, by matrices that the
    token predicts; add what its box is; attend to the other latent tokens; a map; move the box. The output is the
    token in the middle of the first box plus a map of the latent, which begins at zero. Cost O(N * D + repeats * K *
    (K + points) * C), C <= 512: whatever N, after the map.

    Source: "Bootstrapping SparseFormers from Vision Foundation Models", CVPR 2024, arXiv:2312.01987 (base:
    arXiv:2304.03768; showlab/sparseformer). There the latents replace the encoder: the map is one of pixels, frozen
    blocks of a trained tower follow, and training aligns what comes out with that tower. Here the tower and its
    projector run, the map is theirs, and only the language model saves: what the method is faithful in is how latents
    look. K may be any.

    Trained for ten minutes at 89 % (`recipes/tiny_encoders`) the embedded LLaVA answers 82.5, 85.0, 62.5 and 60.0 %
    of 200 questions with 50, 75, 89 and 94 % removed (random: 94.0, 78.0, 50.5 and 36.0 %): where many tokens may
    stay as they are, ones that are made anew lose, and these were still learning.

    Args:
        repeats: stages; points: per latent and stage.

    Raises:
        ValueError: `repeats` or `points` is no integer of at least 1 or 2, or `positions` none of its values.
    """

    repeats: int = 4
    points: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("repeats", self.repeats)
        check_count("points", self.points, least=2)

    def module(self, model: nn.Module) -> nn.Module:
        """Everything that looks."""
        return Focus(model.config.get_text_config().hidden_size, self.repeats, self.points)


class Focus(nn.Module):
    """See `SparseFormer`."""

    def __init__(self, width: int, repeats: int, points: int):
        super().__init__()
        C, c = math.prod(heads(width)), min(CHANNELS, width)
        self.map = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, c), nn.LayerNorm(c))
        self.start, self.stages = nn.Parameter(torch.randn(C) * 0.02), nn.Parameter(torch.randn(repeats, C) * 0.02)
        self.norm, self.offsets = nn.LayerNorm(C), zero(nn.Linear(C, 2 * points))
        with torch.no_grad():
            self.offsets.bias.copy_(torch.rand(2 * points) - 0.5)
        self.bottleneck = nn.Linear(C, BOTTLENECK)
        self.channels, self.points = nn.Linear(BOTTLENECK, c * c), nn.Linear(BOTTLENECK, MIXED * points)
        self.mixed = nn.Linear(MIXED * c, C)
        self.place = nn.Sequential(nn.LayerNorm(8 * WAVES), nn.Linear(8 * WAVES, C))
        self.attention, self.mlp = Attention(C), Mlp(C)
        self.move, self.out = zero(nn.Linear(C, 4)), nn.Sequential(nn.LayerNorm(C), zero(nn.Linear(C, width)))

    def forward(self, x: Tensor, layout: Cells) -> Tensor:
        """(n, N, D) to (n, K, D)."""
        picture = self.map(x).mT.unflatten(-1, layout.grid)  # (n, c, h, w)
        box = first_boxes(layout).expand(len(x), -1, -1)
        latent = self.start.expand(*box.shape[:2], -1)
        for stage in self.stages:
            latent = latent + stage
            latent = latent + self.look(latent, box, picture)
            latent = latent + self.place(waves(box).to(latent.dtype))
            latent = self.mlp(self.attention(latent))
            box = moved(box, self.move(latent))
        out: Tensor = x[:, layout.centres] + self.out(latent)
        return out

    def look(self, latent: Tensor, box: Tensor, picture: Tensor) -> Tensor:
        """(n, K, C): what each latent makes of the points that it samples."""
        normed = self.norm(latent)
        seen = sampled(picture, points(box, self.offsets(normed).unflatten(-1, (-1, 2))))  # (n, K, P, c)
        rule = self.bottleneck(normed)
        seen = F.gelu(seen @ self.channels(rule).unflatten(-1, (seen.shape[-1], -1)))
        seen = F.gelu(self.points(rule).unflatten(-1, (MIXED, -1)) @ seen)
        out: Tensor = self.mixed(seen.flatten(2))
        return out


def first_boxes(layout: Cells) -> Tensor:
    """(K, 4) fp32, x0, y0, x1, y1 as fractions of the sides: boxes around the middle of each cell."""
    h, w = layout.grid
    top, left, bottom, right = layout.boxes.float().unbind(-1)
    middle = torch.stack([(left + right) / (2 * w), (top + bottom) / (2 * h)], -1)
    return torch.cat([middle - START / 2, middle + START / 2], -1)


def moved(box: Tensor, change: Tensor) -> Tensor:
    """(..., 4) boxes, their centres moved by the first two of `change` (..., 4) sides, their sides grown e to the
    others."""
    size, change = box[..., 2:] - box[..., :2], change.float()
    centre = (box[..., :2] + box[..., 2:]) / 2 + change[..., :2] * size
    size = size * change[..., 2:].clamp(-MOST, MOST).exp()
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def points(box: Tensor, offsets: Tensor) -> Tensor:
    """(..., P, 2) fp32, x and y of points in boxes (..., 4): `offsets` (..., P, 2), of which three standard deviations
    are one side."""
    offsets, size = offsets.float(), box[..., 2:] - box[..., :2]
    spread = (offsets - offsets.mean(-2, keepdim=True)) / (3 * offsets.std(-2, keepdim=True) + 1e-7)
    return (box[..., :2] + size / 2)[..., None, :] + spread * size[..., None, :]


@own_precision
def sampled(picture: Tensor, at: Tensor) -> Tensor:
    """(n, K, P, c): a map (n, c, h, w) at points (n, K, P, 2), bilinear; beyond its border it goes on as it ends."""
    found = F.grid_sample(picture.float(), 2 * at - 1, padding_mode="border", align_corners=False)
    return found.permute(0, 2, 3, 1).to(picture.dtype)


def waves(box: Tensor) -> Tensor:
    """(..., 4) boxes to (..., 8 * WAVES) sines and cosines of pi times their sides over growing wavelengths."""
    length = LONGEST ** (torch.arange(WAVES, device=box.device) / WAVES)
    angle = (math.pi * box[..., None] / length).flatten(-2)
    return torch.cat([angle.sin(), angle.cos()], -1)
