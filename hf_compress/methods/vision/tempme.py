"""TempMe: neighbouring frames join to clips, whose tokens merge across and inside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_compress import budget
from hf_compress.methods.base import VisionMethod, check_count, check_counts, check_number
from hf_compress.modules.frames import Frames
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.merge import by_first, group_sum, matched
from hf_compress.tensors.select import identity

__all__ = ["TempMe"]

Step = tuple[int, list[int]]  # how many neighbouring clips join, and the tokens that each clip then has


@register("tempme", stage="vision", kind="trained", paper="arXiv:2409.01156", needs={"visual", "video"})
@dataclass
class TempMe(VisionMethod):
    """Frames of a video merged step by step: each in itself, then pairs, pairs of pairs, and threes of these.

    First every frame merges its own tokens; then neighbouring clips join, `joins` at a time, and after each join merge
    a share `across` and a share `inside` of what they hold; `inside` once more at the end. Every merge is bipartite
    matching (as in `tome`, by the mean weighted with sizes) of the tokens (n, m, D) of a clip. The published shares
    lead to a published count; a budget K scales the logarithms of all shares alike, and exactly K are left. Outputs
    take the slot of their first token. A learnt vector per frame, `frames` of them, stretched to the length of the
    video, is added to its tokens before they merge: zeros at the start, so that without training it merges all the
    same. Cost O(T * N^2 * D) for T frames of N tokens, and O(m^2 * D) for clips of m.

    Source: "TempMe: Video Temporal Token Merging for Efficient Text-Video Retrieval", ICLR 2025, arXiv:2409.01156
    (LunarShen/TempMe). There it acts inside the encoder, tuned with LoRA: two tokens per frame and block go before
    block 8, frames join in front of the attention of blocks 8, 9 and 10, so that it looks across them, and the shares
    `across` and `inside` stand before and after it. Here all steps follow the projector, in this order and by the
    projected tokens: attention never sees joined frames, and only the language model saves. An image, or a frame alone,
    merges in itself.

    Args:
        frames: learnt vectors.
        joins: how many clips join at each of the joins.
        across, inside: shares of the tokens of a clip, in the published count.

    Raises:
        ValueError: a knob is out of its range.
    """

    frames: int = 12
    joins: Sequence[int] = (2, 2, 3)
    across: float = 0.3
    inside: float = 0.1

    scope: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("frames", self.frames)
        check_counts("joins", self.joins, least=2)
        check_number("across", self.across, 0, 0.5)
        check_number("inside", self.inside, 0, 0.5)

    def module(self, model: nn.Module) -> nn.Module:
        """The vectors of the frames."""
        return Frames(self.frames, model.config.get_text_config().hidden_size)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Groups (n, N) of all steps, kept (n, K) the first token of each."""
        n, N, x = len(tokens), tokens.count, tokens.embeddings.detach().float()
        groups, sizes = identity(n, N, tokens.device), torch.ones(n, N, device=tokens.device)
        clips = [h * w for h, w in tokens.grids]
        steps = published(clips, self.joins, self.across, self.inside)
        for (join, _), total in zip(steps, totals(N, [sum(counts) for _, counts in steps], keep)):
            clips = joined(clips, join if total >= len(clips) else len(clips))
            left = budget.shares(total - len(clips), [float(m) for m in clips], [m - 1 for m in clips])
            left = [1 + m for m in left]  # every clip has some
            step, weights = merged(x, sizes, clips, left)
            x = group_sum(x * sizes[..., None], step, total) / weights[..., None]
            groups, sizes, clips = step.gather(1, groups), weights, left
        groups, kept = by_first(groups, keep)
        return Assignment(kept, groups)

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        """The means, (n, K, D), of tokens and the vectors of their frames."""
        assert tokens.module is not None
        vectors: Tensor = tokens.module([h * w for h, w in tokens.grids])
        return assignment.apply(tokens.embeddings + vectors.to(tokens.embeddings.dtype))


def published(clips: list[int], joins: Sequence[int], across: float, inside: float, cls: int = 0) -> list[Step]:
    """The published counts: for every step how many clips join in front of it, and the tokens of each clip behind it.

    Args:
        clips: tokens per frame; cls: rows of [CLS] in each, which are counted in shares but never merge.
    """
    own = [m - min(16, (m - cls) // 2) for m in clips]  # two in each of eight blocks
    steps: list[Step] = [(1, own)]
    for join in joins:
        for by, share in ((join, across), (1, inside)):
            steps.append((by, [m - math.floor(m * share + 1e-9) for m in joined(steps[-1][1], by)]))
    steps.append((1, [m - math.floor(m * inside + 1e-9) for m in steps[-1][1]]))
    return steps


def joined(clips: list[int], by: int) -> list[int]:
    """The tokens of clips of which every `by` neighbours have become one; the last one may have fewer."""
    return [sum(clips[i : i + by]) for i in range(0, len(clips), by)]


def totals(tokens: int, counts: list[int], keep: int) -> list[int]:
    """How many of `tokens` are left behind each step, `keep` at the end: `counts` with their logarithms scaled."""
    if counts[-1] == tokens:
        return [tokens] * (len(counts) - 1) + [keep]
    power = math.log(keep / tokens) / math.log(counts[-1] / tokens)
    scaled = [max(keep, round(tokens * (count / tokens) ** power)) for count in counts[:-1]]
    return [*accumulate(scaled, min), keep]


def merged(x: Tensor, sizes: Tensor, clips: list[int], left: list[int]) -> tuple[Tensor, Tensor]:
    """Groups (n, m) in which `left` tokens remain of each clip, and their sizes."""
    groups, weights, start = [], [], 0
    for part, size, keep in zip(x.split(clips, 1), sizes.split(clips, 1), left):
        mine, weight = matched(part, size, keep)
        groups.append(mine + start)
        weights.append(weight)
        start += keep
    return torch.cat(groups, 1), torch.cat(weights, 1)
