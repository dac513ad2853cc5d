"""A2SF: accumulated attention with a forgetting factor (arXiv:2407.20485)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.methods.base import check_count, check_number, clamp
from hf_compress.methods.eviction import Eviction
from hf_compress.methods.holding import Holding
from hf_compress.registry import register
from hf_compress.signals import QUERIES, CacheView, Read

NEGLIGIBLE = 1e-4  # weight below which a row is not read


@register("a2sf", stage="cache", kind="attention", paper="arXiv:2407.20485", needs={"columns"})
@dataclass
class A2SF(Holding, Eviction):
    """Keep the newest entries and those with the largest accumulated attention, older rows counting less.

    Early tokens are seen by more rows, so plain sums favour them. Here a row that is n rows old counts `alpha`^n, and
    every decoded row makes the score `alpha` times itself plus the new attention. Rows that would count less than 1e-4
    are not read (older than 87 rows at .9), which makes long prompts cheap. The paper sums over the query heads of a
    group; their mean, taken here, ranks alike. Where the budget is not larger than `window`, the window is half of it.

    The paper evicts at every step (policy="hold"), its released code at the end of the prompt only (policy="grow").

    Source: "A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder",
    arXiv:2407.20485. Cost: the attention rows that count, and one row per step.

    Args:
        alpha: forgetting factor, above 0 and at most 1, which is accumulation as in H2O. The paper tunes it per model.
        window: newest entries that always stay.
    """

    policy: str = "hold"
    alpha: float = 0.9
    window: int = 16

    any_order = True
    example = {"ratio": 0.5, "window": 4}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, 0, 1, above=True)
        check_count("window", self.window)

    def reads(self, depth: int) -> set[Read]:
        return {QUERIES}

    @property
    def decay(self) -> float:  # type: ignore[override]
        return self.alpha

    def begin(self, view: CacheView) -> Tensor:
        age = (view.lengths - 1 - view.order)[:, 0]  # of every row; the newest one that is not padding is 0 rows old
        weight = self.alpha ** age.float()
        return view.column_sums(weight=weight * (weight >= NEGLIGIBLE))

    def score(self, view: CacheView) -> Tensor:
        assert view.scores is not None
        half = clamp(view.budget // 2, 1)
        window = half + (self.window - half) * (view.budget > self.window)
        return view.scores.masked_fill(view.order >= view.lengths + view.incoming - window, torch.inf)
