"""VisionZip: dominant tokens stay, the rest is merged into a few contextual ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_compress.budget import check_share
from hf_compress.methods.base import VisionMethod, check_choice
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.merge import group_sum, nearest, rank
from hf_compress.tensors.select import identity

__all__ = ["VisionZip"]


@register("visionzip", stage="vision", kind="merging", paper="arXiv:2412.04467", needs={"visual", "cls"})
@dataclass
class VisionZip(VisionMethod):
    """Dominant tokens by [CLS] attention, and contextual tokens that absorb all the others.

    1. The n_d tokens with the highest head sum of the [CLS] row stay as they are. 2. Of the remaining M every
    (M // n_c)-th, from the first on, is a target, n_c of them. 3. Every other token goes to the target of
    highest cosine between head-mean keys. 4. A contextual token is its target plus the mean of the tokens
    that went to it. Features are merged before the projector; output in raster order, a contextual token in
    its target's slot. n_c = round(K * contextual) and n_d = K - n_c. Cost: one attention row and N * n_c * d
    similarities.

    Source: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv:2412.04467. The
    paper speaks of averaging, the code adds target and mean (the norm grows): the code is followed unless
    `average`. The code also emits [CLS] as one of the K tokens; a prompt has slots for patches only, so the
    [CLS] feature itself is not emitted and one more dominant token stays instead. The code's order
    (contextual tokens last) is not kept. With n_c = 0 (K <= 3 by default) it is a selection and the rest is
    dropped.

    Args:
        contextual: share of the K tokens that are contextual; 10/64 is the authors' 10 of 64, 20 of 128, 30
            of 192.
        average: a contextual token is the true mean of its group instead.

    Raises:
        ValueError: `contextual` is not a number in [0, 1), `average` is not a bool.
    """

    contextual: float = 10 / 64
    average: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.contextual, "contextual")
        check_choice("average", self.average, (True, False))

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", 0, "attention"), Read("tower", 0, "key")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Groups and weights (n, N), kept (n, K): dominant tokens and targets, ascending."""
        n, N = len(tokens), tokens.count
        if keep == N:
            return Assignment(identity(n, keep, tokens.device))
        n_c = min(round(keep * check_share(self.contextual, "contextual")), keep - 1)
        score = tokens.attention(surrogate="all").sum(1)
        order = score.argsort(dim=-1, descending=True, stable=True)  # ties go to the lower index
        dominant, rest = order.split([keep - n_c, N - keep + n_c], dim=1)
        if n_c == 0:
            return Assignment(dominant.sort(dim=1).values)
        targets = rest.sort(dim=1).values[:, :: rest.shape[1] // n_c][:, :n_c]
        kept = torch.cat([dominant, targets], dim=1).sort(dim=1).values
        stays, place = rank(kept, N)
        goes = place.gather(1, targets).gather(1, nearest(tokens.states("key"), targets))
        groups = torch.where(stays, place, goes)
        size = group_sum(torch.ones(n, N, device=tokens.device), groups, keep).gather(1, groups)
        weight = 1 / size if self.average else torch.where(stays, 1.0, 1 / (size - 1))
        return Assignment(kept, groups, weight, before_projector=True)
