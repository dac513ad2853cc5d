"""HoliTom's part inside the language model: one cut, and what is cut is averaged into what stays (arXiv:2505.21334)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.methods.base import check_choice
from hf_compress.methods.decoder.fastv import FastV
from hf_compress.registry import register
from hf_compress.signals import Assignment, DecoderView
from hf_compress.tensors.merge import nearest


@register("holitom_inner", stage="decoder", kind="merging", paper="arXiv:2505.21334", needs={"visual"})
@dataclass
class HoliTomInner(FastV):
    """One cut as of `fastv`, whose dropped rows are averaged into the kept visual rows that are most like them.

    The rows that stay, plans and budgets are those of `fastv`. Every dropped row goes into the visual row of its sample
    with the largest cosine of the states (B, S, D) that enter layer `layer`, among those that stay. The release halves
    (kept + dropped) / 2 one dropped row after the other, so that of m rows that go into one the i-th, from 0, weighs
    2^(i - m) and the kept one 2^-m: this is `merge="halving"`, for all rows at once. `merge="mean"` lets all weigh
    alike.

    The paper cuts before layer 18 of 28, behind its outer part, which cuts videos before the language model; `layer`
    is the default of the code without settings.

    On the built-in LLaVA (100 questions, cut before layer 1 of 6) 100 and 94 % are right with 50 and 75 % removed, with
    `merge="mean"` 99 and 94 (`fastv` 98 and 96, random 94 and 74).

    Source: HoliTom: Holistic Token Merging for Fast Video Large Language Models, NeurIPS 2025, arXiv:2505.21334. Cost:
    the attention row of `fastv`, and O(V K D) for the cosines of V visual rows with K of them, sample by sample.

    Args:
        layer: the first short layer.
        merge: "halving" or "mean".

    Raises:
        ValueError: a knob is none of its values, or the ratio is out of reach of one cut.
    """

    layer: int = 3
    merge: str = "halving"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("merge", self.merge, ("halving", "mean"))

    def decide(self, view: DecoderView, keep: list[int] | None) -> Assignment | None:
        found = super().decide(view, keep)
        assert found is not None
        stays = found.stays(view.valid.shape[1]) & view.valid
        owner = torch.where(stays, torch.arange(stays.shape[1], device=stays.device), -1)
        weight = stays.float()
        for b, (goes, left) in enumerate(zip(view.removable & ~stays, view.removable & stays)):
            gone, targets = goes.nonzero()[:, 0], left.nonzero()[:, 0]
            if len(gone) and len(targets):
                rows = torch.cat([targets, gone])
                to = nearest(view.hidden[b, rows][None], torch.arange(len(targets), device=rows.device)[None])[0]
                owner[b, gone] = targets[to[len(targets) :]]
                weight[b, rows] = _weights(to, len(targets), halving=self.merge == "halving")
        return Assignment.owned(owner, weight)


def _weights(to: Tensor, targets: int, *, halving: bool) -> Tensor:
    """What each row counts in the target that it goes `to` (N,); the first rows are the targets, in their order."""
    member = to == torch.arange(targets, device=to.device)[:, None]  # (targets, N)
    size = member.sum(1)[to]
    if not halving:
        return 1 / size
    behind = (size - member.long().cumsum(1).gather(0, to[None])[0]).float()  # members behind each
    first = torch.arange(len(to), device=to.device) < targets
    return torch.where(first, 0.5**behind, 0.5 ** (behind + 1))
