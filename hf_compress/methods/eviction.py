"""What every ranking of cache entries composes with: budgets over layers and heads, scopes, stores."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor

from hf_compress.budget import pyramid
from hf_compress.methods.base import CacheMethod, check_choice, check_number
from hf_compress.signals import CacheView
from hf_compress.stores.kivi import KiviStore
from hf_compress.stores.store import Store
from hf_compress.tensors.select import adaptive

STORES: dict[str, KiviStore | None] = {"dense": None} | {f"kivi{b}": KiviStore(b, b) for b in (8, 4, 2, 1)}


@dataclass
class Eviction(CacheMethod):
    """A cache method that ranks entries: budgets over layers and heads, scopes and stores compose with its score.

    Args:
        budget: "uniform" over layers, or "pyramid": falling linearly with depth (PyramidKV, arXiv:2406.02069).
        heads: "uniform", or "adaptive": the heads of a layer share its budget by one ranking (Ada-KV,
            arXiv:2407.11550).
        floor: share that every head is sure of under heads="adaptive", of what its uniform budget has beyond the
            entries that stay anyway (a window).
        scope: "all" entries, or "visual" ("text") ones only: `ratio` then applies to them, the others stay.
        protect: "text" keeps all text entries, inside the budget; "none".
        store: "dense", or "kivi8", "kivi4", "kivi2", "kivi1": what stays is stored in so many bits (KIVI,
            arXiv:2402.02750). `ratio` then counts bytes, with scales, indices and the newest 32 entries, which are not
            packed: the shorter the prompt, the fewer entries stay.
    """

    budget: str = "uniform"
    heads: str = "uniform"
    floor: float = 0.2
    scope: str = "all"
    protect: str = "none"
    store: str = "dense"

    budgets: ClassVar[tuple[str, ...]] = ("uniform", "pyramid")  # what `budget` may be

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("budget", self.budget, self.budgets)
        check_choice("heads", self.heads, ("uniform", "adaptive"))
        check_choice("scope", self.scope, ("all", "visual", "text"))
        check_choice("protect", self.protect, ("none", "text"))
        check_choice("store", self.store, tuple(STORES))
        check_number("floor", self.floor, 0, 1)
        if self.protect == "text" and self.scope != "all":
            raise ValueError(f"protect='text' has no meaning with scope={self.scope!r}; use one of them")
        if self.scope == "visual" and self.policy == "hold":
            raise ValueError(
                "scope='visual' with policy='hold': what is generated is text, which always stays, so that a cache "
                "cannot be held at its budget; use policy='grow'"
            )
        if self.store != "dense" and self.policy == "hold":
            raise ValueError(
                f"store={self.store!r} with policy='hold' would pack the same entries again at every step; use "
                "policy='grow', or store='dense'"
            )

    @property
    def ragged(self) -> bool:  # type: ignore[override]
        return self.heads == "adaptive"

    def check(self, layers: int, ratio: Fraction | None) -> None:
        super().check(layers, ratio)
        packing = self.packing()
        if not ratio or packing is None:
            return
        share = Fraction(packing.bits) / 16
        if 1 - ratio > share:
            raise ValueError(
                f"ratio={float(ratio):.4g}: store={self.store!r} alone removes {float(1 - share):.4g} of the bytes; "
                f"ask for at least that, or use store='dense'"
            )

    def layer_budget(self, budget: Tensor, lengths: Tensor, layer: int, layers: int) -> Tensor:
        if self.budget == "uniform":
            return budget
        window = getattr(self, "window", 0)
        rows = zip(budget.tolist(), lengths.tolist())
        return budget.new_tensor([pyramid(b, n, layers, window)[layer] for b, n in rows])

    def head_budget(self, score: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
        return budget if self.heads == "uniform" else adaptive(score, valid, budget, self.floor)

    def outside(self, view: CacheView) -> Tensor | None:
        if self.scope == "all":
            return None
        return view.visual if self.scope == "text" else ~view.visual

    def protected(self, view: CacheView) -> Tensor | None:
        return ~view.visual if self.protect == "text" else None

    def packing(self) -> Store | None:
        return STORES[self.store]
