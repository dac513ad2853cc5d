"""DocCompressor: every token of the page in small reads the part of the page in large that it shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_compress.methods.base import VisionMethod, check_count
from hf_compress.modules.attention import Mlp, heads, zero
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.cells import cells, means
from hf_compress.tensors.merge import group_softmax, group_sum
from hf_compress.tensors.regions import centres
from hf_compress.tensors.select import spaced

__all__ = ["DocCompressor"]


@register("doccompressor", stage="vision", kind="trained", paper="arXiv:2409.03420", needs={"visual", "places"})
@dataclass
class DocCompressor(VisionMethod):
    """The tokens of a whole page in small, each of which has read the tokens of the crops that lie in its region.

    On the projected tokens (n, N, D) of all crops of an image: the image in small, which comes first, is cut into K
    cells (`tensors.cells`); the mean of each goes through `layers` of attention to the tokens of the crops whose
    middles lie in it, to those of the image in small where there are none, and of a map of its own. Both begin without
    effect: the outputs are then the image in small. A budget of more tokens than that has keeps all of these and
    further tokens of the crops as they are, evenly spaced. An image of one crop, and every frame, is in small and in
    large the same. The length does not hang on the resolution. Cost O(layers * N * D * c), c <= 512 channels of
    attention.

    Source: "mPLUG-DocOwl2: High-resolution Compressing for OCR-free Multi-page Document Understanding",
    arXiv:2409.03420 (X-PLUG/mPLUG-DocOwl). There the small page has 36 x 9 tokens and gives as many, for any page, and
    they go on as they are normed; here as they are, so that a projector that is there already needs no training first.
    Crops of its own there; here those that the processor makes, which may end within a cell.

    Args:
        layers: of attention to the crops.

    Raises:
        ValueError: `layers` is no integer of at least 1, or `positions` none of its values. On call: several crops
            without the image in small in front of them.
    """

    layers: int = 2

    needs_weights: ClassVar[bool] = True
    scope: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("layers", self.layers)

    def module(self, model: nn.Module) -> nn.Module:
        """The layers."""
        return Reading(model.config.get_text_config().hidden_size, self.layers)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """The middle tokens of the cells, and what is beyond them, (n, K)."""
        h, w = tokens.grids[0]
        small, rest = cells(h, w, min(keep, h * w)), max(0, keep - h * w)
        further = h * w + torch.tensor(spaced(tokens.count - h * w, rest), dtype=torch.int64)
        return Assignment(torch.cat([small.centres, further]).repeat(len(tokens), 1).to(tokens.device))

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        """(n, K, D)."""
        assert tokens.module is not None
        x, (h, w) = tokens.embeddings, tokens.grids[0]
        count = min(assignment.kept.shape[1], h * w)
        layout = cells(h, w, count, tokens.device)
        read = regions(tokens, layout.groups, count)
        made = tokens.module(means(x[:, : h * w], layout), x, read.repeat(len(x), 1))
        return torch.cat([made, assignment.pick(x)[:, count:]], 1)


def regions(tokens: Tokens, groups: Tensor, count: int) -> Tensor:
    """(N,) int64: the cell of the image in small that reads each token, -1 of those that none reads.

    Args:
        groups: (h * w,), of `count` cells that of each of its tokens.
    """
    h, w = tokens.grids[0]
    if len(tokens.grids) == 1:
        return groups
    if tokens.boxes[0] != (0, 0, 1, 1):
        raise ValueError("doccompressor: an image of several crops must begin with the whole image in small")
    place = centres(tokens.grids[1:], tokens.boxes[1:]).to(groups.device)
    row, column = ((place[:, i] * n).long().clamp(0, n - 1) for i, n in enumerate((h, w)))
    large = groups[row * w + column]
    found = torch.bincount(large, minlength=count) > 0
    return torch.cat([groups.masked_fill(found[groups], -1), large])


class Reading(nn.Module):
    """See `DocCompressor`."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.attention = nn.ModuleList(Window(width) for _ in range(layers))
        self.mlp = nn.ModuleList(Mlp(width) for _ in range(layers))

    def forward(self, x: Tensor, y: Tensor, groups: Tensor) -> Tensor:
        """(n, K, D) that read (n, N, D), each those whose group (n, N) it is."""
        for attention, mlp in zip(self.attention, self.mlp):
            x = mlp(attention(x, y, groups))
        return x


class Window(nn.Module):
    """x + attention of each of K outputs to the tokens of its own group, however many these are; at the start x."""

    def __init__(self, width: int):
        super().__init__()
        self.heads, size = heads(width)
        self.norm, self.norm_key = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, self.heads * size)
        self.key_value = nn.Linear(width, 2 * self.heads * size)
        self.out = zero(nn.Linear(self.heads * size, width))

    def forward(self, x: Tensor, y: Tensor, groups: Tensor) -> Tensor:
        """As of `Reading`."""
        K = x.shape[1]
        q, k, v = (
            t.unflatten(-1, (self.heads, -1))
            for t in (self.query(self.norm(x)), *self.key_value(self.norm_key(y)).chunk(2, -1))
        )
        mine = q.take_along_dim(groups.clamp(min=0)[..., None, None], 1)  # (n, N, H, d)
        share = group_softmax((mine * k).sum(-1) * q.shape[-1] ** -0.5, groups, K)
        read = group_sum((share[..., None] * v).flatten(2), groups % (K + 1), K + 1)[:, :K]
        out: Tensor = x + self.out(read)
        return out
