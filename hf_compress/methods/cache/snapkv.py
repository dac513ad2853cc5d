"""SnapKV: pooled attention of an observation window (arXiv:2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.methods.base import check_choice, check_count
from hf_compress.methods.eviction import Eviction
from hf_compress.registry import register
from hf_compress.signals import QUERIES, CacheView, Read


@register("snapkv", stage="cache", kind="attention", paper="arXiv:2404.14469")
@dataclass
class SnapKV(Eviction):
    """Keep what the last rows of the prompt attend to, pooled over neighbours, per head.

    The newest `window` rows vote: their attention to older entries is summed, averaged over the query heads of a
    group and pooled along the tokens (average pooling counts zeros beyond the border). The best entries of every head
    and the window itself stay. Where the budget is not larger than the window, the window shrinks to half the budget.

    Source: "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS 2024, arXiv:2404.14469. Cost:
    `window` attention rows.

    Args:
        window: observation window in tokens.
        kernel: width of the pooling, odd.
        pooling: "avg" or "max".
    """

    window: int = 32
    kernel: int = 5
    pooling: str = "avg"

    example = {"ratio": 0.5, "window": 4}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window)
        check_count("kernel", self.kernel)
        check_choice("pooling", self.pooling, ("avg", "max"))
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} must be odd, so that pooling is centred")

    def reads(self, depth: int) -> set[Read]:
        return {QUERIES}

    def score(self, view: CacheView) -> Tensor:
        window = torch.where(view.budget > self.window, self.window, (view.budget // 2).clamp(min=1))
        newest = view.order >= view.lengths - window
        votes = view.window_attention(window.flatten()).masked_fill(newest | ~view.valid, 0.0)
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        return pool(votes, self.kernel, 1, self.kernel // 2).masked_fill(newest, torch.inf)
