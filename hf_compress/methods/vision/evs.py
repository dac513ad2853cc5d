"""EVS: cells of a video that changed since the frame before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_compress.methods.base import VisionMethod
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.frames import cell_cosines
from hf_compress.tensors.select import spaced_grid, top_sorted

__all__ = ["EVS"]

FIRST = 255.0  # the change of cells that nothing came before


@register("evs", stage="vision", kind="video", paper="arXiv:2510.14624", needs={"visual", "video"})
@dataclass
class EVS(VisionMethod):
    """The first frame, and the tokens that changed most since the frame before.

    On the embeddings (n, T * N, D) of a whole video: the change of a token is 1 - cosine to the one in the same cell of
    the frame before; all of the first frame come first. The K highest of the video stay, in the order of time; `ratio`
    is the fraction of the whole video. Slow drift is not seen, as only neighbours are compared. Cost O(T * N * D).

    Source: "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", arXiv:2510.14624,
    as an inference engine implements it. That keeps the whole first frame whatever the budget; here a budget that does
    not hold it is refused. It moves the text behind the video by the width of the grid alone; here positions of M-RoPE
    stay what they are without pruning. An image, or a video of one frame, has nothing before it: it keeps evenly spaced
    tokens, those of `uniform`.

    Raises (on call):
        ValueError: a video of T frames is to lose more than 1 - 1/T of its tokens.
    """

    scope: ClassVar[str] = "video"

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K); ties go to the lower index."""
        frames, (h, w) = len(tokens.grids), tokens.grids[0]
        if frames == 1:
            return Assignment(torch.tensor(spaced_grid(h, w, keep), device=tokens.device).repeat(len(tokens), 1))
        if keep < h * w:
            raise ValueError(
                f"evs keeps the first frame of a video whole, and keep={keep} does not hold its {h * w} tokens; of a "
                f"video of {frames} frames {1 - 1 / frames:.4g} can be removed at most"
            )
        x = tokens.embeddings.unflatten(1, (frames, h * w))
        change = 1 - cell_cosines(x, [0, *range(frames - 1)])
        change[:, 0] = FIRST
        return Assignment(top_sorted(change.flatten(1), keep))
