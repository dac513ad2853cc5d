"""H2O: heavy hitters and recency (arXiv:2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.methods.base import check_choice, clamp
from hf_compress.methods.eviction import Eviction
from hf_compress.methods.holding import Holding
from hf_compress.registry import register
from hf_compress.signals import COLUMNS, CacheView, Read


@register("h2o", stage="cache", kind="attention", paper="arXiv:2306.14048", needs={"columns"})
@dataclass
class H2O(Holding, Eviction):
    """Half of the budget to the entries of largest accumulated attention, half to the newest.

    The score of an entry is the attention it received from all rows so far (mean over the query heads of a group),
    and goes on being summed while decoding; each step evicts the lowest entry that is not recent. The released cache
    sums over the batch too and is right for one sample only; ours keeps samples apart.

    Source: "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", NeurIPS 2023,
    arXiv:2306.14048. Cost: on a CPU the sums are taken from the attention of the prompt on its way, in blocks of rows,
    and the logits of the prompt differ by rounding from those of its kernel: with 2048 tokens on a core 1 % of a
    prefill of LLaMA-7B layers, 4 to 6 % of narrow ones (hidden size 1024), where attention is a sixth. Elsewhere, in
    training and under eager attention it is a second pass, about as long as the first. One row per step.

    Args:
        normalize: divide by the number of rows that see an entry; changes the order (not in the paper).
    """

    policy: str = "hold"
    normalize: bool = False

    any_order = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("normalize", self.normalize, (False, True))

    def reads(self, depth: int) -> set[Read]:
        return {COLUMNS}

    def begin(self, view: CacheView) -> Tensor:
        return view.column_sums(normalize=self.normalize)

    def score(self, view: CacheView) -> Tensor:
        assert view.scores is not None
        recent = view.order >= view.lengths + view.incoming - clamp(view.budget // 2, 1)
        return view.scores.masked_fill(recent, torch.inf)
