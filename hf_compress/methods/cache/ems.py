"""EMS: evict what is irrelevant, merge what is redundant, per head (arXiv:2412.08521)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.methods.base import check_choice, check_count, check_number
from hf_compress.methods.eviction import Eviction
from hf_compress.registry import register
from hf_compress.signals import COLUMNS, CacheView, Read
from hf_compress.tensors.kvmerge import leaving, nearest, pour, rerotated, take
from hf_compress.tensors.ranking import tiered


@register("ems", stage="cache", kind="merging", paper="arXiv:2412.08521", needs={"columns"})
@dataclass
class EMS(Eviction):
    """Evict then merge: irrelevant entries vanish, redundant ones join the class centre they resemble.

    With P entries per head beyond the window:

    1. Global-local score: attention received from all rows (global) and from the newest `window` rows (local), mean
       over the query heads of a group, the global one scaled to the mean of the local one over the entries before the
       window; the larger of the two, max-pooled along the tokens.
    2. The best `gamma` * P entries of a head are candidates, all others are evicted.
    3. A candidate is redundant if a better one among the best P resembles it: the cosine of the keys times the cosine
       of the values is at least `tau` (no match where either is negative). With m the redundant share of a head's
       candidates, its best P (1 - m) are class centres; what this leaves over goes, by one ranking of all heads, first
       to candidates that are not redundant. So redundant heads hold fewer centres and the others more.
    4. Candidates that stay out join their most similar centre (the window counts as centres) if it resembles them, by
       a mean weighted with the scores; the rest goes to an all-zero centre, which is not stored.

    The paper fixes the parts but not all numbers: how the two scores are combined, gamma, tau, the pooling, which
    entries redundancy is measured against, who gets what redundant heads leave, and the weights of the mean are choices
    made here. Acts at the end of the prompt; the paper compresses again while decoding, which is left out.

    Source: "EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on Global-Local
    Importance", arXiv:2412.08521. Cost: the column sums of H2O, and P x gamma P similarities per head, in blocks, of
    keys and of values, once to rank and again to merge. That is about two causal attentions: at ratio .5 of 2048 tokens
    on a CPU core 17 % of a prefill of LLaMA-7B layers, 19 % of narrow ones (hidden size 1024); it falls with the square
    of the budget.

    Args:
        window: newest tokens, which vote and stay; half of a smaller budget.
        kernel: width of the max pooling, odd.
        gamma: candidates per entry of the budget, at least 1.
        tau: least similarity of what is merged.
        combine: "max" or "sum" of the two scores.
        merge_keys: merge keys too, before their rotation; False: values alone.
    """

    heads: str = "adaptive"
    window: int = 32
    kernel: int = 7
    gamma: float = 2.0
    tau: float = 0.6
    combine: str = "max"
    merge_keys: bool = True

    example = {"ratio": 0.5, "window": 4}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window)
        check_count("kernel", self.kernel)
        check_choice("combine", self.combine, ("max", "sum"))
        check_choice("merge_keys", self.merge_keys, (True, False))
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} must be odd, so that pooling is centred")
        check_number("gamma", self.gamma, 1)  # as many candidates as entries that stay
        check_number("tau", self.tau, 0, 1)

    def reads(self, depth: int) -> set[Read]:
        return {COLUMNS}

    def importance(self, view: CacheView) -> Tensor:
        """(B, Hkv, S) the global-local score, which ranking and merging share; inside the window not pooled."""
        return view.once("importance", lambda: self._importance(view))

    def _importance(self, view: CacheView) -> Tensor:
        window, old = self._window(view)
        local, whole = view.window_attention(window.flatten()), view.column_sums()
        share = _sum(local, old) / _sum(whole, old).clamp(min=torch.finfo(local.dtype).tiny)
        score = torch.maximum(local, whole * share) if self.combine == "max" else local + whole * share
        pooled = F.max_pool1d(score.masked_fill(~old, 0.0), self.kernel, 1, self.kernel // 2)
        return torch.where(old, pooled, score)

    def score(self, view: CacheView) -> Tensor:
        window, old = self._window(view)
        place, candidate = self._candidates(view)
        budget = view.budget - window
        ranked = place.argsort(-1)  # slots, the best first
        m, n = int(candidate.sum(-1).max()), int(budget.max())
        at, better = ranked[..., :m], ranked[..., : min(n, m)]
        rank = torch.arange(m, device=at.device)

        def above(part: slice) -> Tensor:
            others = rank[: min(part.stop, better.shape[-1])]
            return ((others < rank[part, None]) & (others < budget))[:, None]

        pairs = [(take(x, at), take(x, better)) for x in (view.keys, view.values)]
        redundant = (nearest(pairs, above)[0] >= self.tau) & candidate.gather(-1, at)
        given_up = budget * redundant.sum(-1, keepdim=True) // candidate.sum(-1, keepdim=True).clamp(min=1)
        centre = place < budget - given_up
        redundant = torch.zeros_like(candidate).scatter(-1, at, redundant)
        tier = candidate.long() + (candidate & ~redundant).long()
        return torch.where(old, tiered(self.importance(view), torch.where(centre, 3, tier)), torch.inf)

    def merge(self, view: CacheView, slots: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        score = self.importance(view)
        at, gone = leaving(slots, real, self._candidates(view)[1])
        n = slots.shape[-1]
        pairs = [(take(x, at), take(x, slots)) for x in (view.keys, view.values)]
        similarity, target = nearest(pairs, None if real is None else lambda _: real[:, :, None])
        weight = score.gather(-1, at) * (gone & (similarity >= self.tau))
        own = score.gather(-1, slots)[..., None]
        members = pour(weight[..., None], target, torch.ones_like(weight), n)

        def mean(x: Tensor) -> Tensor:
            kept = take(x, slots)
            joined = (own * kept + pour(take(x, at), target, weight, n)) / (own + members)
            return torch.where(members > 0, joined.to(x.dtype), kept)

        keys = take(view.keys, slots)
        if self.merge_keys:
            joined = rerotated(view.rotate, slots, mean(view.unrotate(view.keys.float())), view.keys)
            keys = torch.where(members > 0, joined, keys)
        return keys, mean(view.values)

    def _window(self, view: CacheView) -> tuple[Tensor, Tensor]:
        """(B, 1, 1) its width, and (B, 1, S) the entries before it."""
        window = torch.where(view.budget > self.window, self.window, (view.budget // 2).clamp(min=1))
        return window, view.valid & (view.order < view.lengths - window)

    def _candidates(self, view: CacheView) -> tuple[Tensor, Tensor]:
        """(B, Hkv, S) the place of every entry before the window in the ranking of its head, and the candidates."""
        window, old = self._window(view)
        ranked = self.importance(view).masked_fill(~old, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        place = ranked.argsort(-1)
        return place, old & (place < torch.floor(self.gamma * (view.budget - window)))


def _sum(x: Tensor, where: Tensor) -> Tensor:
    return (x * where).sum(-1, keepdim=True)
