"""LLaVA-Mini: the question reads the image before the language model does, which then needs a token or two of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.methods.base import check_count
from hf_compress.methods.cells import CellMethod, check_queries
from hf_compress.modules.attention import Attention, Mlp, heads
from hf_compress.modules.positions import SIDE, middles, sincos
from hf_compress.modules.queries import Queries
from hf_compress.registry import register
from hf_compress.signals import QUESTION, Assignment, Read, Tokens
from hf_compress.tensors.cells import Cells, cells

__all__ = ["LLaVAMini"]


@register("llava_mini", stage="vision", kind="trained", paper="arXiv:2501.03895", needs={"visual"})
@dataclass
class LLaVAMini(CellMethod):
    """A few layers in front of the language model let the question read all tokens; K compressed ones go on with it.

    K queries look at the projected tokens (n, N, D) (`modules.queries`). Then `layers` of causal attention run over
    [all tokens; the compressed ones; the embedded text behind the image]: what they make of the compressed ones stands
    in the prompt, and what they add to text is added to it (of several images the mean), so that most of what is asked
    for is fused into the question. All begins without effect on the text. Cost O(layers * (N + K + T) * (D + N + K +
    T) * C), C <= 512 channels of attention.

    Text of later turns, whose images stand in the cache, is not told anything. Another question needs other tokens.

    Source: "LLaVA-Mini: Efficient Image and Video Large Multimodal Models with One Vision Token", ICLR 2025,
    arXiv:2501.03895 (ictnlp/LLaVA-Mini). As in its code the compressed tokens go through the layers too; in the paper
    they do not. There these are layers of the language model's own kind, and all text of the prompt is fused; here they
    are narrower ones that start without effect, and text in front of the image is as it was. There K is a square, that
    of training, and keys of a single token carry no place; here K may be any up to `queries`.

    Args:
        layers: in front of the language model.
        queries: how many there are, and the largest K.

    Raises:
        ValueError: `layers` or `queries` is no integer of at least 1, `positions` none of its values. Also: a budget of
            more tokens than queries.
    """

    layers: int = 4
    queries: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("layers", self.layers)
        check_count("queries", self.queries)

    def reads(self, depth: int) -> set[Read]:
        return {QUESTION}

    def check(self, grid: tuple[int, int], keep: int) -> None:
        """Refuses more tokens than queries, unless all stay."""
        check_queries(self.queries, grid, keep)

    def module(self, model: nn.Module) -> nn.Module:
        """Queries and layers."""
        return Fusion(model.config.get_text_config().hidden_size, self.queries, self.layers)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """The middle tokens of K cells, (n, K): where the outputs stand in the prompt."""
        self.check(tokens.grid, keep)
        return super().assign(tokens, keep)

    def make(self, tokens: Tokens, assignment: Assignment) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(n, K, D) compressed tokens, and (n, T, D) what is added to text."""
        assert tokens.module is not None
        layout = cells(*tokens.grid, assignment.kept.shape[1], tokens.device)
        out: tuple[Tensor, Tensor] = tokens.module(tokens.embeddings, *tokens.question, layout)
        return out


class Fusion(nn.Module):
    """See `LLaVAMini`."""

    def __init__(self, width: int, queries: int, layers: int):
        super().__init__()
        self.queries = Queries(width, queries)
        self.attention = nn.ModuleList(Attention(width) for _ in range(layers))
        narrow = 2 * math.prod(heads(width))  # they run over all tokens
        self.mlp = nn.ModuleList(Mlp(width, narrow) for _ in range(layers))

    def forward(self, x: Tensor, text: Tensor, real: Tensor, layout: Cells) -> tuple[Tensor, Tensor]:
        """(n, N, D), text (n, T, D) and (n, T) bool to (n, K, D) and (n, T, D)."""
        few, (N, D) = self.queries(x, layout), x.shape[1:]
        stop = N + few.shape[1]
        order = real.long().argsort(dim=1, descending=True, stable=True)[..., None]  # padding last: no text reads it
        z = torch.cat([x, few, text.take_along_dim(order, 1)], 1)
        image = middles(layout.grid, x.device)
        beside = torch.arange(text.shape[1], device=x.device).float()[:, None] / SIDE  # a column of steps
        at = torch.cat([image, image[layout.centres], F.pad(beside, (0, 1), value=2.0)])
        place = sincos(at, D).to(x.dtype)
        for attention, mlp in zip(self.attention, self.mlp):
            z = mlp(attention(z, place=place, causal=True))
        return z[:, N:stop], z[:, stop:].take_along_dim(order.argsort(dim=1), 1) - text
