"""StreamingLLM: attention sinks and a rolling window (arXiv:2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_compress.methods.base import clamp
from hf_compress.methods.pattern import Pattern
from hf_compress.registry import register
from hf_compress.signals import Order, Rivals


@register("streaming", stage="cache", kind="content", paper="arXiv:2309.17453")
@dataclass
class Streaming(Pattern):
    """Keep the first tokens (attention sinks) and the newest ones.

    Of C entries the first `sinks` and the newest C - sinks stay; with a budget of `sinks` or less the newest entry
    takes the place of a sink. The budget is fixed at the end of the prompt and held while decoding: every token sees
    the sinks and the newest C - sinks entries, itself included. rotation="cache" is the paper; the default keeps
    distances true, which needs no rotation but goes beyond the trained length with the text.

    Source: Efficient Streaming Language Models with Attention Sinks, ICLR 2024, arXiv:2309.17453. Cost: one gather,
    and with rotation="cache" the rotation of all keys at every step.
    """

    def rivals(self, budget: int, cursor: int | None, depth: int, depths: int) -> Rivals:
        return Rivals(clamp(budget - 1, 0, self.sinks))

    def keeps(self, view: Order) -> Tensor:
        sinks = clamp(view.budget - 1, 0, self.sinks)
        return (view.order < sinks) | (view.order >= view.lengths + view.incoming - (view.budget - sinks))
