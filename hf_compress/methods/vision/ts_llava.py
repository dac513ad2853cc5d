"""TS-LLaVA: a thumbnail of a few frames, and evenly sampled tokens of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_compress.budget import shares
from hf_compress.methods.base import VisionMethod, check_count
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.cells import cells
from hf_compress.tensors.merge import by_owner
from hf_compress.tensors.select import identity

__all__ = ["TSLLaVA"]


@register("ts_llava", stage="vision", kind="video", paper="arXiv:2411.11066", needs={"visual", "video"})
@dataclass
class TSLLaVA(VisionMethod):
    """Means of the cells of a few frames, as many tokens as one frame has, and evenly spaced tokens of all frames.

    Of T frames of N tokens, evenly spaced ones from the first to the last are drawn small, `frames` of them, N tokens
    together: each is cut into its share of cells, which stand at their middle tokens. Of all other tokens of the video,
    in their order, the K - N at round(linspace(0, rest - 1, K - N)) stay as they are; what is left of a cell is its
    mean. Budgets of N and less hold the thumbnail alone. In the order of time. `ratio` is the fraction of the whole
    video. Cost O(N * D).

    An image is a thumbnail of itself.

    Source: "TS-LLaVA: Constructing Visual Tokens through Thumbnail-and-Sampling for Training-Free Video Large Language
    Models", arXiv:2411.11066. There the thumbnail is a collage of six frames, 3 x 2, that the tower sees as one more
    image, and stands behind the sampled tokens. Here no further image is encoded: the cells are means of the tokens of
    these frames, at their times; sampled tokens are others than the ones in whose slots cells stand.

    Args:
        frames: of the thumbnail, as far as the video has them.

    Raises:
        ValueError: `frames` is not an integer of at least 1.
    """

    frames: int = 6

    scope: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("frames", self.frames)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Groups (n, T * N) of the cells and the sampled tokens, kept (n, K)."""
        n, V, (h, w) = len(tokens), tokens.count, tokens.grids[0]
        if keep == V:
            return Assignment(identity(n, V, tokens.device))
        small = min(keep, h * w)
        drawn = linspaced(len(tokens.grids), min(self.frames, len(tokens.grids), small))
        owner = torch.full((V,), -1)
        for t, count in zip(drawn, shares(small, [1.0] * len(drawn))):
            layout = cells(h, w, count)
            owner[t * h * w : (t + 1) * h * w] = t * h * w + layout.centres[layout.groups]
        others = (owner != torch.arange(V)).nonzero()[:, 0]
        sampled = others[linspaced(len(others), keep - small)]
        owner[sampled] = sampled
        groups, kept = by_owner(owner.repeat(n, 1).to(tokens.device))
        return Assignment(kept, groups)


def linspaced(n: int, k: int) -> list[int]:
    """k integers of range(n), round(linspace(0, n - 1, k)): the first and the last are among them, one is the first."""
    return [(2 * i * (n - 1) + k - 1) // (2 * (k - 1)) if k > 1 else 0 for i in range(k)]
