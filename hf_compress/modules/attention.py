"""Attention of few tokens to many, narrow beside the language model in whose width they are."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 64  # channels of a head
MOST = 8  # heads, however wide the tokens are: the projections of N tokens would cost more than a layer saves


def heads(width: int) -> tuple[int, int]:
    """How many heads of how many channels tokens of a width get."""
    return max(1, min(MOST, width // HEAD)), min(HEAD, width)


class Attention(nn.Module):
    """x + attention of x to y, both normed; at the start x itself (the last map begins at zero).

    Args:
        width: D of both.
    """

    def __init__(self, width: int):
        super().__init__()
        self.heads, size = heads(width)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, self.heads * size)
        self.key_value = nn.Linear(width, 2 * self.heads * size)
        self.out = zero(nn.Linear(self.heads * size, width))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """(n, K, D) that read (n, N, D), by default each other: (n, K, D)."""
        query = self.norm(x)
        source = query if y is None else self.norm(y)
        q, k, v = (self.split(t) for t in (self.query(query), *self.key_value(source).chunk(2, -1)))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        """(n, N, C) to (n, H, N, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Mlp(nn.Module):
    """x + two maps of x, normed; at the start x itself.

    Args:
        width: D; hidden: channels between the maps, by default four times those of `Attention`.
    """

    def __init__(self, width: int, hidden: int | None = None):
        super().__init__()
        hidden = hidden or 4 * math.prod(heads(width))
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), zero(nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


def zero(layer: nn.Linear) -> nn.Linear:
    """The layer, giving zeros."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
