"""VMTC: primary tokens stay, the others are clustered; text is kept from looking at what does not concern it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch

from hf_compress.budget import check_share
from hf_compress.methods.base import Part, VisionMethod, check_count
from hf_compress.methods.inhibition import Inhibition
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
    and merged; the share of both, the start and the number of steps are our choice. Encoders without [CLS] take the
    attention received.

    Its second part, cross-modal attention inhibition, is off unless `hide` is above 0: see `Inhibition`. It acts in the
    cache stage, where no other method can be then, and stores everything as it is.

    Args:
        primary: share of the K tokens that stay as they are.
        steps: of k-means.
        hide: share of the image tokens that it sees which is hidden from each row of text.
        hide_after: the layer whose attention says which; they are hidden in all later ones.

    Raises:
        ValueError: `primary` or `hide` is not a number in [0, 1), `steps` is not an integer of at least 1, `hide_after`
            none of at least 0.
    """

    primary: float = 0.75
    steps: int = 10
    hide: float = 0.0
    hide_after: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.primary, "primary")
        check_count("steps", self.steps)
        check_share(self.hide, "hide")
        check_count("hide_after", self.hide_after, least=0)

    def parts(self, layers: int, tokens: int | None, ratio: Fraction | None, keep: int | None) -> Mapping[str, Part]:
        """The clusters, and what hides them."""
        if not self.hide or ratio == 0:
            return {}
        if self.hide_after >= layers - 1:
            raise ValueError(
                f"hide_after={self.hide_after}: no later layer follows in a decoder of {layers}; name one up to "
                f"{layers - 2}"
            )
        inhibition = Inhibition(hide=self.hide, after=self.hide_after)
        return {"vision": (self, ratio, keep), "cache": (inhibition, None, None)}

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
