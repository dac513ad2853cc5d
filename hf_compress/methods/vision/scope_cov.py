"""SCOPE: salient tokens that cover the image."""

from __future__ import annotations

from dataclasses import dataclass

from hf_compress.methods.base import VisionMethod, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.diversity import coverage

__all__ = ["ScopeCov"]


@register("scope_cov", stage="vision", kind="diversity", paper="arXiv:2510.24214", needs={"visual", "cls"})
@dataclass
class ScopeCov(VisionMethod):
    """Tokens are picked by how much of the image they newly cover, times the attention of [CLS].

    On the features (n, N, D) that the projector reads: c_i, at first 0, is the largest cosine of token i to a pick.
    K picks, each the token j of the largest a_j^alpha * sum_i max(0, cos_ij - c_i), where a (n, N) is the head-mean
    softmax row of [CLS] in the block of these features; raster order. Every crop and frame picks its own K. Cost
    O(N^2 * D) for the cosines, and at most K * N^2 additions; see `coverage`.

    Source: "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs", arXiv:2510.24214 (`scope`
    is another method). Paper and code agree; the sum of both terms that the code knows beside their product depends on
    the scale of the attention and is not offered. Encoders without [CLS] take the attention received, as an inference
    engine does that serves it.

    Args:
        alpha: power of the attention; 0 is coverage alone, where two that newly cover only each other tie up to
            rounding.

    Raises:
        ValueError: `alpha` is not a number of at least 0, or `positions` is none of its values.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, 0)

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", 0, "attention")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K); ties go to the lower index."""
        weight = tokens.attention(surrogate="all").mean(1) ** self.alpha
        return Assignment(coverage(tokens.features, weight, keep).sort(dim=1).values)
