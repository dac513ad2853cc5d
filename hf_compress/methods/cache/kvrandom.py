"""Random eviction: the bar every ranking of cache entries must clear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.methods.base import check_count
from hf_compress.methods.eviction import Eviction
from hf_compress.registry import register
from hf_compress.signals import CONTENT, CacheView, Read
from hf_compress.tensors.draw import key, uniform


@register("kvrandom", stage="cache", kind="control", paper="control")
@dataclass
class RandomEntries(Eviction):
    """Keep entries drawn at random, other ones in every prompt, head and layer, the same ones every time.

    The newest `window` entries stay, then the first `sinks`, then what is drawn. The draw follows from `seed`, the
    token ids of the prompt, the pixels of its images, layer, head and the order of the entries: neither padding, nor
    the rest of the batch, nor the device changes it, and no generator is read or advanced. What most rankings keep
    anyway, sinks and a recent window, explains much of their lead: set both as they do to see what the ranking adds.

    Control, no paper. Compare over many samples and several seeds. Cost: one pass over the pixels, and one integer hash
    per entry.

    Args:
        seed: other entries for every other number.
        sinks: first entries that always stay.
        window: newest entries that always stay.
    """

    seed: int = 0
    sinks: int = 0
    window: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("seed", self.seed, least=0)
        check_count("sinks", self.sinks, least=0)
        check_count("window", self.window, least=0)

    def reads(self, depth: int) -> set[Read]:
        return {CONTENT}

    def score(self, view: CacheView) -> Tensor:
        _, H, S = view.shape
        heads = torch.arange(H, device=view.valid.device)
        draws = uniform(key(view.content[:, None], self.seed, view.layer, heads), S)
        score = draws.gather(2, view.order.clamp(min=0).expand(-1, H, -1))
        newest = view.budget.clamp(max=self.window)
        sinks = (view.budget - newest).clamp(max=self.sinks)
        return score.masked_fill((view.order >= view.lengths - newest) | (view.order < sinks), torch.inf)
