"""Keys of small norm (arXiv:2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from hf_compress.methods.base import check_count
from hf_compress.methods.eviction import Eviction
from hf_compress.methods.holding import Holding
from hf_compress.registry import register
from hf_compress.signals import CacheView


@register("knorm", stage="cache", kind="content", paper="arXiv:2406.11430")
@dataclass
class KNorm(Holding, Eviction):
    """Keep the keys of small L2 norm.

    The norm of a key does not change under rotation. Needs no attention, and is a weak baseline wherever the question
    decides what matters; on some models, such as the embedded recall model, it loses to random eviction.

    Source: A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, EMNLP 2024, arXiv:2406.11430. Cost:
    one norm per key.

    Args:
        skip_layers: first layers that stay whole (2 in the paper); the others give the bytes back.
    """

    skip_layers: int = 0

    any_order = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("skip_layers", self.skip_layers, least=0)
        if self.skip_layers and self.budget != "uniform":
            raise ValueError(
                f"skip_layers={self.skip_layers} and budget={self.budget!r} both share out the layers; use one"
            )

    def check(self, layers: int, ratio: Fraction | None) -> None:
        super().check(layers, ratio)
        kept = Fraction(1) if ratio is None else 1 - ratio
        if self.skip_layers >= layers or kept * layers <= self.skip_layers:
            raise ValueError(
                f"skip_layers={self.skip_layers}: so many whole layers of {layers} leave nothing of the budget for the "
                f"others; skip fewer, or remove less than {float(1 - Fraction(self.skip_layers, layers)):.4g}"
            )

    def score(self, view: CacheView) -> Tensor:
        return -view.keys.float().norm(dim=-1)

    def layer_budget(self, budget: Tensor, lengths: Tensor, layer: int, layers: int) -> Tensor:
        if not self.skip_layers:
            return super().layer_budget(budget, lengths, layer, layers)
        if layer < self.skip_layers:
            return lengths
        rest = budget * layers - lengths * self.skip_layers
        if short := [i for i, left in enumerate(rest.tolist()) if left < max(1, layers - self.skip_layers)]:
            n, have = int(lengths[short[0]]), int(budget[short[0]])
            least = -(-(n * self.skip_layers + layers - self.skip_layers) // layers)
            raise ValueError(
                f"skip_layers={self.skip_layers}: so many whole layers of {layers} leave nothing of the budget for the "
                f"others, {have} of {n} entries; skip fewer layers, or keep {least} to {n}"
            )
        part = torch.div(rest, layers - self.skip_layers, rounding_mode="floor")
        return part + (layer - self.skip_layers < rest - part * (layers - self.skip_layers)).long()
