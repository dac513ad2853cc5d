"""DyCoke: of four frames one stays whole, the others keep what differs; each step may read the entries it looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from hf_compress.budget import check_share, shares
from hf_compress.methods.base import Part, VisionMethod, check_count, check_number
from hf_compress.methods.steps import StepChoice
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.frames import cell_cosines
from hf_compress.tensors.select import spaced_grid, top_by_part

__all__ = ["DyCoke"]

GROUP = 4  # frames, of which the first stays whole


@register("dycoke", stage="vision", kind="video", paper="arXiv:2411.15024", needs={"visual", "video"})
@dataclass
class DyCoke(VisionMethod):
    """Every fourth frame whole, and of the three behind it the tokens that differ most.

    On the embeddings (n, T * N, D) of a whole video, in groups of four frames: the second and the fourth are compared
    with the frame before, the third with the first, cell by cell. What the first frames of the groups leave of the K
    tokens is shared evenly over all other frames, each of which keeps the cells of lowest cosine, in the order of time.
    `ratio` is the fraction of the whole video, at most 3/4 where four divides its frames. Cost O(T * N * D).

    An image, or a video of one frame, has nothing to differ from: it keeps evenly spaced tokens, those of `uniform`.

    At the largest ratio only every fourth frame is left. On clips of the built-in video model that is two moments of
    eight: 40 % right with 75 % removed, where `random` tokens give 67; with half removed 84 and 81 (200 questions).

    Source: "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", arXiv:2411.15024. Its first
    stage is called merging there. The code leaves the third frame of the last group whole, loses a last odd frame and
    keeps cells in the order of their scores; here every frame but the first of its group is cut, none is lost, and the
    order is that of the raster.

    Its second stage, by which every step reads only the visual entries that it looks at, is off unless `unread` is
    above 0 (the authors take .7 or .8): see `StepChoice`. It acts in the cache stage, where no other method can be
    then, and stores everything as it is.

    Args:
        unread: share of the visual entries that a step does not read.
        unread_from: the first layer that reads less, counted from 0.
        alike: cosine of what two steps look at from which on the earlier choice holds.

    Raises:
        ValueError: `unread` is not a number in [0, 1), `unread_from` not an integer of at least 1, `alike` not a number
            from 0 to 1. On call: a video is to lose more than all frames but the first ones of its groups.
    """

    unread: float = 0.0
    unread_from: int = 3
    alike: float = 0.9

    scope: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.unread, "unread")
        check_count("unread_from", self.unread_from)
        check_number("alike", self.alike, 0, 1)

    def parts(self, layers: int, tokens: int | None, ratio: Fraction | None, keep: int | None) -> Mapping[str, Part]:
        """The frames with all of the budget, and what steps read."""
        if not self.unread:
            return {}
        steps = StepChoice(unread=self.unread, layer=self.unread_from, alike=self.alike)
        return {"vision": (self, ratio, keep), "cache": (steps, None, None)}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K); ties go to the lower index."""
        frames, (h, w) = len(tokens.grids), tokens.grids[0]
        if frames == 1:
            return Assignment(torch.tensor(spaced_grid(h, w, keep), device=tokens.device).repeat(len(tokens), 1))
        whole = [t % GROUP == 0 for t in range(frames)]
        rest = keep - sum(whole) * h * w
        if rest < 0:
            raise ValueError(
                f"dycoke keeps {sum(whole)} of {frames} frames whole, and keep={keep} does not hold their "
                f"{sum(whole) * h * w} tokens; of such a video {1 - sum(whole) / frames:.4g} can be removed at most"
            )
        cut = iter(shares(rest, [1.0] * (frames - sum(whole)), [h * w] * (frames - sum(whole))))
        counts = torch.tensor([h * w if first else next(cut) for first in whole], device=tokens.device)
        x = tokens.embeddings.unflatten(1, (frames, h * w))
        likeness = cell_cosines(x, [t - (0, 1, 2, 1)[t % GROUP] for t in range(frames)]).flatten(1)
        at = torch.arange(frames, device=x.device).repeat_interleave(h * w).expand(len(x), -1)
        return Assignment.selection(top_by_part(-likeness, at, counts.expand(len(x), -1)))
