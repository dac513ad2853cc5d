"""SliME: crops keep what the question is about, the whole image in small stays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.methods.base import VisionMethod, check_choice, check_count, check_number
from hf_compress.methods.cells import check_queries
from hf_compress.modules.queries import Queries
from hf_compress.registry import register
from hf_compress.signals import QUESTION, Assignment, Read, Tokens
from hf_compress.tensors.cells import cells
from hf_compress.tensors.counts import nucleus
from hf_compress.tensors.select import spaced, top_mask

__all__ = ["SliME", "SliMEQueries"]


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
    of 144 queries per crop (`slime_queries`) and a projector are trained together with the selector, which draws tokens
    to the question's embeddings (with Gaussian noise of .1 on the scores in training). A checkpoint that was not
    trained so has nothing that draws them: here the selector runs training-free, on the tokens of any projector, and
    what it finds is chance. In the embedded Qwen2.5-VL tokens of objects are those least like words (correlation of
    scores and attention -.74): at 11 % of the tokens 10 of 100 questions are answered, random tokens answer 61, and
    those of the lowest scores 94; in the embedded LLaVA (.48) 61 are, random tokens answer 53.

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
        first = self.first(tokens)
        if keep is not None and keep < first:
            raise ValueError(
                f"slime keeps the whole image in small, and keep={keep} does not hold its {first} tokens: of an image "
                f"of {tokens.count} tokens {1 - first / tokens.count:.4g} can be removed at most; or pass whole=False"
            )
        text, real = tokens.question
        x, at = self.candidates(tokens, first)
        score = likeness(x.float(), text, real) / self.temperature
        stays = nucleus(score, self.top_p) if keep is None else top_mask(score, keep - first)
        count = int(nucleus(torch.zeros_like(score[:1]), self.top_p).sum()) if keep is None else keep - first
        even = torch.zeros_like(stays)
        even[:, spaced(len(at), count)] = True
        every = torch.zeros(len(tokens), tokens.count, dtype=torch.bool, device=tokens.device)
        every[:, :first] = True
        every[:, at] = torch.where(real.any(1, keepdim=True), stays, even)
        return Assignment.selection(every)

    def first(self, tokens: Tokens) -> int:
        """How many tokens the whole image in small has that stays."""
        small = self.whole and len(tokens.grids) > 1 and tokens.boxes[0] == (0, 0, 1, 1)
        return math.prod(tokens.grids[0]) if small else 0

    def candidates(self, tokens: Tokens, first: int) -> tuple[Tensor, Tensor]:
        """(n, M, D) vectors of which some stay, and (M,) int64 the tokens in whose slots they stand."""
        return tokens.embeddings[:, first:], torch.arange(first, tokens.count, device=tokens.device)


@register("slime_queries", stage="vision", kind="trained", paper="arXiv:2406.08487", needs={"visual", "places"})
@dataclass
class SliMEQueries(SliME):
    """SliME with its resampler: trained queries look at every crop, and what is most like the question stays.

    `queries` trained queries attend to the projected tokens of each crop (`modules.queries`; fewer where a crop has
    fewer tokens), and stand at the middles of so many cells of it; of all of them the ones stay that `slime` would
    choose. The whole image in small stays as it is. Cost O(N * D * C) twice, C <= 512 channels of attention: to choose,
    and with gradient.

    Source: "Beyond LLaVA-HD: Diving into High-Resolution Large Multimodal Models", arXiv:2406.08487
    (yfzhang114/SliME). There a projector of its own follows; here the queries read projected tokens. There the scores
    get Gaussian noise of .1 in training; here they do not.

    Args:
        queries: of a crop.

    Raises:
        ValueError: as of `slime`, or `queries` is no integer of at least 1. Also: a budget of more tokens than queries.
    """

    queries: int = 144

    needs_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("queries", self.queries)

    def check(self, grid: tuple[int, int], keep: int) -> None:
        """Refuses more tokens of a crop than queries, unless all stay."""
        check_queries(self.queries, grid, keep)

    def module(self, model: nn.Module) -> nn.Module:
        """The queries and their attention."""
        return Queries(model.config.get_text_config().hidden_size, self.queries)

    def assign(self, tokens: Tokens, keep: int | None) -> Assignment:  # type: ignore[override]
        """Selection (n, K) of the slots of the queries."""
        first = self.first(tokens)
        most = sum(min(self.queries, h * w) for h, w in tokens.grids[1 if first else 0 :])
        if keep is not None and first + most < keep:
            raise ValueError(
                f"queries={self.queries} of a crop give {most} tokens beside the {first} of the whole image in small, "
                f"and {keep} of {tokens.count} shall stay; remove more, or set queries= (and train them)"
            )
        return super().assign(tokens, keep)

    def candidates(self, tokens: Tokens, first: int) -> tuple[Tensor, Tensor]:
        """What the queries of every crop make of it, and where they stand."""
        assert tokens.module is not None
        made, at, start = [], [], first
        x = tokens.embeddings.to(next(tokens.module.parameters()).dtype)  # `assign` runs outside of autocast
        for h, w in tokens.grids[1 if first else 0 :]:
            layout = cells(h, w, min(self.queries, h * w), tokens.device)
            made.append(tokens.module(x[:, start : start + h * w], layout))
            at.append(start + layout.centres)
            start += h * w
        return torch.cat(made, 1), torch.cat(at)

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        """(n, K, D) what the queries give that stay, and the whole image in small."""
        made, at = self.candidates(tokens, self.first(tokens))
        return assignment.pick(tokens.embeddings.index_copy(1, at, made.to(tokens.embeddings.dtype)))


def likeness(x: Tensor, text: Tensor, real: Tensor) -> Tensor:
    """(n, N): the sum of the cosines of tokens (n, N, D) to the real ones (n, T) of a text (n, T, D)."""
    whole = (F.normalize(text.float(), dim=-1) * real[..., None]).sum(1)
    return (F.normalize(x, dim=-1) @ whole[..., None])[..., 0]
