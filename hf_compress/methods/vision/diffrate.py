"""DiffRate: how many tokens every block of the tower prunes and merges is learnt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.methods.base import TowerMethod, check_choice, check_count, check_number
from hf_compress.registry import register
from hf_compress.signals import EVERY, Assignment, Block, Read, Tokens
from hf_compress.tensors.merge import group_sum
from hf_compress.tensors.ranking import largest
from hf_compress.tensors.select import top_sorted

__all__ = ["DiffRate"]


@register("diffrate", stage="vision", kind="trained", paper="arXiv:2305.17997", needs={"visual", "cls"})
@dataclass
class DiffRate(TowerMethod):
    """The least attended tokens go block by block, the last of them pruned, the others merged; how many is learnt.

    After the attention of a block (the first one left alone) the patches are ranked by the head-mean row of [CLS], or
    of its `surrogate`; those at the end are pruned, and of the rest the last ones merge, by the plain mean, each with
    the most similar of those that stay (cosine of hidden states, never [CLS]). Outputs go on in the order of their
    rank. Behind the last block exactly K remain.

    Without training the counts are our linear schedule: equal numbers go in every block, half of them pruned, half
    merged. Training moves the counts only, everything else of the model may be frozen: each block has two vectors of
    logits over `candidates`. A softmax over the first gives the share of the surplus (tokens beyond K) that goes on, as
    its expectation, rounded up; candidates lie as far as can be on both sides of the linear share. One over the second
    gives the part of what leaves that is pruned. The loss grows by
    `price` * (cost - `cost`)^2, cost being the mean share of the surplus behind the blocks.

    Source: "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV 2023, arXiv:2305.17997
    (OpenGVLab/DiffRate). There candidates are counts in steps of 4 for one resolution, and in training tokens are
    masked, not removed; ours are shares, so that K stays exact for every image and `ratio`, and gradients reach the
    counts through the tokens that are there: those that stay by the probability that their rank does, those that
    merge by that of not being pruned. There a receiver's size grows by the similarity of what it receives, here by its
    size, as the attention of the engine counts tokens; cost is theirs without the square term of attention.
    Cost O(N * D) for the row and O(tail * kept * D) a block; the counts of each block are read from the device once.

    Args:
        surrogate: what ranks on towers without [CLS]: the "mean" query, or what "all" rows give.
        candidates: per softmax.
        cost: aimed at in training, 0 to 1; None: that of the linear schedule.
        price: of missing it; 0: the counts follow the task alone.
        where: as of every method of the tower; at its "output" K go on in one step, ranked by the last block.

    Raises:
        ValueError: a knob is out of its range.
    """

    surrogate: str = "mean"
    candidates: int = 16
    cost: float | None = None
    price: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("surrogate", self.surrogate, ("mean", "all"))
        check_count("candidates", self.candidates, least=2)
        check_number("price", self.price, 0)
        if self.cost is not None:
            check_number("cost", self.cost, 0, 1)

    def reads(self, depth: int) -> set[Read]:
        """The attention of all blocks that see the whole image; of the last one, where the tower cannot be entered."""
        return {Read("tower", 0, "attention")} | ({Read("tower", EVERY, "attention")} if self.inside else set())

    def tower_module(self, width: int, blocks: int) -> nn.Module:
        """The logits, zeros."""
        return Rates(max(1, blocks - 1), self.candidates)

    def reduce(self, block: Block, keep: int) -> Assignment | None:
        """One step, in the order of the ranks, [CLS] first."""
        at, skip = acts(block), int(block.has_cls)
        m = block.hidden.shape[1] - skip
        if at is None or m <= keep:
            return None
        share, pruned = (float(x) for x in module_of(block).shares(*at))
        stay = keep + up(share * (m - keep))
        if stay == m:
            return None
        order = block.attention(surrogate=self.surrogate).mean(1).argsort(dim=1, descending=True, stable=True)
        left = m - down(pruned * (m - stay))  # of the pruning
        return ranked(block.hidden, F.pad(order + skip, (skip, 0)), left + skip, stay + skip, skip)

    def add(self, block: Block, keep: int, answer: Assignment) -> Tensor | None:
        """Zeros (n, K, D), through which gradients reach the logits; and what the counts cost, in the loss."""
        at, skip = acts(block), int(block.has_cls)
        if at is None or answer.groups is None or not torch.is_grad_enabled():
            return None
        module, outputs = module_of(block), answer.kept.shape[1]
        m = block.hidden.shape[1] - skip
        lives, merges = module.survival(*at, m, keep, outputs - skip)
        change = straight(merges).expand(answer.groups.shape)  # of the weight of a merged token
        change = change.scatter(1, answer.kept, F.pad(straight(lives), (skip, 0)).expand_as(answer.kept))
        groups = answer.groups % (outputs + 1)
        size = group_sum(torch.ones_like(change), groups, outputs + 1).gather(1, groups)
        if at[0] + 1 == at[1]:
            wanted = (at[1] - 1) / (2 * at[1]) if self.cost is None else self.cost
            block.losses.append(self.price * (module.cost(at[1]) - wanted) ** 2)
        return Assignment(answer.kept, answer.groups, change / size).apply(block.hidden)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """The same at the output in one step, half of what leaves merged into the most similar of those that stay."""
        N, score = tokens.count, tokens.attention(surrogate=self.surrogate).mean(1)
        order = score.argsort(dim=1, descending=True, stable=True)
        order = torch.cat([top_sorted(score, keep), order[:, keep:]], 1)  # those that stay in their order
        return ranked(tokens.embeddings.detach(), order, N - (N - keep) // 2, keep, 0)


class Rates(nn.Module):
    """The logits of every block that acts, (blocks, candidates) for what stays and for what is pruned."""

    def __init__(self, blocks: int, candidates: int):
        super().__init__()
        self.stay_logits = nn.Parameter(torch.zeros(blocks, candidates))
        self.prune_logits = nn.Parameter(torch.zeros(blocks, candidates))

    def _candidates(self, i: int, blocks: int) -> tuple[Tensor, Tensor]:
        """(C,) shares of the surplus that go on from block i, and their probabilities."""
        p = self.stay_logits[min(i, len(self.stay_logits) - 1)].float().softmax(-1)
        linear = (blocks - 1 - i) / (blocks - i)
        spread = min(linear, 1 - linear)
        return torch.linspace(linear - spread, linear + spread, len(p), device=p.device), p

    def shares(self, i: int, blocks: int) -> tuple[Tensor, Tensor]:
        """The share of the surplus that goes on from block i of so many, and the part of the rest that is pruned."""
        share, p = self._candidates(i, blocks)
        q = self.prune_logits[min(i, len(self.prune_logits) - 1)].float().softmax(-1)
        return p @ share, q @ torch.linspace(0, 1, len(q), device=q.device)

    def survival(self, i: int, blocks: int, m: int, keep: int, stay: int) -> tuple[Tensor, Tensor]:
        """With gradient: (stay,) the probability that the j-th best of m tokens stays, where `keep` will be left in the
        end, and () that one that does not is merged."""
        share, p = self._candidates(i, blocks)
        counts = keep + share * (m - keep)
        lives = (counts[:, None] > torch.arange(stay, device=p.device)).float().mT @ p
        return lives, 1 - self.shares(i, blocks)[1]

    def cost(self, blocks: int) -> Tensor:
        """The mean over the blocks of the share of the surplus that is left behind each."""
        shares = torch.stack([self.shares(i, blocks)[0] for i in range(blocks)])
        return shares.cumprod(0).mean()


def module_of(block: Block) -> Rates:
    """The logits, as they are now."""
    assert isinstance(block.module, Rates)
    return block.module


def acts(block: Block) -> tuple[int, int] | None:
    """Which of how many steps a block takes: none in the first block, unless it is the only one."""
    if block.steps == 1:
        return 0, 1
    return (block.index - 1, block.steps - 1) if block.index else None


def ranked(x: Tensor, order: Tensor, left: int, stay: int, skip: int) -> Assignment:
    """Of the tokens x (n, m, D) in the `order` (n, m) of their ranks the first `stay`, in this order; those from there
    to `left` merge into the most similar one that stays but for the first `skip`, the others vanish."""
    unit = F.normalize(x.float(), dim=-1)
    kept, tail = order[:, :stay], order[:, stay:left]
    groups = torch.full(order.shape, -1, device=x.device)
    groups.scatter_(1, kept, torch.arange(stay, device=x.device).expand_as(kept))
    if left > stay:
        best = Assignment(tail).pick(unit) @ Assignment(kept[:, skip:]).pick(unit).mT
        groups.scatter_(1, tail, largest(best)[1] + skip)
    return Assignment(kept, groups)


def straight(p: Tensor) -> Tensor:
    """Zeros with the gradient of `p`."""
    return p - p.detach()


def up(x: float) -> int:
    """The next integer, but for rounding."""
    return math.ceil(round(x, 3))


def down(x: float) -> int:
    """The integer below, but for rounding."""
    return math.floor(round(x, 3))
