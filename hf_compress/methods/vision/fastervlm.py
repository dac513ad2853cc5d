"""FasterVLM: the attention of [CLS] ranks the tokens."""

from __future__ import annotations

from dataclasses import dataclass

from hf_compress.methods.base import VisionMethod
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.select import identity, top_sorted

__all__ = ["FasterVLM"]


@register("fastervlm", stage="vision", kind="saliency", paper="arXiv:2412.01818", needs={"visual", "cls"})
@dataclass
class FasterVLM(VisionMethod):
    """The K tokens that [CLS] attends to most.

    Takes the softmax row of [CLS] (n, H, N) in the block whose features the projector reads, averages it over
    the heads, keeps the K highest in raster order. Every crop and every frame gets its own K. Cost O(N * d)
    per head for the one row; no attention map is formed.

    Source: "[CLS] Attention is All You Need for Training-Free Visual Token Pruning", arXiv:2412.01818 v1. The
    paper and its code agree; encoders without [CLS] are not covered by them, the model's surrogate row is
    used there.
    """

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", 0, "attention")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K) of the highest head-mean [CLS] attention; ties go to the lower index."""
        if keep == tokens.count:
            return Assignment(identity(len(tokens), keep, tokens.device))
        return Assignment(top_sorted(tokens.attention(surrogate="all").mean(1), keep))
