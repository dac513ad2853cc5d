"""KeyDiff: keys that differ from the mean key (arXiv:2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hf_compress.methods.base import check_choice
from hf_compress.methods.eviction import Eviction
from hf_compress.methods.holding import Holding
from hf_compress.registry import register
from hf_compress.signals import CacheView


@register("keydiff", stage="cache", kind="content", paper="arXiv:2504.15364")
@dataclass
class KeyDiff(Holding, Eviction):
    """Keep the keys that are least similar to the mean key of their head.

    The score is minus the cosine of a key to an anchor, the mean of the unit keys that are stored (padding left out).
    Needs no attention. The paper evicts while it reads the prompt, after every block of 128 tokens, so that memory
    stays bounded; here the whole prompt is scored at its end, and every step scores what is stored under
    policy="hold".

    Source: "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
    Environments", arXiv:2504.15364. Cost: one pass over the keys.

    Args:
        anchor: "unit" averages keys of length one (the paper), "raw" the keys as they are, so that long ones weigh
            more.
    """

    anchor: str = "unit"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("anchor", self.anchor, ("unit", "raw"))

    def score(self, view: CacheView) -> Tensor:
        keys = view.keys.float()
        unit = F.normalize(keys, dim=-1)
        counted = (unit if self.anchor == "unit" else keys) * view.valid[..., None]
        anchor = F.normalize(counted.sum(2), dim=-1)  # a cosine does not ask for its length: sum or mean
        return -(unit @ anchor[..., None]).squeeze(-1)
