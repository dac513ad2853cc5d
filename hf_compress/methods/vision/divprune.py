"""DivPrune: the most diverse subset of the tokens."""

from __future__ import annotations

from dataclasses import dataclass

from hf_compress.methods.base import VisionMethod
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.diversity import farthest
from hf_compress.tensors.select import identity

__all__ = ["DivPrune"]


@register("divprune", stage="vision", kind="diversity", paper="arXiv:2503.02175", needs={"visual"})
@dataclass
class DivPrune(VisionMethod):
    """The K tokens that lie farthest from each other.

    On the (n, N, D) embeddings that the language model reads, with distance 1 - cosine: the first pick is the
    token whose nearest neighbour is farthest, each later pick the token whose smallest distance to the picks
    so far is largest; kept in raster order. Needs no attention, so it fits encoders without [CLS]. Cost O(N^2
    * D), one product of all tokens for a batch of images, of which each of the K picks reads a row; beyond
    2^24 similarities it is taken in chunks for the first pick, and later picks compute their own row.

    Source: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", arXiv:2503.02175.
    Its code picks over all crops of an image together and lets newline tokens compete; here every crop or
    frame picks its own K of its own tokens, and newlines are not tokens.
    """

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K); ties go to the lower index."""
        if keep == tokens.count:
            return Assignment(identity(len(tokens), keep, tokens.device))
        return Assignment(farthest(tokens.embeddings, keep))
