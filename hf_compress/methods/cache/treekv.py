"""TreeKV: sparse far back and dense nearby, by cyclic comparison of neighbours (arXiv:2501.04987)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.methods.base import Count, check_count, clamp
from hf_compress.methods.pattern import Pattern
from hf_compress.registry import register
from hf_compress.signals import QUERIES, CacheView, Read, Rivals


@register("treekv", stage="cache", kind="attention", paper="arXiv:2501.04987")
@dataclass
class TreeKV(Pattern):
    """Between sinks and recent tokens, drop the weaker of two neighbours, going round and round.

    Half of the budget are the `sinks` and the newest entries; what is no longer new enters a region of the other c
    slots. When that holds one too many, the entry at the cursor and the one behind it are compared by the mean
    attention that they have received; the lower one goes (of equal ones the older), and the cursor moves on by one
    slot, from the last back to the first. So old text thins with every round. The cursor is common to the heads, each
    of which compares for itself (mean over its group).

    At the end of the prompt whole blocks of `block` entries are compared, by the attention of the newest `block`
    rows; what is still too many then goes one by one from where the blocks ended. Means go on from these rows while
    decoding; the rows of a later turn are counted before its entries are compared. Not established: the size of a
    block (16 is our choice, c where that is less) and how blocks and single entries meet. Published are 4 sinks and
    508 new entries of 1024. The paper re-assigns positions, which is rotation="cache", not the default. `ratio`
    applies to all entries; scopes and protected text are not offered.

    Source: TreeKV: Smooth Key-Value Cache Compression with Tree Structures, IJCAI 2025, arXiv:2501.04987 (no code was
    released). Cost: `block` attention rows at the end of the prompt, and one row per layer and step.

    Args:
        block: entries of the prompt that are dropped together, and rows of the prompt that score them.
    """

    block: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("block", self.block)

    def reads(self, depth: int) -> set[Read]:
        return {QUERIES}

    def begin(self, view: CacheView) -> Tensor:
        return view.window_attention(view.lengths[:, 0, 0].clamp(max=self.block))

    def votes(self, view: CacheView) -> Tensor:
        return (view.lengths - view.order).clamp(max=self.block).expand(view.shape)

    def score(self, view: CacheView) -> Tensor:
        assert view.scores is not None and view.votes is not None
        sinks, newest, slots, gone = self._sizes(view)
        start, size, blocks = self._blocks(view, slots, gone)
        mean = view.scores / view.votes.clamp(min=1)
        if view.incoming and int(gone.max()) == 1 and int(slots.min()) > 0:  # a step: one comparison
            older, younger = view.order == sinks + start, view.order == sinks + start + 1
            loses = (mean * older).sum(-1, keepdim=True) <= (mean * younger).sum(-1, keepdim=True)
            return torch.where(torch.where(loses, older, younger) & (gone > 0), -torch.inf, torch.inf)
        region = view.valid & (view.order >= sinks) & (view.order < view.lengths + view.incoming - newest)
        region = region.expand_as(mean)
        leaves = region & (slots == 0)  # a budget of one: whatever is not the newest
        if not view.incoming:
            whole = (slots + gone) // size
            at = torch.where(region, torch.minimum((view.order - sinks) // size, whole), whole)
            sums = torch.zeros(*mean.shape[:2], int(whole.max()) + 1, device=mean.device).scatter_add(-1, at, mean)
            real = torch.arange(sums.shape[-1], device=mean.device) < whole
            leaves = leaves | weaker(sums, real, torch.zeros_like(blocks), blocks, whole - blocks).gather(-1, at)
        leaves = leaves | weaker(mean, region & ~leaves, start, gone - blocks * size, slots)
        return torch.where(leaves, -torch.inf, torch.inf)

    def rivals(self, budget: int, cursor: int | None, depth: int, depths: int) -> Rivals:
        sinks, _, slots = self._parts(budget)
        if not slots:
            return Rivals(0)
        start = cursor or 0
        return Rivals(sinks + start, True, (start + 1) % slots)

    def older_goes(self, scores: Tensor, votes: Tensor | None) -> Tensor:
        assert votes is not None
        older, younger = (scores / votes).split(1, -1)  # every entry has been read by its own row at least
        return older <= younger

    def cursor(self, view: CacheView) -> Tensor:
        _, _, slots, gone = self._sizes(view)
        start, size, blocks = self._blocks(view, slots, gone)
        return (start + gone - blocks * size) % slots.clamp(min=1)

    def _parts(self, budget: Count) -> tuple[Count, Count, Count]:
        """Sinks, newest entries, and slots of the region between them."""
        half = budget // 2
        sinks = clamp(half - 1, 0, self.sinks)
        newest = clamp(half - sinks, 1)
        return sinks, newest, budget - sinks - newest

    def _sizes(self, view: CacheView) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 1, 1) each: the parts of the budget, and how many entries the region has too many."""
        sinks, newest, slots = self._parts(view.budget)
        gone = (view.lengths[:, :1] + view.incoming - view.budget).clamp(min=0)
        return sinks, newest, slots, torch.where(slots > 0, gone, 0)

    def _blocks(self, view: CacheView, slots: Tensor, gone: Tensor) -> tuple[Tensor | int, Tensor, Tensor]:
        """(B, 1, 1) each: where single entries begin to be compared, entries of a block, and blocks that go."""
        size = slots.clamp(1, self.block)
        if view.incoming:
            return 0 if view.cursor is None else view.cursor, size, torch.zeros_like(gone)
        blocks = gone // size
        return blocks % ((slots + gone) // size - blocks).clamp(min=1) * size, size, blocks


def weaker(score: Tensor, region: Tensor, start: Tensor | int, gone: Tensor, slots: Tensor) -> Tensor:
    """Which entries leave a region by comparisons of neighbours, round after round.

    The pairs of one round do not overlap: the winner takes the slot of the cursor, and the next comparison is between
    the two entries behind it. So a round compares all its pairs at once.

    Args:
        score: (B, H, S); region: (B, 1 or H, S) bool.
        start, gone, slots: (B, 1, 1) int64: the cursor, entries to leave, and entries that the region holds then.

    Returns:
        (B, H, S) bool.
    """
    slots = slots.clamp(min=1)
    rounds = -(-(start + gone) // slots) * (gone > 0)
    at, leaves = torch.arange(score.shape[-1], device=score.device), torch.zeros_like(score, dtype=torch.bool)
    for _ in range(int(rounds.max())):
        here = (leaves | ~region).long().argsort(dim=-1, stable=True)  # what is left of the region, in front
        row = score.gather(-1, here)
        pairs = torch.minimum(gone, slots - start)
        older = (at >= start) & (at < start + 2 * pairs) & ((at - start) % 2 == 0)
        loses = row <= row.roll(-1, -1)
        lost = older & loses | (older & ~loses).roll(1, -1)
        leaves = leaves | torch.zeros_like(leaves).scatter(-1, here, lost)
        start, gone = (start + pairs) % slots, gone - pairs
    return leaves
