"""Ada-KV: one ranking over all heads of a layer (arXiv:2407.11550)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress import registry
from hf_compress.methods.base import CacheMethod, check_choice
from hf_compress.methods.cache.pyramidkv import PyramidKV
from hf_compress.methods.cache.snapkv import SnapKV
from hf_compress.methods.eviction import Eviction
from hf_compress.methods.holding import Holding
from hf_compress.registry import register
from hf_compress.signals import CacheView, Read
from hf_compress.tensors.select import CERTAIN, adaptive

PASSED_ON = ("reads", "prepare", "check", "score", "layer_budget", "outside", "protected", "merge", "holding")


@register("adakv", stage="cache", kind="attention", paper="arXiv:2407.11550")
@dataclass
class AdaKV(Eviction):
    """The heads of a layer share its budget by one ranking of any other method, above a floor for every head.

    The best entries of all KV heads together stay, so that heads with spread attention keep more. Entries lie end to
    end: the bytes held are the budget, whatever the longest head. The scores, their running sums while decoding and
    the budgets of layers are those of `scorer`; SnapKV takes a kernel of 7 and max pooling here, as in the paper.

    `compress("snapkv", heads="adaptive")` is the same with SnapKV's own defaults. Methods that do more than rank
    (further forwards over the prompt, stores, entries that trade places while decoding) cannot be scorers. Not
    implemented: leaving the first layers out (an option of the release), and the maximum over a group in place of its
    mean.

    `floor` counts beyond the window, which every head keeps anyway; kvpress counts the window in it, so that its floor
    is lower and heads differ more. Two heads of 20 entries, a window of 4, a budget of 8 and floor=.5, the second head
    weaker everywhere: it is sure of 4 + .5 (8 - 4) = 6 here and of .5 * 8 = 4 there, so that 10 and 6 stay here, 12
    and 4 there. A window of w and a budget of b: floor=(f b - w) / (b - w), at least 0, is what f is there.

    Source: "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference", NeurIPS
    2025, arXiv:2407.11550. Cost: that of the scorer and one sort.

    Args:
        scorer: a ranking cache method.
        scorer_knobs: its own arguments by name; budget, scope, protect and policy are given to adakv itself.
        floor_rule: "guarantee" makes sure of the best `floor` * uniform budget entries of every head and ranks the
            rest; "blend" (the release) takes (1 - floor) of what one ranking gives a head plus `floor` of the uniform
            budget, rounded half to even, with the remainders corrected so that the sum is exact.
        normalize: weigh the scores of a head with the share of them that its uniform budget would hold (an option of
            the release; for scores that are not negative).
    """

    heads: str = "adaptive"
    scorer: str = "snapkv"
    scorer_knobs: dict[str, Any] | None = None
    floor_rule: str = "guarantee"
    normalize: bool = False

    example = {"ratio": 0.5, "scorer_knobs": {"window": 4}}

    def __post_init__(self) -> None:
        self._scorer = self._build()
        super().__post_init__()
        check_choice("floor_rule", self.floor_rule, ("guarantee", "blend"))
        check_choice("normalize", self.normalize, (False, True))

    def reads(self, depth: int) -> set[Read]:
        return self._scorer.reads(depth)

    def _build(self) -> Eviction:
        spec, knobs = registry.get(self.scorer, "scorer"), {} if self.scorer_knobs is None else self.scorer_knobs
        if not _ranks(spec.cls):
            ranking = [s.name for s in registry.methods("cache").values() if _ranks(s.cls)]
            raise ValueError(
                f"scorer={self.scorer!r} is not a ranking of entries and nothing else; use one of {ranking}"
            )
        shared = {f.name for f in fields(Eviction)}
        if not isinstance(knobs, dict) or not knobs.keys() <= spec.knobs.keys() - shared:
            raise ValueError(
                f"scorer_knobs={knobs!r} must be a dict of arguments of {self.scorer!r} alone, which are "
                f"{sorted(spec.knobs.keys() - shared)}; {sorted(shared)} are given to adakv itself"
            )
        own = {"kernel": 7, "pooling": "max"} if spec.cls in (SnapKV, PyramidKV) else {}
        layers = {} if self.budget == "uniform" else {"budget": self.budget}  # else as the scorer shares them
        return spec.cls(policy=self.policy, scope=self.scope, protect=self.protect, **layers, **(own | knobs))

    def prepare(self, model: nn.Module, ratio: Fraction | None) -> None:
        self._scorer.prepare(model, ratio)

    def check(self, layers: int, ratio: Fraction | None) -> None:
        super().check(layers, ratio)
        self._scorer.check(layers, ratio)

    def score(self, view: CacheView) -> Tensor:
        return self._scorer.score(view)

    def holding(self) -> Holding | None:
        return self._scorer.holding()

    def layer_budget(self, budget: Tensor, lengths: Tensor, layer: int, layers: int) -> Tensor:
        return self._scorer.layer_budget(budget, lengths, layer, layers)

    def outside(self, view: CacheView) -> Tensor | None:
        return self._scorer.outside(view)

    def protected(self, view: CacheView) -> Tensor | None:
        return self._scorer.protected(view)

    def merge(self, view: CacheView, slots: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor] | None:
        return self._scorer.merge(view, slots, real)

    def head_budget(self, score: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
        if self.heads == "uniform":
            return budget
        if self.normalize:
            score = torch.where(score >= CERTAIN, score, score * self._captured(score, valid, budget))
        if self.floor_rule == "guarantee":
            return adaptive(score, valid, budget, self.floor)
        return blend(adaptive(score, valid, budget, 0.0), budget, self.floor)

    def _captured(self, score: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
        """(B, H, 1) share of a head's score that its uniform budget would hold, protected entries left out."""
        fixed = score >= CERTAIN
        best = score.masked_fill(fixed | ~valid, 0.0).sort(-1, descending=True).values
        if bool((best < 0).any()):
            raise ValueError(f"normalize=True needs scores that are not negative; scorer={self.scorer!r} gives others")
        room = budget[:, None, None] - fixed.sum(-1, keepdim=True)
        held = best * (torch.arange(best.shape[-1], device=best.device) < room)
        return held.sum(-1, keepdim=True) / best.sum(-1, keepdim=True).clamp(min=torch.finfo(best.dtype).tiny)


def blend(hits: Tensor, budget: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) * hits + alpha * budget, (B, H) integers with the sum of `hits` per row: (B, H), budget (B,)."""
    exact = (1 - alpha) * hits.double() + alpha * budget[:, None]
    counts = exact.round()
    missing = hits.sum(1, keepdim=True) - counts.sum(1, keepdim=True)
    place = (exact - counts).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    counts = counts + (place < missing).long() - (place >= hits.shape[1] + missing).long()
    return counts.long()


def _ranks(cls: type) -> bool:
    """Whether a method does nothing but rank the entries of every head: it defines no hook that is not passed on."""
    hooks = [name for base in (CacheMethod, Eviction) for name, hook in vars(base).items() if _is_hook(name, hook)]
    return issubclass(cls, Eviction) and all(getattr(cls, name) is getattr(Eviction, name) for name in hooks)


def _is_hook(name: str, member: object) -> bool:
    return isinstance(member, (FunctionType, property)) and not name.startswith("_") and name not in PASSED_ON
