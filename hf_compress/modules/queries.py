"""Queries over a whole image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_compress.modules.attention import Pooling
from hf_compress.modules.positions import middles, sincos, spread
from hf_compress.tensors.cells import Cells


class Queries(nn.Module):
    """Trained queries, each with a place in the image, that attend to all of it; of K the first K are taken.

    q = LN(query + place), k = LN(LN(x) + place) and v = LN(x) go through one `Pooling`; outputs know nothing of each
    other. Places are the first ones of a sequence whose every beginning covers the image.

    Args:
        width: D; queries: how many; content_keys: False: keys are of places alone.
    """

    def __init__(self, width: int, queries: int, content_keys: bool = True):
        super().__init__()
        self.content_keys = content_keys
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(queries, width), std=0.02))
        self.register_buffer("place", sincos(spread(queries), width), persistent=False)
        self.norm, self.norm_query, self.norm_key = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Pooling(width)
        nn.init.orthogonal_(self.attention.query.weight)
        self.attention.key.load_state_dict(self.attention.query.state_dict())  # queries begin by looking around them

    def forward(self, x: Tensor, layout: Cells) -> Tensor:
        """(n, N, D) to (n, K, D)."""
        few, value = len(layout.centres), self.norm(x)
        place = sincos(middles(layout.grid, x.device), x.shape[-1]).to(x.dtype)
        key = value + place if self.content_keys else place.expand_as(x)
        out: Tensor = self.attention(self.norm_query(self.query[:few] + self.place[:few]), self.norm_key(key), value, x)
        return out
