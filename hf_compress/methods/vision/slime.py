"""SliME: crops keep what the question is about, the whole image in small stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.methods.base import VisionMethod, check_choice, check_number
from hf_compress.registry import register
from hf_compress.signals import QUESTION, Assignment, Read, Tokens
from hf_compress.tensors.counts import nucleus
from hf_compress.tensors.select import spaced, top_mask

__all__ = ["SliME"]


@register("slime", stage="vision", kind="question", paper="arXiv:2406.08487", needs={"visual", "places"})
@dataclass
class SliME(VisionMethod):
    """Of the crops what is most like the question; the whole image in small stays.

    On the embeddings (n, N, D) of all crops of an image: a token scores the sum of its cosines to the embedded tokens
    of the question, over all crops together; the highest stay in raster order. The whole image in small, which comes
    first where there are crops, stays as it is. An image of one crop, and every frame, is nothing but a crop. Without a
    question (no text behind the image) as many evenly spaced ones stay. `ratio="adaptive"` is the rule of the paper:
    the fewest tokens whose softmax over all crops adds up to more than `top_p`. Cost O(N * D) beside the embedded
    question.

    Source: "Beyond LLaVA-HD: Diving into High-Resolution Large Multimodal Models", arXiv:2406.08487. There a resampler
    of 144 queries per crop and a projector are trained together with the selector, which draws tokens to the question's
    embeddings (with Gaussian noise of .1 on the scores in training). A checkpoint that was not trained so has nothing
    that draws them: here the selector runs training-free, on the tokens of any projector, and what it finds is chance.
    In the embedded Qwen2.5-VL tokens of objects are those least like words (correlation of scores and attention -.74):
    at 11 % of the tokens 10 of 100 questions are answered, random tokens answer 61, and those of the lowest scores 94;
    in the embedded LLaVA (.48) 61 are, random tokens answer 53.

    Args:
        top_p: of "adaptive"; the authors tune with .95.
        temperature: the scores are divided by it in front of the softmax.
        whole: keep the whole image in small; else it is a crop like the others.

    Raises:
        ValueError: `top_p` is not a number from 0 to 1, `temperature` not one above 0, `whole` not a bool. On call: the
            budget of an image does not hold the whole image in small.
    """

    top_p: float = 0.95
    temperature: float = 1.0
    whole: bool = True

    example = {"ratio": 0.5, "whole": False}
    scope: ClassVar[str] = "image"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("top_p", self.top_p, 0, 1)
        check_number("temperature", self.temperature, 0, above=True)
        check_choice("whole", self.whole, (True, False))

    def reads(self, depth: int) -> set[Read]:
        return {QUESTION}

    def assign(self, tokens: Tokens, keep: int | None) -> Assignment:  # type: ignore[override]
        """Selection (n, K); ties go to the lower index."""
        first = 0
        if self.whole and len(tokens.grids) > 1 and tokens.boxes[0] == (0, 0, 1, 1):
            first = tokens.grids[0][0] * tokens.grids[0][1]
        if keep is not None and keep < first:
            raise ValueError(
                f"slime keeps the whole image in small, and keep={keep} does not hold its {first} tokens: of an image "
                f"of {tokens.count} tokens {1 - first / tokens.count:.4g} can be removed at most; or pass whole=False"
            )
        text, real = tokens.question
        score = likeness(tokens.embeddings[:, first:].float(), text, real) / self.temperature
        stays = nucleus(score, self.top_p) if keep is None else top_mask(score, keep - first)
        count = int(nucleus(torch.zeros_like(score[:1]), self.top_p).sum()) if keep is None else keep - first
        even = torch.zeros_like(stays)
        even[:, spaced(tokens.count - first, count)] = True
        stays = torch.where(real.any(1, keepdim=True), stays, even)
        return Assignment.selection(F.pad(stays, (first, 0), value=True))


def likeness(x: Tensor, text: Tensor, real: Tensor) -> Tensor:
    """(n, N): the sum of the cosines of tokens (n, N, D) to the real ones (n, T) of a text (n, T, D)."""
    whole = (F.normalize(text.float(), dim=-1) * real[..., None]).sum(1)
    return (F.normalize(x, dim=-1) @ whole[..., None])[..., 0]
