"""ToMe: tokens are merged by bipartite soft matching, a few in every block of the tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_compress.methods.base import TowerMethod, check_choice
from hf_compress.registry import register
from hf_compress.signals import Assignment, Block, Tokens
from hf_compress.tensors.merge import bipartite, by_first, first_members, group_sum
from hf_compress.tensors.select import identity

__all__ = ["ToMe"]


@register("tome", stage="vision", kind="merging", paper="arXiv:2210.09461", needs={"visual"})
@dataclass
class ToMe(TowerMethod):
    """Similar tokens merged step by step, inside the vision tower where it can be entered.

    One step: even places propose their best cosine partner among the odd ones, the r strongest proposals
    merge, by the mean weighted with the number of original tokens; [CLS] never merges. In the tower a step
    follows the attention of every block up to the feature block, on head-mean keys (n, m, d), r spread evenly
    (first blocks first, at most half of the tokens), so that exactly K remain; later blocks get cheaper, and
    their attention adds ln(size) to the keys. At the output steps of r = min(n // 2, n - K) on the projected
    tokens repeat until K; only the language model saves. Outputs take the slot of their first token.
    Cost O(m^2 / 4 * d) per step.

    Source: "Token Merging: Your ViT But Faster", arXiv:2210.09461; in a language model as in AuroraCap,
    arXiv:2410.03051. The code orders the outputs of a step as what is left of the even places, then the odd
    ones, and the next step alternates over that order: so do we (inside the tower the rows are thus not in
    raster order, the final output is). The codes take a constant r; ours is spread to meet K exactly.

    Args:
        where: "tower", "output", or "auto" (the tower if it can be entered, else the output).

    Raises:
        ValueError: `where` or `positions` is none of its values.
    """

    where: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("where", self.where, ("auto", "tower", "output"))

    @property
    def inside(self) -> bool:
        """Whether it wants to act in the tower."""
        return self.where != "output"

    def check(self, grid: tuple[int, int], keep: int, steps: int | None) -> None:
        """Refuses a count that the blocks cannot reach; each at most halves the patches of an image."""
        if not self.inside or steps is None:
            return
        tokens = grid[0] * grid[1]
        least = -(-tokens // 2**steps)
        if not least <= keep <= tokens:
            reach = f"tome reaches {least} to {tokens} of {tokens} tokens in {steps} blocks"
            raise ValueError(f'keep={keep}: {reach}; keep more or use where="output"')

    def reduce(self, block: Block, keep: int) -> Assignment | None:
        """Groups and weights (n, m) of one step, in the authors' order ([CLS] first, `kept` not ascending)."""
        r = merges(block.hidden.shape[1] - block.has_cls, keep, block.steps - block.index)
        if r == 0:
            return None
        groups, count = bipartite(block.keys, r, protect_first=block.has_cls), block.hidden.shape[1] - r
        sizes = block.sizes.float()
        weight = sizes / group_sum(sizes, groups, count).gather(1, groups)
        return Assignment(first_members(groups, count), groups, weight)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """The same on the output: groups (n, N) with plain means over original tokens, kept (n, K)."""
        n, left = len(tokens), tokens.count
        groups = identity(n, left, tokens.device)
        if keep == left:
            return Assignment(groups)
        x = tokens.embeddings.detach().float()
        sizes = torch.ones(n, left, device=tokens.device)
        while left > keep:
            r = min(left // 2, left - keep)
            left -= r
            step = bipartite(x, r)
            x, sizes = group_sum(x * sizes[..., None], step, left), group_sum(sizes, step, left)
            x, groups = x / sizes[..., None], step.gather(1, groups)
        groups, kept = by_first(groups, left)
        return Assignment(kept, groups)


def merges(patches: int, keep: int, blocks: int) -> int:
    """How many of `patches` the next of `blocks` blocks merges, so that `keep` remain after the last one.

    An even share, rounded up; more where later halvings could not make up for it; never above half.
    """
    share = -(-(patches - keep) // blocks)
    return max(0, min(patches // 2, max(share, patches - keep * 2 ** (blocks - 1))))
