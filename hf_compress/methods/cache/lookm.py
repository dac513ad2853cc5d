"""LOOK-M: text first, dropped image entries merged into kept ones (arXiv:2406.18139)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.methods.base import check_choice
from hf_compress.methods.eviction import Eviction
from hf_compress.registry import register
from hf_compress.signals import COLUMNS, CacheView, Read
from hf_compress.tensors.kvmerge import leaving, nearest, pour, rerotated, take
from hf_compress.tensors.ranking import tiered


@register("lookm", stage="cache", kind="merging", paper="arXiv:2406.18139", needs={"columns"})
@dataclass
class LookM(Eviction):
    """Heavy hitters with text before images; what goes is merged into the most similar entry that stays.

    Half of the budget are the newest entries, half the best of the others by accumulated attention (sum over all rows
    of the prompt, mean over the query heads of a group). Text ranks before images; frames of videos are images. Every
    evicted entry e joins the kept entry c of its head whose key is nearest by cosine, and the values go along:

        averaged: c becomes the mean of c and its members e;
        pivotal: of c and the (e + c) / 2, so that c keeps most of itself;
        weighted: of c and the cos(e, c) * e. The release leaves out of it (and of one averaged variant) those whose
            cosine is below the mean of their head, which vanish; here every evicted entry takes part, the less it
            resembles c the less.

    Without images (a text model, or a sample that shows none) it is H2O at the end of the prompt, with merging. Every
    evicted entry is merged, however little it resembles its target: at small budgets many unlike ones blur those that
    stay, and on the recall model (text, ratio .89) it answers far less than H2O (6.9 % against 34.2 %).

    Source: "LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference", Findings of
    EMNLP 2024, arXiv:2406.18139. Cost: the column sums of H2O, and one cosine per evicted and kept entry, in blocks:
    with 2048 tokens at ratio .5 on a CPU core 4 % of a prefill of LLaMA-7B layers, 6 % of narrow ones (hidden size
    1024). The released code sums the scores over the batch, knows images of 576 tokens only, and in one variant pairs
    the sources with the wrong targets; ours does not.

    Args:
        merging: "pivotal" (the best in the paper), "averaged" or "weighted".
        text: "hard": all text stays even beyond the budget, and the newest half of the budget with it, as in the
            released code (the report says what that came to); "soft": text ranks first but can go, as in the paper.
        rotated: merge keys as they are stored (the paper); False: before their rotation, so that keys of different
            positions do not blur each other, and rotate the result to the position of the entry that stays.
    """

    merging: str = "pivotal"
    text: str = "hard"
    rotated: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("merging", self.merging, ("pivotal", "averaged", "weighted"))
        check_choice("text", self.text, ("hard", "soft"))
        check_choice("rotated", self.rotated, (True, False))

    def reads(self, depth: int) -> set[Read]:
        return {COLUMNS}

    def score(self, view: CacheView) -> Tensor:
        return tiered(view.column_sums(), (~view.visual).long())

    def protected(self, view: CacheView) -> Tensor | None:
        always = view.order >= view.lengths - (view.budget // 2).clamp(min=1)
        if self.text == "hard":
            shows_images = (view.visual & view.valid).any(-1, keepdim=True)
            always = always | (shows_images & ~view.visual)
        text = super().protected(view)
        return always if text is None else always | text

    def merge(self, view: CacheView, slots: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        at, gone = leaving(slots, real, view.valid)
        n = slots.shape[-1]
        pairs = [(take(view.keys, at), take(view.keys, slots))]
        cosine, target = nearest(pairs, None if real is None else lambda _: real[:, :, None])
        members = pour(gone[..., None], target, gone.float(), n)
        share = gone * (cosine if self.merging == "weighted" else 0.5 if self.merging == "pivotal" else 1.0)
        own = 1 + members / 2 if self.merging == "pivotal" else 1

        def mean(x: Tensor) -> Tensor:
            return ((own * take(x, slots) + pour(take(x, at), target, share, n)) / (1 + members)).to(x.dtype)

        if self.rotated:
            return mean(view.keys), mean(view.values)
        keys = rerotated(view.rotate, slots, mean(view.unrotate(view.keys.float())), view.keys)
        return torch.where(members > 0, keys, take(view.keys, slots)), mean(view.values)
