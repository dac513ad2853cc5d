"""AgilePruner, by its abstract: attention decides in simple images, diversity in complex ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hf_compress.methods.base import VisionMethod, check_count, check_number
from hf_compress.methods.vision.vispruner import select
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens

__all__ = ["AgilePruner"]


@register("agilepruner", stage="vision", kind="diversity", paper="arXiv:2603.01236", needs={"visual", "cls"})
@dataclass
class AgilePruner(VisionMethod):
    """As `vispruner`, with more important tokens where the attention of [CLS] is concentrated.

    H is the entropy of the head-mean attention row (n, N), scaled to sum to one, over ln N. An image whose H is 1 has
    a share of .1 important tokens, which grows linearly to .9 as H falls towards `focused`: 1 - (H - f) / (1 - f) held
    between these. What follows is `vispruner`. Cost: that of `vispruner`, and one look of the host at the counts.

    Source: "AgilePruner: An Empirical Study of Attention and Diversity for Adaptive Visual Token Pruning in Large
    Vision-Language Models", arXiv:2603.01236. Published are its findings (attention does better in simple images,
    diversity in complex ones, and the entropy of the attention tells them apart), no code and no formula that we know:
    this is a composition that follows them, not the authors' method.

    Args:
        focused: entropy from which on the attention is spread.
        step: as of `vispruner`.

    Raises:
        ValueError: `focused` is not a number of at least 0 and at most .99, `step` is not an integer of at least 1.
    """

    focused: float = 0.7
    step: int = 8

    example = {"ratio": 0.5, "step": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("focused", self.focused, 0, 0.99)
        check_count("step", self.step)

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", 0, "attention")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K); ties go to the lower index."""
        attention = tokens.attention(surrogate="all").mean(1)
        share = attention / attention.sum(1, keepdim=True)
        entropy = torch.special.entr(share).sum(1) / math.log(tokens.count)
        important = (1 - (entropy - self.focused) / (1 - self.focused)).clamp(0.1, 0.9)
        counts = (keep * important).long().tolist()
        return Assignment(select(attention, tokens.features, counts, keep, self.step))
