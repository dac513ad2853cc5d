"""IA-RED2: a small interpreter in front of each group of blocks says which tokens go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_compress.methods.base import TowerMethod, check_count, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, Block, Tokens
from hf_compress.tensors.select import top_sorted

__all__ = ["IARED2"]

WIDTH = 64  # channels in which tokens are compared
SURE = 0.5  # the probability from which a token goes on where no budget is given


@register("ia_red2", stage="vision", kind="trained", paper="arXiv:2106.12620", needs={"visual"})
@dataclass
class IARED2(TowerMethod):
    """A trained interpreter drops tokens in a few blocks of the tower: those that [CLS] has no use for.

    The interpreter of a group of blocks gives every token a probability: sigmoid(a(x) . b([CLS]) / sqrt(64)) with two
    linear maps a, b of normed hidden states (n, m, D) after the attention of its first block; without [CLS] their mean
    over the patches is read. With `ratio` the most probable stay, of m tokens about m * (K / m)^(1 / groups left), so
    that each group drops the same part and exactly K are left; with `ratio="adaptive"` those of at least one half, as
    published (the most probable one in any case). At the output (`where`) one interpreter reads the projected tokens.

    Source: "IA-RED2: Interpretability-Aware Redundancy Reduction for Vision Transformers", NeurIPS 2021,
    arXiv:2106.12620, without code; its interpreter is not told in detail, and what we take is our choice. There it is
    trained group by group by policy gradient, on a reward of right answers with few tokens. Here all are trained at
    once, as part of any fine-tuning: a token that stays carries the gradient of its probability (it is multiplied by
    p / p), and the loss grows by `price` times the square of the mean probability, which is what the reward takes off
    for the tokens that stay. Cost O(m * D) per group.

    It wants the tower tuned with it. With all but the interpreters frozen (`recipes/tiny_encoders`, at 89 % removed,
    200 questions on the built-in LLaVA) it reaches 67.5 % at that ratio, where random reaches 50.5 %, but 88.0 % at
    half of the tokens, where random reaches 94.0 %: blocks miss what left in front of them, and what left sends no
    gradient.

    Args:
        groups: of blocks, each with its interpreter.
        price: of tokens that stay, in the loss.

    Raises:
        ValueError: `groups` is no integer of at least 1, `price` is negative, or `where` none of its values.
    """

    groups: int = 3
    price: float = 0.1

    example: ClassVar[Mapping[str, Any]] = {"ratio": 0.5, "price": 0.0}
    adaptive: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("groups", self.groups)
        check_number("price", self.price, 0)

    def module(self, model: nn.Module) -> nn.Module:
        """One interpreter, of projected tokens."""
        return Interpreters(model.config.get_text_config().hidden_size, 1)

    def tower_module(self, width: int, blocks: int) -> nn.Module:
        """One interpreter per group."""
        return Interpreters(width, min(self.groups, blocks))

    def reduce(self, block: Block, keep: int | None) -> Assignment | None:
        """In the first block of a group: the tokens that stay, ascending."""
        if (at := group_of(block, self.groups)) is None:
            return None
        m, left = block.hidden.shape[1] - block.has_cls, min(self.groups, block.steps) - at
        return chosen(self._probable(block, at), None if keep is None else share(m, keep, left), block.has_cls)

    def add(self, block: Block, keep: int | None, answer: Assignment) -> Tensor | None:
        """Zeros (n, K, D) with the gradients of the probabilities, and their price."""
        at = group_of(block, self.groups)
        if at is None or not torch.is_grad_enabled():
            return None
        p = self._probable(block, at)
        block.losses.append(self.price * p.mean(1).square().mean())
        p = torch.cat([p.new_ones(len(p), int(block.has_cls)), p], 1)
        return carried(p, answer, block.hidden)

    def _probable(self, block: Block, at: int) -> Tensor:
        patches = block.hidden[:, int(block.has_cls) :]
        whole = block.hidden[:, :1] if block.has_cls else patches.mean(1, keepdim=True)
        return read(block.module, at, patches, whole)

    def assign(self, tokens: Tokens, keep: int | None) -> Assignment:
        """The same of projected tokens, at once."""
        return chosen(self._of_output(tokens), keep, False)

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        """The tokens that stay, with the gradients of their probabilities."""
        p, x = self._of_output(tokens), tokens.embeddings
        tokens.losses.append(self.price * p.mean(1).square().mean())
        return assignment.pick(x) + carried(p, assignment, x)

    def _of_output(self, tokens: Tokens) -> Tensor:
        return read(tokens.module, 0, tokens.embeddings, tokens.embeddings.mean(1, keepdim=True))


class Interpreters(nn.Module):
    """One per group: two linear maps of normed tokens."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(groups))
        self.token = nn.ModuleList(nn.Linear(width, WIDTH) for _ in range(groups))
        self.whole = nn.ModuleList(nn.Linear(width, WIDTH) for _ in range(groups))

    def forward(self, at: int, x: Tensor, whole: Tensor) -> Tensor:
        """(n, m) fp32 probabilities that the tokens (n, m, D) go on, `whole` (n, 1, D) standing for the image."""
        norm = self.norm[at]
        x, whole = (t.to(norm.weight.dtype) for t in (x, whole))  # it also runs where autocast is off
        product = (self.token[at](norm(x)).float() * self.whole[at](norm(whole)).float()).sum(-1)
        return (product * WIDTH**-0.5).sigmoid()


def read(module: nn.Module | None, at: int, x: Tensor, whole: Tensor) -> Tensor:
    """What the interpreter of a group says, (n, m)."""
    assert module is not None
    p: Tensor = module(at, x, whole)
    return p


def group_of(block: Block, groups: int) -> int | None:
    """The group of blocks that begins with this one, from 0; None: none does."""
    groups = min(groups, block.steps)
    first = [i * block.steps // groups for i in range(groups)]
    return first.index(block.index) if block.index in first else None


def share(tokens: int, keep: int, groups: int) -> int:
    """How many of `tokens` stay in the next of so many groups, each of which keeps the same part."""
    return keep if groups == 1 else max(keep, round(tokens * (keep / tokens) ** (1 / groups)))


def chosen(p: Tensor, keep: int | None, has_cls: bool) -> Assignment:
    """The `keep` most probable of (n, m) tokens, or those that are sure enough; behind [CLS], where there is one."""
    first = torch.zeros(len(p), int(has_cls), dtype=torch.int64, device=p.device)
    if keep is not None:
        return Assignment(torch.cat([first, top_sorted(p, keep) + int(has_cls)], 1))
    stays = p >= SURE
    stays.scatter_(1, p.argmax(1, keepdim=True), True)
    return Assignment.selection(torch.cat([first == 0, stays], 1))


def carried(p: Tensor, answer: Assignment, x: Tensor) -> Tensor:
    """Zeros (n, K, D): the tokens x (n, m, D) that stay times p / p - 1, with the gradient of p (n, m)."""
    p = p.gather(1, answer.kept)
    return ((p / p.detach() - 1)[..., None] * answer.pick(x)).to(x.dtype)
