"""Correlation-guided compression: crops whose tokens repeat each other keep fewer, and merge them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_compress.budget import shares
from hf_compress.methods.base import VisionMethod, check_choice, check_count, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.counts import neighbours
from hf_compress.tensors.draw import key, uniform
from hf_compress.tensors.merge import nearest
from hf_compress.tensors.select import top_by_part

__all__ = ["Correlation"]


@register("correlation", stage="vision", kind="crops", paper="arXiv:2407.14439", needs={"visual", "cls"})
@dataclass
class Correlation(VisionMethod):
    """Crops whose tokens repeat each other keep fewer; the others are merged into them.

    Made for pages of text in many crops. On the tokens of all crops of an image: 1. a token is redundant if the key of
    another one of its crop (head mean, the block whose features the projector reads) has a cosine above `threshold`.
    2. The crops share the budget in proportion to how many of their tokens are not, at least a tenth of them;
    `ratio="adaptive"` keeps just so many of each. 3. The probability of a token is the mean of what [CLS] of its crop
    attends to in a late block (the same) and in an early one (a quarter of the tower); the highest of a crop stay.
    4. Every other token is merged, by plain mean, into the one of its crop with the most similar key; those of a crop
    of which none stays vanish. Raster order. Cost O(N^2 * d) per crop, d the size of one head, chunked, and two rows of
    attention.

    Source: "Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding",
    arXiv:2407.14439; there is no code. It names neither threshold nor blocks nor weights, and samples: all of these are
    ours, and what is most probable stays unless `sample`. Encoders without [CLS] take the row of their mean query.

    Args:
        threshold: cosine of two keys from which on they say the same, from -1 to 1.
        sample: draw the tokens that stay, without replacement, by their probability.
        seed: of the draws, which follow from it and the pixels alone.

    Raises:
        ValueError: `threshold` is not a number from -1 to 1, `sample` not a bool, `seed` not an integer of at least 0.
    """

    threshold: float = 0.75
    sample: bool = False
    seed: int = 0

    scope: ClassVar[str] = "image"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, -1, 1)
        check_choice("sample", self.sample, (True, False))
        check_count("seed", self.seed, least=0)

    def reads(self, depth: int) -> set[Read]:
        rows = {Read("tower", back, "attention") for back in (0, early(depth))}
        return rows | {Read("tower", 0, "key")}

    def assign(self, tokens: Tokens, keep: int | None) -> Assignment:  # type: ignore[override]
        """Groups (n, N) with plain means, kept (n, K); ties go to the lower index."""
        part, keys, sizes = tokens.place[..., 0], tokens.states("key"), [h * w for h, w in tokens.grids]
        part = part - part[:, :1]
        exact = [[max(n, N / 10) for n, N in zip(mine, sizes)] for mine in self.singles(keys, sizes).tolist()]
        counts = [[max(1, round(n)) for n in mine] if keep is None else shares(keep, mine, sizes) for mine in exact]
        score = probability(tokens, sizes)
        if self.sample:  # the first to come in a race of exponential times is drawn first
            score = score / -uniform(key(tokens.content, self.seed), tokens.count).clamp(min=2**-25).log()
        stays = top_by_part(score, part, torch.tensor(counts, device=tokens.device))
        answer = Assignment.selection(stays)
        fits = part[..., None] == part.gather(1, answer.kept)[:, None]
        if answer.valid is not None:
            fits &= answer.valid[:, None]
        answer.groups = nearest(keys, answer.kept, fits)
        return answer

    def singles(self, keys: Tensor, sizes: list[int]) -> Tensor:
        """(n, P) int64: how many tokens of each crop no other one repeats."""
        return torch.stack([(neighbours(x, self.threshold) == 0).sum(1) for x in keys.split(sizes, 1)], 1)


def early(depth: int) -> int:
    """Blocks between the early one, a quarter of the tower, and the features."""
    return max(0, depth - 1 - (depth + 1) // 4)


def probability(tokens: Tokens, sizes: list[int]) -> Tensor:
    """(n, N): the mean of the late and the early row, each of which adds up to one in every crop."""
    rows = [tokens.attention(back, surrogate="mean").mean(1) for back in (0, early(tokens.depth))]
    return sum(torch.cat([r / r.sum(1, keepdim=True) for r in row.split(sizes, 1)], 1) for row in rows) / 2  # type: ignore
