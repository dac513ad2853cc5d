"""HICom: the question looks into every cell, and some queries of its own over the whole image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_compress.methods.base import check_count
from hf_compress.methods.cells import CellMethod
from hf_compress.methods.question import asked
from hf_compress.modules.attention import Mlp, Pooling, heads, zero
from hf_compress.modules.positions import middles, sincos
from hf_compress.registry import register
from hf_compress.signals import QUESTION, Assignment, Read, Tokens
from hf_compress.tensors.cells import Cells, cells, members

__all__ = ["HICom"]


@register("hicom", stage="vision", kind="trained", paper="arXiv:2503.16036", needs={"visual"})
@dataclass
class HICom(CellMethod):
    """Cells pooled by what the question looks at, and queries that the question bends over the whole image.

    g is the mean of the embedded text behind the image, x (n, N, D) the projected tokens. Local: the weights of a cell
    are softmax(U g . V x) over it, its output their mean of x itself. Global: trained queries, scaled and shifted by
    maps of g, attend to x with its places (`modules.attention.Pooling`). Of K tokens min(`queries`, K // 2) are global
    and stand behind the local ones, in raster order; both go through a map of their own. U begins at zero: the local
    outputs are then the means of the cells. Cost O(N * D * c), c <= 512 channels.

    Source: "Hybrid-Level Instruction Injection for Video Token Compression in Multi-modal Large Language Models",
    CVPR 2025, arXiv:2503.16036 (lntzm/HICom), its `local43_global32`. There g and x meet in the joint space of SigLIP,
    which needs its text tower and no maps; here U and V are trained. There cells are 4 frames of 3 x 3 tokens; here
    every frame is pooled alone, into any K cells (`tensors.cells`).

    Args:
        queries: trained ones, and most global tokens.

    Raises:
        ValueError: `queries` is no integer of at least 1, or `positions` none of its values.
    """

    queries: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("queries", self.queries)

    def reads(self, depth: int) -> set[Read]:
        return {QUESTION}

    def module(self, model: nn.Module) -> nn.Module:
        """What pools and what asks."""
        return Guided(model.config.get_text_config().hidden_size, self.queries)

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        assert tokens.module is not None
        out: Tensor = tokens.module(tokens.embeddings, asked(tokens), tokens.grid, assignment.kept.shape[1])
        return out


class Guided(nn.Module):
    """See `HICom`."""

    def __init__(self, width: int, queries: int):
        super().__init__()
        inner = math.prod(heads(width))
        self.guide, self.look, self.match = nn.LayerNorm(width), zero(nn.Linear(width, inner)), nn.Linear(width, inner)
        self.query, self.bend = nn.Parameter(torch.zeros(queries, width)), nn.Linear(width, 2 * width)
        self.norm, self.norm_query, self.attention = nn.LayerNorm(width), nn.LayerNorm(width), Pooling(width)
        self.local, self.whole = Mlp(width), Mlp(width)

    def forward(self, x: Tensor, question: Tensor, grid: tuple[int, int], keep: int) -> Tensor:
        """(n, N, D) and the question (n, D) to (n, keep, D)."""
        g, normed = self.guide(question), self.norm(x)
        few = min(len(self.query), keep // 2)
        local = self.local(self.pooled(x, normed, g, cells(*grid, keep - few, x.device)))
        scale, shift = self.bend(g)[:, None].chunk(2, -1)
        query = self.norm_query(self.query[:few] * (1 + scale) + shift)
        place = sincos(middles(grid, x.device), x.shape[-1]).to(x.dtype)
        return torch.cat([local, self.whole(self.attention(query, normed + place, normed, x))], 1)

    def pooled(self, x: Tensor, normed: Tensor, g: Tensor, layout: Cells) -> Tensor:
        """(n, K, D): the mean of the tokens of each cell, by what g (n, D) makes of them."""
        at, real = members(layout)
        logits = (self.match(normed) @ self.look(g)[..., None])[..., 0] * self.look.out_features**-0.5  # (n, N)
        share = logits[:, at].masked_fill(~real, -torch.inf).softmax(-1)
        return (share[:, :, None] @ x[:, at])[:, :, 0]
