"""Steps of decoding that read a part of the visual entries, chosen where they look (DyCoke, arXiv:2411.15024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.budget import check_share
from hf_compress.methods.base import CacheMethod
from hf_compress.methods.inhibition import places
from hf_compress.methods.reader import Reader
from hf_compress.signals import Reading
from hf_compress.tensors.attention import rows_attention

__all__ = ["StepChoice"]


@dataclass
class StepChoice(CacheMethod, Reader):
    """From a layer on, every step of one token reads the visual entries that the layer before looks at, and all text.

    With a (S,) the attention of the new row in that layer, mean over heads, on visual entries: where its cosine with
    that of the step before is below `alike`, or there was none, the floor(V * (1 - unread)) of V visual entries with
    the highest a are chosen, at least one; of equal ones the first. Else the choice of the step before holds. All
    entries stay stored, so that what was not read may be read later. Prompts, and tokens that are fed together, read
    everything. Layers with a sliding window take no part, and are not counted.

    The kernel of the layer runs under a mask, so that rows of a batch may read different numbers of entries: what that
    saves depends on the kernel. The release reads the full cache where the cosine is `alike` and more; the paper keeps
    the choice, and so do we. Cost per step: one row of attention in one layer, S * H * d.

    Args:
        unread: share of the visual entries that is not read.
        layer: the first layer that reads less; the one before it decides.
        alike: cosine from which on the earlier choice holds.
    """

    unread: float = 0.7
    layer: int = 3
    alike: float = 0.9

    def reader(self) -> Reader:
        return self

    def choose(self, reading: Reading) -> Tensor | None:
        """(B, 1, 1, S) bool, in the layers behind the one that decides."""
        if reading.queries.shape[2] > 1 or reading.depth < self.layer - 1:
            return None
        known, entries = reading.memory, reading.entries
        if reading.depth == self.layer - 1:
            known["read"], known["at"] = self.read(reading), entries.index
            return None
        return known["read"].gather(1, places(known["at"], entries))[:, None, None]

    def read(self, reading: Reading) -> Tensor:
        """(B, S) bool: what this step reads in the layers to come."""
        visual = reading.entries.valid & (reading.entries.image >= 0)
        looks = rows_attention(reading.queries, reading.keys, reading.scaling, reading.visible).mean(1)[:, 0] * visual
        before = reading.side.get("looks")
        held = torch.zeros_like(looks)[:, None].repeat(1, 2, 1) if before is None else before
        share = 1 - check_share(self.unread, "unread")
        most = (visual.sum(1, keepdim=True) * share.numerator // share.denominator).clamp(min=1)
        order = looks.masked_fill(~visual, -1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        elsewhere = (F.cosine_similarity(looks, held[:, 0], dim=1) < self.alike) | ~held[:, 1].any(1)
        chosen = torch.where(elsewhere[:, None], order < most, held[:, 1] > 0) & visual
        reading.side["looks"] = torch.stack([looks, chosen.to(looks.dtype)], 1)
        return chosen | ~visual
