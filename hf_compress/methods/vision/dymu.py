"""DyMU: tokens merge where they are alike enough, so that simple images keep fewer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_compress.calibrate.files import MERGING, load, tower_identity
from hf_compress.methods.base import Part, check_choice, check_file, check_number
from hf_compress.methods.unmerging import Unmerging
from hf_compress.methods.vision.tome import ToMe
from hf_compress.registry import register
from hf_compress.signals import Assignment, Block, Tokens
from hf_compress.tensors.merge import bipartite_above, by_first, first_members, group_sum
from hf_compress.tensors.select import identity

__all__ = ["DyMU"]


@register("dymu", stage="vision", kind="merging", paper="arXiv:2504.17040", needs={"visual"})
@dataclass
class DyMU(ToMe):
    """Tokens merged in every block of the tower where they are alike enough: how many stay follows the image.

    As `tome`, but with `ratio="adaptive"` every proposal of a block whose cosine is above the threshold of that block
    merges, at most half of the tokens; every image has a count of its own. With `ratio` or `keep` the strongest
    proposals merge, as in `tome`. Thresholds are measured once per model on images of one's own,
    `hf_compress.calibrate.merge_thresholds(model, batches, ratio=...)`, for the mean removal that one wants, and found
    beside its checkpoint. At the output (`where`) steps repeat as long as a proposal is above `threshold`. Cost as of
    `tome`; the host learns the counts of every block, and images with other counts are looked at one by one.

    Source: "DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs", arXiv:2504.17040 (DToMe). The paper writes
    of dot products, its code takes cosines: so do we. Unfused, the code adds ln(size) behind the softmax, which we do
    not. Its second part, virtual unmerging, by which the language model attends as if no token had gone, is off unless
    `unmerge` is set: see `Unmerging`. It acts in the cache stage, where no other method can be then.

    With thresholds for 50, 89 and 94 % the embedded LLaVA loses 46, 85 and 87 % of its tokens (17 to 37 of 196 stay in
    the last case: its tower has few blocks, each of which at most halves) and answers 100, 94 and 90 of 100 questions.

    Args:
        threshold: one cosine for every block and for the output, from -1 to 1; None: those that were measured.
        thresholds_file: file of the measurement; None: "merge_thresholds.json" in the folder that the model was loaded
            from.
        unmerge: whether the language model attends as if no token had gone; positions are the original ones then.

    Raises:
        ValueError: `threshold` is out of its range, the file is not there or of another model, `unmerge` is no bool or
            is set together with positions="renumber"; at the first image of `ratio="adaptive"`: nothing was measured.
    """

    threshold: float | None = None
    thresholds_file: str | None = None
    unmerge: bool = False

    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None:
            check_number("threshold", self.threshold, -1, 1)
        check_file("thresholds_file", self.thresholds_file)
        check_choice("unmerge", self.unmerge, (False, True))
        if self.unmerge and self.positions == "renumber":
            raise ValueError(
                "positions='renumber': with unmerge=True tokens keep their places; use 'auto' or 'original'"
            )
        self._measured: list[float] | None = None

    def parts(self, layers: int, tokens: int | None, ratio: Fraction | None, keep: int | None) -> Mapping[str, Part]:
        """Merging, and attention that undoes it."""
        if not self.unmerge or ratio == 0:
            return {}
        return {"vision": (replace(self, positions="original"), ratio, keep), "cache": (Unmerging(), None, None)}

    def prepare(self, model: nn.Module) -> None:
        if self.threshold is None:
            found = load(model, MERGING, self.thresholds_file, tower_identity, knob="thresholds_file")
            self._measured = None if found is None else found["thresholds"]

    def reduce(self, block: Block, keep: int | None) -> Assignment | None:
        """Groups and weights (n, m) of one step ([CLS] first); counts differ where `keep` is None."""
        if keep is not None:
            return super().reduce(block, keep)
        groups, valid = bipartite_above(block.keys, self.cosine(block.index, block.steps), block.has_cls)
        if valid.shape == groups.shape and bool(valid.all()):
            return None
        kept, sizes = outputs(groups, valid), block.sizes.float()
        weight = sizes / group_sum(sizes, groups, valid.shape[1]).gather(1, groups)
        return Assignment(kept, groups, weight, valid=valid)

    def assign(self, tokens: Tokens, keep: int | None) -> Assignment:
        """The same on the output: groups (n, N) with plain means over original tokens."""
        if keep is not None:
            return super().assign(tokens, keep)
        if self.threshold is None:
            raise ValueError("threshold=None: what was measured are cosines inside the tower; give one for the output")
        return merged_above(tokens.embeddings.detach(), self.threshold)

    def cosine(self, block: int, blocks: int) -> float:
        """The threshold of one of the blocks in which it acts."""
        if self.threshold is not None:
            return self.threshold
        if self._measured is None or len(self._measured) < blocks:
            raise ValueError(
                "ratio='adaptive': nothing was measured on the blocks of this tower; call "
                "hf_compress.calibrate.merge_thresholds(model, batches, ratio=...), or give threshold="
            )
        return self._measured[block]


def outputs(groups: Tensor, valid: Tensor) -> Tensor:
    """(n, K): the first member of each of the groups that are `valid` (n, K); of the others token 0."""
    return first_members(groups, valid.shape[1]).masked_fill_(~valid, 0)


def merged_above(x: Tensor, threshold: float) -> Assignment:
    """Steps over the tokens (n, N, D) of each image, as long as one of its proposals is above the threshold."""
    parts = [by_first(*_alone(one[None].float(), threshold)) for one in x]
    counts = torch.tensor([kept.shape[1] for _, kept in parts], device=x.device)[:, None]
    fill = counts.max() - counts
    groups = torch.cat([groups for groups, _ in parts]) + fill
    valid = torch.arange(int(counts.max()), device=x.device) >= fill
    return Assignment(outputs(groups, valid), groups, valid=valid)


def _alone(x: Tensor, threshold: float) -> tuple[Tensor, int]:
    """Groups (1, N) of one image, and how many they are."""
    groups, sizes = identity(1, x.shape[1], x.device), x.new_ones(1, x.shape[1])
    while True:
        step, valid = bipartite_above(x, threshold)
        if (left := valid.shape[1]) == x.shape[1]:
            return groups, left
        total, groups = group_sum(sizes, step, left), step.gather(1, groups)
        x, sizes = group_sum(x * sizes[..., None], step, left) / total[..., None], total
