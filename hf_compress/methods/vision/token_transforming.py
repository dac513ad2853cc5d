"""Token Transforming: every token goes into every one that stays, by how similar they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from hf_compress.methods.base import VisionMethod, check_choice, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.select import top_sorted

__all__ = ["TokenTransforming"]


@register("token_transforming", stage="vision", kind="merging", paper="arXiv:2506.05709", needs={"visual", "cls"})
@dataclass
class TokenTransforming(VisionMethod):
    """A dense matrix makes K tokens of all N, where one-hot rows would select and one-hot columns merge.

    1. The K tokens of the highest head-mean [CLS] attention are the targets. 2. Every token (n, N) is shared over them:
    the softmax, over the targets, of its cosines to them divided by `temperature`, on the features that the projector
    reads. 3. A target becomes the mean of all tokens, weighted with what they share with it. Features are mixed before
    the projector; raster order of the targets. Every crop and frame by itself. Cost O(K * N * D), memory K * N.

    Source: "Token Transforming: A Unified and Training-Free Token Compression Framework for Vision Transformer
    Acceleration", arXiv:2506.05709. Published without code is the idea that a dense matrix of informativeness and
    similarity stands for pruning and merging alike, block by block inside the tower; these weights are our realisation
    of it, once and behind the tower. As the temperature falls to 0 tokens are merged into the nearest target; the
    higher it is, the more alike all outputs become. With .02 the built-in LLaVA answers 98 and 76 % right with 89 and
    94 % removed, with .1 it is 61 and 21 %, at the end fewer than with `random` (53 and 38 %; 100 questions). Encoders
    without [CLS] take the attention received.

    Args:
        temperature: what cosines are divided by.
        informed: whether tokens also count by their attention.

    Raises:
        ValueError: `temperature` is not a number above 0, `informed` is not a bool.
    """

    temperature: float = 0.02
    informed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temperature", self.temperature, 0, above=True)
        check_choice("informed", self.informed, (True, False))

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", 0, "attention")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """A dense matrix (n, K, N) whose rows sum to one; ties between targets go to the lower index."""
        score, x = tokens.attention(surrogate="all").mean(1), F.normalize(tokens.features.float(), dim=-1)
        answer = Assignment(top_sorted(score, keep), before_projector=True)
        share = (answer.pick(x) @ x.mT).div_(self.temperature).softmax(1)
        if self.informed:
            share = share * score[:, None]
        answer.dense = share / share.sum(-1, keepdim=True)
        return answer
