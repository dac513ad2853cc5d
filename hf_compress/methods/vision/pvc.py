"""PVC: frame by frame, or look by look at a still image, tokens are added that say what earlier ones have not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.budget import shares
from hf_compress.methods.base import VisionMethod, check_count
from hf_compress.modules.attention import heads, zero
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.cells import cells, means

__all__ = ["PVC"]

CLOCK = 256  # channels of a time


@register("pvc", stage="vision", kind="trained", paper="arXiv:2412.09613", needs={"visual"})
@dataclass
class PVC(VisionMethod):
    """Every frame looks back at the same places of earlier ones, told its time, and is pooled; an image is shown again.

    `layers` of causal attention over time run over the projected tokens (n, T * N, D) of a video, each place by itself;
    norms are scaled, shifted and gated by what a small network makes of the time of the frame, from 0 to 1. Then each
    frame becomes the means of its cells (`tensors.cells`), and the K tokens are shared evenly. An image is a video of
    `copies` equal frames, the outputs of one behind those of the other: as they know their times, each can say what
    earlier ones have not. All begins without effect, as the means. Cost O(layers * T * N * (D + T) * c), c <= 512
    channels of attention.

    Source: "PVC: Progressive Visual Token Compression for Unified Image and Video Processing in Large Vision-Language
    Models", CVPR 2025, arXiv:2412.09613 (OpenGVLab/PVC, whose model has not been read). There the attention over time
    stands in the last layers of the tower, a projector that knows the time joins 4 x 4 patches, and every frame, and
    each of four copies of an image, has 64 tokens. Here it stands behind the projector that is there; how many layers,
    their order and their start are our choice.

    Args:
        copies: of an image, at most one per token that stays.
        layers: how many.

    Raises:
        ValueError: `copies` or `layers` is no integer of at least 1, or `positions` none of its values.
    """

    copies: int = 4
    layers: int = 2

    needs_weights: ClassVar[bool] = True
    scope: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("copies", self.copies)
        check_count("layers", self.layers)

    def module(self, model: nn.Module) -> nn.Module:
        """The layers."""
        return Progress(model.config.get_text_config().hidden_size, self.layers)

    def counts(self, tokens: Tokens, keep: int) -> list[int]:
        """Tokens that stay of each frame, or of each copy of an image."""
        T, N = len(tokens.grids), tokens.count // len(tokens.grids)
        count = T if T > 1 else min(self.copies, keep)
        return shares(keep, [1.0] * count, [N] * count)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """The middle tokens of the cells of every frame, (n, K); of an image those of K cells."""
        h, w = tokens.grids[0]
        if len(tokens.grids) == 1:
            kept = cells(h, w, keep).centres
        else:
            counts = enumerate(self.counts(tokens, keep))
            kept = torch.cat([t * h * w + cells(h, w, k).centres for t, k in counts if k])
        return Assignment(kept.repeat(len(tokens), 1).to(tokens.device))

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        """(n, K, D)."""
        assert tokens.module is not None
        (h, w), counts = tokens.grids[0], self.counts(tokens, assignment.kept.shape[1])
        x = tokens.embeddings.unflatten(1, (len(tokens.grids), h * w))
        x = tokens.module(x.expand(-1, len(counts), -1, -1))
        return torch.cat([means(x[:, t], cells(h, w, k, x.device)) for t, k in enumerate(counts) if k], 1)


class Progress(nn.Module):
    """See `PVC`."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(Past(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(n, T, N, D) to (n, T, N, D)."""
        time = clock(torch.linspace(0, 1, x.shape[1], device=x.device)).to(x.dtype)
        x = x.transpose(1, 2)
        for layer in self.layers:
            x = layer(x, time)
        return x.transpose(1, 2)


class Past(nn.Module):
    """x + gate * what it reads of earlier frames, the norm scaled and shifted by the time; at the start x."""

    def __init__(self, width: int):
        super().__init__()
        self.heads, size = heads(width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.time = nn.Sequential(nn.Linear(CLOCK, width), nn.SiLU(), zero(nn.Linear(width, 3 * width)))
        self.query_key_value = nn.Linear(width, 3 * self.heads * size)
        self.out = nn.Linear(self.heads * size, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(..., T, D) at times (T, CLOCK) to (..., T, D)."""
        scale, shift, gate = self.time(time).chunk(3, -1)
        normed = self.norm(x) * (1 + scale) + shift
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in self.query_key_value(normed).chunk(3, -1)
        )
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = x + gate * self.out(read.transpose(-3, -2).flatten(-2))
        return out


def clock(time: Tensor) -> Tensor:
    """(T,) times from 0 to 1 to (T, CLOCK) fp32: sines and cosines of up to a thousand radians."""
    rate = 1000 * 10000 ** (-torch.arange(CLOCK // 2, device=time.device).float() / (CLOCK // 2))
    angle = time.float()[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], -1)
