"""FlowCut: tokens leave the vision tower little by little, by what flows through them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.methods.base import TowerMethod, check_count, check_number
from hf_compress.registry import register
from hf_compress.signals import EVERY, Assignment, Block, Read, Tokens
from hf_compress.tensors.rows import best_rows
from hf_compress.tensors.select import top_sorted

__all__ = ["FlowCut"]

LATE = 4  # blocks whose flow is added up where the tower cannot be entered; what is older weighs a sixteenth


@register("flowcut", stage="vision", kind="saliency", paper="arXiv:2505.19536", needs={"visual", "cls"})
@dataclass
class FlowCut(TowerMethod):
    """Little flow from [CLS], over several blocks, and a token leaves the tower; the last cut meets K.

    After the attention of each block every patch gets the flow (a + s) * |v|_1: a is the row of [CLS] (mean over
    heads), s the softmax of the products of its value with that of [CLS] (per head, then the mean), both over the
    patches left and with sum 1, v its value (mean over heads). Scores run on: C = memory * C + (1 - memory) * flow. In
    every `interval`-th block, counted back from the last but one, of N patches P = round((N - K) / sqrt(rest) * (1 -
    H^2)) with the lowest C leave, `rest` being the blocks up to that one and H the entropy of a over ln(N): an
    undecided row cuts nothing. In the last but one block all but K leave. Towers without [CLS] take the attention of
    their mean query for a, and no s. Cost: O(N * d) per head and block; later blocks get cheaper. How many leave is
    known on the host only, so a device is waited for at each cut.

    Where the tower cannot be entered a * |v|_1, run on over its last four blocks, ranks the tokens of the output; only
    the language model saves.

    Source: "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
    arXiv:2505.19536. The code cuts as much of every image of a batch as of the one that can lose most; here each has a
    count of its own, as alone. It keeps 2.5 times the target of crops (twice, in Qwen2-VL) in the tower and lets a
    layer of the language model cut the rest; here the tower cuts to the target. It drops single patches in front of
    the merger of Qwen2-VL, so that tokens are joined from patches of several places; here those of a token leave
    together.

    Small towers leave it few cuts: the embedded Qwen2.5-VL has two blocks that see whole images, so that all leave in
    the first of them, the third of six. With 89 and 94 % removed it answers 81 and 63 % right there (`uniform` 67 and
    70, `random` 61 and 40 %; 100 questions), with `where="output"` 93 and 93.

    Args:
        memory: share of the running score that stays, from 0 to below 1.
        interval: a cut in every so manieth block.

    Raises:
        ValueError: a knob is out of its range.
    """

    memory: float = 0.5
    interval: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("memory", self.memory, 0, 1, below=True)
        check_count("interval", self.interval)

    def reads(self, depth: int) -> set[Read]:
        late = {Read("tower", back, what) for back in range(min(depth, LATE)) for what in ("attention", "value")}
        return late | {Read("tower", EVERY, "attention")}

    def reduce(self, block: Block, keep: int) -> Assignment | None:
        """Selection of [CLS] and patches in raster order, as many of each image as its attention says."""
        skip, m = int(block.has_cls), block.hidden.shape[1]
        if m - skip <= keep:
            return None
        row = share(block.attention(surrogate="mean").mean(1))
        values = block.values.float()
        near = semantic(values) if skip else torch.zeros_like(row)
        flow = strength(values.mean(1)[:, skip:]) * (row + near)
        score = torch.cat([flow.new_full((len(flow), skip), torch.inf), flow], 1)
        if "score" in block.memory:
            score = self.memory * block.memory["score"] + (1 - self.memory) * score
        block.memory["score"] = score
        rest = max(0, block.steps - 2) - block.index
        if rest < 0 or rest % self.interval:
            return None
        counts = [skip + n for n in left(entropy(row).tolist(), m - skip, keep, rest)]
        return Assignment.selection(best_rows(score, torch.ones_like(score, dtype=torch.bool), counts))

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K) by the running score of the last blocks; ties go to the lower index."""
        score = None
        for back in reversed(range(min(tokens.depth, LATE))):
            flow = share(tokens.attention(back, surrogate="mean").mean(1)) * strength(
                tokens.states("value", back).float()
            )
            score = flow if score is None else self.memory * score + (1 - self.memory) * flow
        assert score is not None
        return Assignment(top_sorted(score, keep))


def share(row: Tensor) -> Tensor:
    """(n, N) non-negative numbers over their sum."""
    return row / row.sum(1, keepdim=True)


def semantic(values: Tensor) -> Tensor:
    """(n, N): the softmax of the products of the value of [CLS] with all values (n, H, N + 1, d), mean over the heads;
    [CLS], which is token 0, is left out behind it."""
    products = values @ values[:, :, :1].mT
    return share(products[..., 0].softmax(-1).mean(1)[:, 1:])


def strength(values: Tensor) -> Tensor:
    """(n, N): the sum of the absolute values of (n, N, d)."""
    return values.abs().sum(-1)


def entropy(row: Tensor) -> Tensor:
    """(n,): that of the rows (n, N), which sum to 1, over its largest value ln(N)."""
    return -torch.special.xlogy(row, row).sum(1) / math.log(max(2, row.shape[1]))


def left(shares: list[float], patches: int, keep: int, rest: int) -> list[int]:
    """How many of `patches` stay of each image, from the entropy of its attention; all but `keep` leave at last."""
    if not rest:
        return [keep] * len(shares)
    return [max(keep, patches - round((patches - keep) / math.sqrt(rest) * (1 - h * h))) for h in shares]
