"""LookupViT: few compressed tokens take the heavy layers and exchange what they hold with many light ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.methods.base import check_count
from hf_compress.methods.cells import CellMethod
from hf_compress.modules.attention import Attention, Mlp, heads, zero
from hf_compress.registry import register
from hf_compress.tensors.cells import Cells, means

__all__ = ["LookupViT"]


@register("lookupvit", stage="vision", kind="trained", paper="arXiv:2407.12753", needs={"visual"})
@dataclass
class LookupViT(CellMethod):
    """K compressed tokens that gather from all tokens, think for them, and tell them, block by block.

    A compressed token begins as the mean of its cell, all N tokens are lookup tokens. In each of `blocks` the
    compressed tokens attend to the lookup tokens, then to each other, and go through a wide map; the lookup
    tokens attend back to them and go through a narrow one. One product of queries and keys serves both directions:
    its softmax over the lookup tokens gathers, that over the compressed ones tells. Every part begins as the identity.
    Returned are the compressed tokens, (n, K, D). Cost O(blocks * (N * D + N * K) * C), C <= 512.

    Source: "LookupViT: Compressing visual information to a limited number of tokens", ECCV 2024, arXiv:2407.12753, for
    which there is no code; beyond the two kinds of tokens and the exchange in both directions, what a block holds is
    our choice. There it is the encoder that is built of such blocks; here they follow the projector, so that every
    tower will do. K may be another one than in training.

    Trained for ten minutes at 89 % (`recipes/tiny_encoders`) the embedded LLaVA answers 92.0, 91.0, 81.5 and 77.0 %
    of 200 questions with 50, 75, 89 and 94 % removed (random: 94.0, 78.0, 50.5 and 36.0 %): where many tokens may
    stay as they are, ones that are made anew lose.

    Args:
        blocks: rounds of exchange.

    Raises:
        ValueError: `blocks` is no integer of at least 1, or `positions` none of its values.
    """

    blocks: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("blocks", self.blocks)

    def module(self, model: nn.Module) -> nn.Module:
        """The blocks."""
        return Lookup(model.config.get_text_config().hidden_size, self.blocks)


class Lookup(nn.Module):
    """See `LookupViT`."""

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, last=i == blocks - 1) for i in range(blocks))

    def forward(self, x: Tensor, layout: Cells) -> Tensor:
        """(n, N, D) to (n, K, D)."""
        few = means(x, layout)
        for block in self.blocks:
            few, x = block(few, x)
        return few


class Block(nn.Module):
    """One exchange; in the `last` one nobody asks for the lookup tokens any more."""

    def __init__(self, width: int, last: bool):
        super().__init__()
        self.exchange, self.attention, self.wide = Exchange(width), Attention(width), Mlp(width)
        self.back = None if last else Back(width)

    def forward(self, few: Tensor, many: Tensor) -> tuple[Tensor, Tensor]:
        """(n, K, D) and (n, N, D), both anew."""
        few, a, b = self.exchange(few, many)
        few = self.wide(self.attention(few))
        return few, many if self.back is None else self.back(few, many, a, b)


class Exchange(nn.Module):
    """Compressed tokens gather; and both sides of the product of queries and keys, (n, H, K, d) and (n, H, N, d)."""

    def __init__(self, width: int):
        super().__init__()
        self.heads, size = heads(width)
        inner = self.heads * size
        self.norm_few, self.norm_many = nn.LayerNorm(width), nn.LayerNorm(width)
        self.few, self.many, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.out = zero(nn.Linear(inner, width))

    def forward(self, few: Tensor, many: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, K, D) and (n, N, D)."""
        normed = self.norm_many(many)
        parts = self.few(self.norm_few(few)), self.many(normed), self.value(normed)
        a, b, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts)
        return few + self.out(F.scaled_dot_product_attention(a, b, v).transpose(1, 2).flatten(2)), a, b


class Back(nn.Module):
    """Compressed tokens tell the lookup tokens, which go through a narrow map."""

    def __init__(self, width: int):
        super().__init__()
        inner = math.prod(heads(width))
        self.value, self.out = nn.Linear(width, inner), zero(nn.Linear(inner, width))
        self.narrow = Mlp(width, max(1, inner // 2))

    def forward(self, few: Tensor, many: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """(n, N, D), of what `Exchange` gave."""
        v = self.value(few).unflatten(-1, (a.shape[1], -1)).transpose(1, 2)
        told = F.scaled_dot_product_attention(b, a, v).transpose(1, 2).flatten(2)
        out: Tensor = self.narrow(many + self.out(told))
        return out
