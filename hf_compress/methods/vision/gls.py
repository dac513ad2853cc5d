"""GLS: tokens whose features are like those of [CLS]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.methods.base import VisionMethod, check_choice
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.select import identity, top_sorted

__all__ = ["GlobalLocalSimilarity"]

METRICS = ("cosine", "l1", "l2")


@register("gls", stage="vision", kind="saliency", paper="arXiv:2407.12891", needs={"visual", "cls"})
@dataclass
class GlobalLocalSimilarity(VisionMethod):
    """The K tokens whose features are most like what the tower says of the whole image.

    On the hidden states (n, N, Dv) of the block whose features the projector reads, less their mean over the image: the
    similarity of every token to the state of [CLS], the K most similar ones in raster order. Of a tower without [CLS]
    its place takes the mean of the patches, weighted by the attention that they receive. Every crop and every frame has
    its own. Cost O(N * Dv) with [CLS], which needs no attention row; without it one attention O(N^2 * d), streamed.

    Source: "Global-Local Similarity for Efficient Fine-Grained Image Recognition with Vision Transformers",
    arXiv:2407.12891. The authors do not prune: they crop an image to the box around its most similar patches and read
    the crop as a second image; here these patches are what stays. They compare behind the last block and its norm, the
    projector reads an earlier block, behind which no norm has been trained. They subtract no mean: what all tokens
    share then decides (on the embedded models, of 100 questions at 11 % of the tokens, 77 instead of 96 are answered
    with [CLS], and 51 instead of 85 without it; random tokens answer 53 and 61).

    Args:
        metric: "cosine", or the smallest mean distance over channels, absolute ("l1") or squared ("l2").
        centre: subtract the mean of the tokens from all, [CLS] included.

    Raises:
        ValueError: `metric` or `positions` is none of its values, `centre` is not a bool.
    """

    metric: str = "cosine"
    centre: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("metric", self.metric, METRICS)
        check_choice("centre", self.centre, (True, False))

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", 0, "hidden"), Read("tower", 0, "attention")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K) of the highest similarity; ties go to the lower index."""
        if keep == tokens.count:
            return Assignment(identity(len(tokens), keep, tokens.device))
        return Assignment(top_sorted(self.similarity(tokens.states("hidden").float(), tokens.whole("hidden")), keep))

    def similarity(self, x: Tensor, whole: Tensor) -> Tensor:
        """(n, N) fp32 of tokens (n, N, D) to one vector (n, 1, D) of each image; distances are negative."""
        if self.metric != "cosine":
            return -(x - whole).abs().pow(1 if self.metric == "l1" else 2).mean(-1)
        mean = x.mean(1, keepdim=True) if self.centre else torch.zeros_like(whole)
        return F.cosine_similarity(x - mean, whole - mean, dim=-1)
