"""SCOUT's checkpoints as a pattern of entries (arXiv:2509.00935)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.methods.base import check_count
from hf_compress.methods.eviction import Eviction
from hf_compress.registry import register
from hf_compress.signals import CacheView

MOST = (4, 5)  # of a budget, for checkpoints


@register("scout", stage="cache", kind="content", paper="arXiv:2509.00935")
@dataclass
class Scout(Eviction):
    """Keep every `every`-th token, and the newest ones: the pattern of SCOUT on a model that was not trained for it.

    Entries every - 1, 2 * every - 1, ... are checkpoints; what they leave of the budget goes to the newest entries.
    Where they would take more than four fifths of it, only every second, third, ... of them stays.

    Not the method of its paper, a control: there a model is trained in which a layer of windows mixes each segment into
    its last token, so that later layers need read no other. In a model without such layers a token knows of its segment
    what it happens to.

    Source: "SCOUT: Toward Sub-Quadratic Attention via Segment Compression for Optimized Utility in Transformers",
    arXiv:2509.00935 (ArefJafari/SCOUT). Cost: none.

    Args:
        every: tokens of a segment.
    """

    every: int = 10

    example = {"ratio": 0.5, "every": 3}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("every", self.every)

    def score(self, view: CacheView) -> Tensor:
        most = torch.div(view.budget * MOST[0], MOST[1], rounding_mode="floor")
        thinned = 1 + torch.div(view.lengths, self.every * (most + 1), rounding_mode="floor")
        checkpoint = (view.order + 1) % (self.every * thinned) == 0
        return (view.order + checkpoint * view.order.shape[-1]).float().expand(view.shape)
