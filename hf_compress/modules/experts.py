"""Small experts, of which a router picks a few for every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """x + what one shared expert and the `top` likeliest of `count` make of LN(x), each as likely as it is.

    An expert is two maps with a GELU between them; the second begins at zero. Shares are those of a softmax over all
    experts, not renormalised over those that are picked.

    Args:
        width: D; count: routed experts; top: how many of them act on a token; inner: channels between the maps.
    """

    def __init__(self, width: int, count: int, top: int, inner: int):
        super().__init__()
        self.top, self.norm = top, nn.LayerNorm(width)
        self.router = nn.Linear(width, count, bias=False)
        self.down = nn.Parameter(torch.randn(1 + count, inner, width) * width**-0.5)  # the shared expert first
        self.up = nn.Parameter(torch.zeros(1 + count, width, inner))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, K, D) to the same, and what the router is to make small, see `balance`."""
        normed = self.norm(x)
        p = self.router(normed).softmax(-1)
        picked = torch.zeros_like(p).scatter(-1, p.topk(self.top, -1).indices, 1.0)
        return x + self.mixed(normed, p * picked), balance(p, picked)

    def mixed(self, x: Tensor, share: Tensor) -> Tensor:
        """(n, K, D): what the experts make of x, the routed ones by their shares (n, K, E)."""
        told = F.gelu(torch.einsum("nkd,eid->nkei", x, self.down))
        return torch.einsum("nkei,edi->nkd", told * F.pad(share, (1, 0), value=1.0)[..., None], self.up)


def balance(p: Tensor, picked: Tensor) -> Tensor:
    """1 where all experts are picked as often; more where few are, and likely (arXiv:2101.03961).

    Args:
        p: (n, K, E) probabilities; picked: (n, K, E), 1 where an expert acts.
    """
    often = picked.mean((0, 1)) / picked.sum(-1).mean()
    return p.shape[-1] * (often.detach() * p.mean((0, 1))).sum()
