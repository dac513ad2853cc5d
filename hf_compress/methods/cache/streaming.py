"""StreamingLLM: attention sinks and a rolling window (arXiv:2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.methods.base import CacheMethod, check_count
from hf_compress.registry import register
from hf_compress.signals import CacheView


@register("streaming", stage="cache", paper="arXiv:2309.17453")
@dataclass
class Streaming(CacheMethod):
    """Keep the first tokens (attention sinks) and the newest ones.

    Of C entries the first `sinks` and the newest C - sinks stay; with a budget of `sinks` or less the newest entry
    takes the place of a sink. The budget is fixed at the end of the prompt and held while decoding: every token sees
    the sinks and the newest C - sinks entries. Keys keep the rotation of their original position; the paper rotates
    by the place in the cache, which keeps distances small beyond the trained length.

    Source: Efficient Streaming Language Models with Attention Sinks, ICLR 2024, arXiv:2309.17453. Cost: one gather.

    Args:
        sinks: first tokens that always stay.
    """

    policy: str = "hold"
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("sinks", self.sinks, least=0)

    def score(self, view: CacheView) -> Tensor:
        first = view.order < (view.budget - 1).clamp(max=self.sinks)
        return torch.where(first, torch.inf, view.order.float()).expand(view.keys.shape[:3])

    def recent(self, budget: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.policy != "hold":
            return None
        sinks = (budget - 1).clamp(max=self.sinks)
        return budget - sinks, sinks
