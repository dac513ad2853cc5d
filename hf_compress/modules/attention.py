"""Attention of few tokens to many, narrow beside the language model in whose width they are."""

from __future__ import annotations

import math

import torch
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

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        place: Tensor | None = None,
        causal: bool = False,
        seen: Tensor | None = None,
    ) -> Tensor:
        """(n, K, D) that read (n, N, D), by default each other: (n, K, D).

        Args:
            place: (K, D) or (n, K, D), added to x once it is normed.
            causal: each reads itself and those in front of it.
            seen: (n, N) bool, what can be read; None: everything.
        """
        query = self.norm(x) if place is None else self.norm(x) + place
        source = query if y is None else self.norm(y)
        q, k, v = (self.split(t) for t in (self.query(query), *self.key_value(source).chunk(2, -1)))
        mask = None if seen is None else seen[:, None, None]
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return x + self.out(read.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        """(n, N, C) to (n, H, N, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Pooling(nn.Module):
    """Means of tokens x by attention, plus what its heads read beside; at the start the means alone.

    Out = mean over the heads of A_h x, plus a map (zero at first) of the heads' own A_h V_h side by side: it has the
    scale of the tokens from the first step on, and all D of their channels, however narrow the heads are.

    Args:
        width: D of queries and tokens; source: channels of what keys and values are made of, by default D.
    """

    def __init__(self, width: int, source: int | None = None):
        super().__init__()
        self.heads, size = heads(width)
        inner, source = self.heads * size, source or width
        self.query, self.key, self.value = nn.Linear(width, inner), nn.Linear(source, inner), nn.Linear(source, inner)
        self.out = zero(nn.Linear(inner, width))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """(..., K, D): queries (..., K, D) over keys and values (..., N, C) and tokens (..., N, D).

        Args:
            seen: (..., K, N) bool, what each query reads; None: everything.
        """
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for t in (self.query(query), self.key(key), self.value(value))
        )
        logits = q @ k.mT * q.shape[-1] ** -0.5
        if seen is not None:
            logits = logits.masked_fill(~seen[..., None, :, :], -torch.inf)
        share = logits.softmax(-1)
        out: Tensor = share.mean(-3) @ x + self.out((share @ v).transpose(-3, -2).flatten(-2))
        return out


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
