"""M3: nested pools of the grid, of which the model has learnt to read all."""

from __future__ import annotations

from dataclasses import dataclass

from hf_compress.methods.base import VisionMethod
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.cells import cells

__all__ = ["M3"]


@register("m3", stage="vision", kind="merging", paper="arXiv:2405.17430", needs={"visual"})
@dataclass
class M3(VisionMethod):
    """Means of K cells of the grid, for a model that is fine-tuned with all budgets in turn.

    Every cell (`tensors.cells`) becomes the mean of its projected tokens (n, N, D) and stands at its middle: average
    pooling where K cells divide the grid, so that pools are nested and K = 1 is the mean of all tokens; any other K in
    rows that are as equal as can be. Cost O(N * D), no parameters.

    Source: "Matryoshka Multimodal Models", ICLR 2025, arXiv:2405.17430 (mu-cai/matryoshka-mm). There every step takes
    the mean loss of five grids (`train.Every`); `train.Sampled` draws one a step, which costs a fifth and has the same
    mean. The paper takes squares of divisors of the side only, (24, 12, 6, 3, 1)^2 tokens; every other K is our
    extension.

    Without training it loses to tokens drawn at random, as a mean of unlike tokens is like none of them: the embedded
    LLaVA answers 68.8, 34.8, 23.5 and 12.8 % of 400 questions at 49, 22, 9 and 1 tokens (random: 73.0, 51.7, 32.0 and
    15.8 %), trained for two minutes of CPU (`recipes/finetune`) 89.5, 89.8, 90.5 and 37.5 %.
    """

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Groups (n, N) with plain means, kept (n, K) the middle token of each cell."""
        layout = cells(*tokens.grid, keep, tokens.device)
        return Assignment(layout.centres.repeat(len(tokens), 1), layout.groups.repeat(len(tokens), 1))
