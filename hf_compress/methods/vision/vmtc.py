"""VMTC: primary tokens stay, the others are clustered."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_compress.budget import check_share
from hf_compress.methods.base import VisionMethod, check_count
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.cluster import kmeans
from hf_compress.tensors.merge import by_first, group_sum

__all__ = ["VMTC"]


@register("vmtc", stage="vision", kind="merging", paper="arXiv:2411.15453", needs={"visual", "cls"})
@dataclass
class VMTC(VisionMethod):
    """Tokens of high attention stay, the others are clustered, and each cluster becomes one token.

    1. The round(K * primary) tokens of the highest head-mean [CLS] attention stay as they are. 2. The others are
    clustered by the cosine of the features (n, N, D) that the projector reads: k-means whose centres start at evenly
    spaced ones of them, `steps` times (see `kmeans`; no cluster is left empty). 3. A cluster is the mean of its tokens
    weighted with their attention, at the place of its first one. Features are merged before the projector. Every crop
    and frame by itself. Cost O(steps * N * K * D).

    Source: "Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image Redundancy",
    arXiv:2411.15453, of which no code is known. Published is that primary tokens stay and redundant ones are clustered
    and merged; the share of both, the start and the number of steps are our choice. Its second part, which hides image
    tokens of low score from rows of text in the language model, is not offered. Encoders without [CLS] take the
    attention received.

    Args:
        primary: share of the K tokens that stay as they are.
        steps: of k-means.

    Raises:
        ValueError: `primary` is not a number in [0, 1), `steps` is not an integer of at least 1.
    """

    primary: float = 0.75
    steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.primary, "primary")
        check_count("steps", self.steps)

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", 0, "attention")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Groups and weights (n, N), kept (n, K): primary tokens and the first ones of the clusters, ascending."""
        score = tokens.attention(surrogate="all").mean(1)
        stay = min(round(keep * check_share(self.primary, "primary")), keep - 1)
        primary, rest = score.argsort(dim=1, descending=True, stable=True).split([stay, tokens.count - stay], dim=1)
        rest, clusters = rest.sort(dim=1).values, keep - stay
        first = torch.arange(clusters, device=rest.device).mul(rest.shape[1]) // clusters
        x = Assignment(rest).pick(tokens.features)
        numbers = torch.arange(clusters, keep, device=rest.device).expand_as(primary)
        groups = torch.empty_like(score, dtype=torch.int64).scatter_(1, primary, numbers)
        groups, kept = by_first(groups.scatter_(1, rest, kmeans(x, first.expand(len(x), -1), self.steps)), keep)
        weight = score.clamp(min=torch.finfo(score.dtype).tiny)
        weight = weight / group_sum(weight, groups, keep).gather(1, groups)
        return Assignment(kept, groups, weight, before_projector=True)
