"""TextHawk: queries made of the image ask the tower level by level, and four of a row become one token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.methods.base import check_count
from hf_compress.methods.levels import LevelMethod
from hf_compress.modules.attention import Attention, Mlp, zero
from hf_compress.modules.positions import Arc, middles
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.cells import Cells, cells, maxima, means
from hf_compress.tensors.merge import pool1d

__all__ = ["TextHawk"]

JOINED = 4  # tokens of a row that become one


@register("texthawk", stage="vision", kind="trained", paper="arXiv:2410.05261", needs={"visual"})
@dataclass
class TextHawk(LevelMethod):
    """K tokens, each of four neighbours in a row that have been resampled from all levels of the tower.

    1. An image is cut into K wide cells, and each of them into four from left to right. Every quarter becomes a query:
    its mean, and a map of the maxima of what two layers make of its projected tokens (n, N, D). 2. The queries read
    each other and the whole image, in `layers` layers, of which each sees hidden states of another level of the tower,
    the deepest first. Places are vectors on an arc between two trained ones, for rows and for columns. 3. The four of a
    cell go side by side through a linear map. All begins as the means of the quarters, and their mean. Cost O(layers *
    (K + N) * D * c + layers * K * N * c), c <= 512 channels of attention.

    Source: "TextHawk2: A Large Vision-Language Model Excels in Bilingual OCR and Grounding with 16x Fewer Tokens",
    arXiv:2410.05261 (and "TextHawk", arXiv:2404.09204), whose code is not published. There a quarter is 2 x 2 patches,
    so that 16 x 16 patches give 8 x 2 tokens; ours are as large as K asks for, the same at a sixteenth. It stands there
    in place of the projector, trained on a hundred million images, and tokens of tiles that lie side by side are
    interleaved; here it follows the projector, crop by crop. The detection head is left out.

    Args:
        layers: how many; with fewer levels than layers some see the same one.

    Raises:
        ValueError: `layers` is no integer of at least 1, `levels` are no blocks of a tower, or `positions` none of its
            values. On call: images whose tower ran elsewhere.
    """

    layers: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("layers", self.layers)

    def tower_reader(self, model: nn.Module, width: int, depth: int) -> nn.Module:
        """The resampler."""
        return Resampler(model.config.get_text_config().hidden_size, width, len(self.backs(depth)), self.layers)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """The middle tokens of the cells, (n, K)."""
        return Assignment(wide_cells(*tokens.grid, keep)[0].centres.repeat(len(tokens), 1).to(tokens.device))

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        assert tokens.module is not None
        _, layout, of = wide_cells(*tokens.grid, assignment.kept.shape[1], tokens.device)
        out: Tensor = tokens.module(tokens.embeddings, self.seen(tokens), layout, of)
        return out


def wide_cells(h: int, w: int, k: int, device: torch.device | str | None = None) -> tuple[Cells, Cells, Tensor]:
    """k cells of an (h, w) grid, four times as wide as high where they can be; the parts of all of them from left to
    right, up to four of each; and (k, 4) int64 which parts are the four of each, some twice where it is narrow."""
    narrow = -(-w // JOINED)
    if k <= h * narrow:  # cells of a grid in which four columns are one
        layout = cells(h, narrow, k)
        column = layout.boxes[:, [1, 3]]
        boxes = layout.boxes.clone()
        boxes[:, [1, 3]] = torch.where(column == narrow, w, column * w // narrow)
    else:
        boxes = cells(h, w, k).boxes
    parts: list[list[int]] = []
    of = []
    for top, left, bottom, right in boxes.tolist():
        many, start = min(JOINED, right - left), len(parts)
        edge = [left, *(left + pool1d(right - left, many)[0].bincount().cumsum(0)).tolist()]
        parts += [[top, edge[i], bottom, edge[i + 1]] for i in range(many)]
        of.append([start + i * many // JOINED for i in range(JOINED)])
    coarse, fine = (boxed((h, w), b, device) for b in (boxes, torch.tensor(parts)))
    return coarse, fine, torch.tensor(of, device=device)


def boxed(grid: tuple[int, int], boxes: Tensor, device: torch.device | str | None) -> Cells:
    """Cells that are these boxes, (K, 4), in the order of their rows."""
    place = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))[:, None]  # (N, 1, 2)
    inside = ((place >= boxes[:, :2]) & (place < boxes[:, 2:])).all(-1)
    middle = (boxes[:, :2] + boxes[:, 2:] - 1) // 2
    return Cells(grid, *(t.to(device) for t in (inside.long().argmax(1), middle[:, 0] * grid[1] + middle[:, 1], boxes)))


class Resampler(nn.Module):
    """See `TextHawk`."""

    def __init__(self, width: int, tower: int, levels: int, layers: int):
        super().__init__()
        self.levels, self.place = levels, Arc(width)
        self.norm, self.up, self.propose = nn.LayerNorm(width), nn.Linear(width, width), zero(nn.Linear(width, width))
        self.seen = nn.ModuleList(nn.Sequential(nn.LayerNorm(tower), nn.Linear(tower, width)) for _ in range(levels))
        self.among = nn.ModuleList(Attention(width) for _ in range(layers))
        self.across = nn.ModuleList(Attention(width) for _ in range(layers))
        self.mlp = nn.ModuleList(Mlp(width) for _ in range(layers))
        self.join = nn.Linear(JOINED * width, width)
        with torch.no_grad():
            self.join.weight.copy_(torch.eye(width).repeat(1, JOINED) / JOINED)
            self.join.bias.zero_()

    def forward(self, x: Tensor, seen: Tensor, layout: Cells, of: Tensor) -> Tensor:
        """(n, N, D) and (n, N, levels * C), with the quarters and (K, 4) which of them are joined, to (n, K, D)."""
        q = means(x, layout) + self.propose(maxima(F.gelu(self.up(self.norm(x))), layout))
        sides = torch.tensor(layout.grid, device=x.device)
        at = layout.boxes.unflatten(1, (2, 2)).float().mean(1) / sides
        place, everywhere = self.place(at), self.place(middles(layout.grid, x.device))
        levels = [m(level) + everywhere for m, level in zip(self.seen, seen.chunk(self.levels, -1))]
        for i, (among, across, mlp) in enumerate(zip(self.among, self.across, self.mlp)):
            y = levels[-1 - i * self.levels // len(self.mlp)]
            q = mlp(across(among(q, place=place), y, place=place))
        out: Tensor = self.join(q[:, of].flatten(2))
        return out
