"""CompressKV: semantic retrieval heads choose, layers that suffer more keep more (arXiv:2508.02401)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.budget import shares
from hf_compress.calibrate.files import SEMANTIC, load
from hf_compress.methods.base import check_count, check_file
from hf_compress.methods.cache.snapkv import SnapKV
from hf_compress.registry import register
from hf_compress.signals import CacheView
from hf_compress.tensors.ranking import pooled_votes


@register("compresskv", stage="cache", kind="attention", paper="arXiv:2508.02401")
@dataclass
class CompressKV(SnapKV):
    """SnapKV by the few heads of each layer that retrieve, with layer budgets by measured error.

    The newest `window` rows of the `voters` best query heads of a layer choose one list for all of its KV heads. A
    layer keeps `least` entries and a part of the rest in proportion to its error, at most three times the mean; all
    layers together keep exactly what `ratio` says. What a clipped layer leaves goes to the others in proportion (the
    released code repairs by ones).

    Heads and errors are measured once per model, `hf_compress.calibrate.semantic_heads(model, samples)`, and found
    beside the checkpoint. Without that file all heads choose and all layers keep the same, with a warning.

    Source: "CompressKV: Semantic Retrieval Heads Know What Tokens are Not Important Before Generation",
    arXiv:2508.02401. Cost: `window` attention rows.

    Args:
        budget: "errors" over layers, or as for every method "uniform" or "pyramid".
        voters: query heads per layer that choose.
        least: entries that every layer keeps (the mean, where that is less).
        heads_file: file of the measurement; None: "semantic_heads.json" in the folder that the model was loaded from.
    """

    budget: str = "errors"
    window: int = 8
    voters: int = 4
    least: int = 32
    heads_file: str | None = None

    budgets = ("errors", "uniform", "pyramid")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("voters", self.voters)
        check_count("least", self.least)
        check_file("heads_file", self.heads_file)
        if self.heads == "adaptive":
            raise ValueError("heads='adaptive': all KV heads of a layer keep one list here; use heads='uniform'")
        if self.pooling != "avg":
            raise ValueError(f"pooling={self.pooling!r}: votes are pooled by averages here; use pooling='avg'")
        self._measured: dict[str, Any] | None = None

    def prepare(self, model: nn.Module, ratio: Fraction | None) -> None:
        self._measured = load(model, SEMANTIC, self.heads_file)
        if self._measured is None and ratio != 0:
            warnings.warn(
                f"compresskv: no {SEMANTIC} beside the checkpoint of {type(model).__name__}, so all heads choose and "
                "all layers keep the same; measure with hf_compress.calibrate.semantic_heads(model, samples)",
                stacklevel=5,
            )

    def score(self, view: CacheView) -> Tensor:
        window = torch.where(view.budget > self.window, self.window, (view.budget // 2).clamp(min=1))
        rows = view.window_rows(window.flatten())
        ranking = pooled_votes(
            rows, self._best(view.layer, rows.shape[1]), view.order >= view.lengths - window, self.kernel
        )
        return ranking.expand(view.shape)

    def _best(self, layer: int, heads: int) -> Sequence[int]:
        """The query heads of a layer that choose."""
        scores = None if self._measured is None else self._measured["heads"][layer]
        if scores is None:
            return range(heads)
        return sorted(range(heads), key=lambda h: -scores[h])[: self.voters]

    def layer_budget(self, budget: Tensor, lengths: Tensor, layer: int, layers: int) -> Tensor:
        if self.budget != "errors":
            return super().layer_budget(budget, lengths, layer, layers)
        if self._measured is None:
            return budget
        errors = self._measured["errors"]
        acting = [i for i in range(layers) if errors[i] is not None]
        weights, at = tuple(errors[i] for i in acting), acting.index(layer)
        rows = zip(budget.tolist(), lengths.tolist())
        return budget.new_tensor([by_errors(b, n, weights, self.least)[at] for b, n in rows])


@lru_cache(maxsize=256)
def by_errors(mean: int, length: int, errors: tuple[float, ...], least: int) -> tuple[int, ...]:
    """Entries of each layer, `mean` on average: `least` and a share of the rest by error, at most three means.

    Sums to len(errors) * mean exactly; no layer has more than the `length` of the prompt.
    """
    if mean >= length:
        return (mean,) * len(errors)
    least, most = min(least, mean), min(3 * mean, length)
    parts = shares(len(errors) * (mean - least), errors, [most - least] * len(errors))
    return tuple(least + part for part in parts)
