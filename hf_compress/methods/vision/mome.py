"""MoME: moments pooled at any rate, and experts that all rates share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_compress.methods.base import VisionMethod, check_count, check_number
from hf_compress.modules.experts import Experts
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.cells import cells
from hf_compress.tensors.merge import by_owner, pool1d
from hf_compress.tensors.select import spaced_grid

__all__ = ["MoME"]


@register("mome", stage="vision", kind="trained", paper="arXiv:2510.04136", needs={"visual"})
@dataclass
class MoME(VisionMethod):
    """Neighbouring frames averaged, at any rate, and a few small experts for every mean: one training, any budget.

    The projected tokens (n, T * N, D) of one place in all T frames are cut into windows of neighbouring frames, as many
    for each place as K holds, and one more for evenly spaced ones; a window becomes its mean, in the slot of its first
    token. With K < N all frames become one, whose cells are averaged. Behind that `top` of `experts`, which a router
    picks for every mean, and a shared one add what they make of it (`modules.experts`); nothing at first. Routers and
    experts are those of all rates: trained with another K at every step (`train.Sampled`), coarse tokens use what fine
    ones have taught. `ratio` is the fraction of the whole video. An image is one frame. Cost O(T * N * D + K * D *
    experts * inner).

    Source: "MoME: Mixture of Matryoshka Experts for Audio-Visual Speech Recognition", NeurIPS 2025, arXiv:2510.04136,
    which has no code. There experts stand beside the layers of a frozen language model, and every step takes the mean
    loss of all rates; here they stand in front of it, and a step takes one. Rates there are whole numbers, and what is
    left over behind the last window is dropped; here windows are as equal as can be. Whether shares are renormalised
    over the experts that are picked, and what `balance` is, it does not say.

    Args:
        experts: routed ones; top: of them, for each token; inner: channels of an expert.
        balance: weight of how unevenly the tokens of a batch use the experts, as a loss; .01 is usual, 0: none.

    Raises:
        ValueError: `experts`, `top` or `inner` is no integer of at least 1, `top` above `experts`, `balance` no number
            of at least 0.
    """

    experts: int = 16
    top: int = 2
    inner: int = 8
    balance: float = 0.0

    scope: ClassVar[str] = "video"
    needs_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("experts", self.experts)
        check_count("top", self.top, most=self.experts)
        check_count("inner", self.inner)
        check_number("balance", self.balance, 0)

    def module(self, model: nn.Module) -> nn.Module:
        """Router and experts."""
        return Experts(model.config.get_text_config().hidden_size, self.experts, self.top, self.inner)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Groups (n, T * N) with plain means, kept (n, K) the first token of each window."""
        owner = windows(len(tokens.grids), *tokens.grids[0], keep)
        groups, kept = by_owner(owner.repeat(len(tokens), 1).to(tokens.device))
        return Assignment(kept, groups)

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        """(n, K, D): the means, and what the experts add."""
        assert tokens.module is not None
        out, uneven = tokens.module(assignment.apply(tokens.embeddings))
        if self.balance and tokens.module.training:
            tokens.losses.append(self.balance * uneven)
        made: Tensor = out
        return made


def windows(frames: int, h: int, w: int, keep: int) -> Tensor:
    """(T * N,): of each token of T frames of (h, w) tokens the first one of its window; there are `keep` windows."""
    N = h * w
    if keep < N:
        layout = cells(h, w, keep)
        return layout.centres[layout.groups].repeat(frames)
    each, more = divmod(keep, N)
    many = torch.zeros(N, dtype=torch.bool)
    many[spaced_grid(h, w, more)] = True
    out = torch.arange(N).repeat(frames, 1)
    for count, places in ((each, ~many), (each + 1, many)):
        if places.any():
            group = pool1d(frames, count)[0]
            out[:, places] += N * torch.searchsorted(group, group)[:, None]
    return out.flatten()
