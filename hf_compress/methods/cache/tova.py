"""TOVA: drop what the newest token attends to least (arXiv:2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.methods.eviction import Eviction
from hf_compress.methods.holding import Holding
from hf_compress.registry import register
from hf_compress.signals import QUERIES, CacheView, Read


@register("tova", stage="cache", kind="attention", paper="arXiv:2401.06104")
@dataclass
class Tova(Holding, Eviction):
    """Keep what the newest row attends to, mean over all heads, the same entries in every head.

    While decoding every step drops the entry that the newest token attends to least. As in the paper the newest entry
    itself is not protected at the end of the prompt. One row decides for all heads: what it overlooks is gone from a
    layer, and on the embedded recall model that is worse than random eviction (10.8 % against 37.1 % at half).

    Source: Transformers are Multi-State RNNs, EMNLP 2024, arXiv:2401.06104. Cost: one attention row per layer and step.
    """

    policy: str = "hold"

    any_order = True
    decay = 0.0  # of rows that arrive together the last one decides

    def reads(self, depth: int) -> set[Read]:
        return {QUERIES}

    def begin(self, view: CacheView) -> Tensor:
        return _all_heads(view.window_attention(torch.ones_like(view.lengths.amax((1, 2)))))

    def advance(self, score: Tensor, new: Tensor) -> Tensor:
        return _all_heads(new)

    def score(self, view: CacheView) -> Tensor:
        assert view.scores is not None
        return view.scores


def _all_heads(attention: Tensor) -> Tensor:
    """(B, Hkv, S): the mean over the heads, in every head."""
    return attention.mean(1, keepdim=True).expand_as(attention)
