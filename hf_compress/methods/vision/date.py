"""DATE's frame sampling: frames that have to do with the question, and that lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

import torch

from hf_compress.methods.asked_frames import looked_at
from hf_compress.methods.base import VisionMethod, check_count
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.select import identity, spaced, spaced_grid

__all__ = ["DATE"]

MORE = 4  # candidates for each frame that is wanted, at most


@register("date", stage="vision", kind="video", paper="arXiv:2509.09263", needs={"visual", "video", "columns"})
@dataclass
class DATE(VisionMethod):
    """Whole frames: the ones that the question looks at most, as far apart in time as there are enough of them.

    1. The layers of the language model up to `layer` run over the whole prompt: s_t is the share of its attention that
    the text behind the video gives to frame t there, mean over heads and rows. 2. For M frames the candidates are those
    above the mean, the best 4 * M of them. 3. The best is taken, then, by falling s, each that lies at least `apart`
    frames from all that are taken; `apart` is halved and the walk begun anew until there are M. Where there are fewer
    candidates the best of the other frames fill up; without text behind the video frames are evenly spaced. Of K tokens
    the first K // N frames of N tokens are whole, the one taken next has evenly spaced tokens for the rest. `ratio` is
    the fraction of the whole video. On M-RoPE frames keep their times. Cost: `layer` + 1 layers of the language model
    over the whole prompt.

    An image keeps evenly spaced tokens, those of `uniform`.

    On clips of the built-in video model, where what is asked happens in one of eight moments, whole frames lose: 73, 57
    and 34 % right with 50, 75 and 90 % removed, `random` tokens 81, 67 and 47, evenly spaced whole `frames` 63, 56 and
    28 (200 questions). At 75 % a third of the objects is in a frame that shows it appear.

    Source: "DATE: Dynamic Absolute Time Enhancement for Long Video Understanding", arXiv:2509.09263, its sampling
    (TASS), which takes frames before the tower sees them, by CLIP's cosines with a question that a language model has
    rewritten, and measures 20 seconds; here all frames are encoded, and the model's own first layers score them. Its
    second part writes the time of each frame into the prompt; that adds tokens, and is not there.

    Args:
        layer: whose attention scores the frames, counted from 0.
        apart: frames between two that are taken, to begin with.

    Raises:
        ValueError: `layer` is not an integer of at least 0, or `apart` not one of at least 1.
    """

    layer: int = 2
    apart: int = 20

    scope: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("layer", self.layer, least=0)
        check_count("apart", self.apart)

    def reads(self, depth: int) -> set[Read]:
        return {Read("layer", self.layer, "attention")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K); of equal frames the earlier one."""
        h, w = tokens.grids[0]
        if keep == tokens.count:
            return Assignment(identity(len(tokens), keep, tokens.device))
        whole, rest = divmod(keep, h * w)
        last, kept = torch.tensor(spaced_grid(h, w, rest), dtype=torch.int64), []
        for score in looked_at(tokens, self.layer).tolist():
            many = whole + (rest > 0)
            taken = spread(score, range(len(score)), many, self.apart) if any(score) else spaced(len(score), many)
            parts = [t * h * w + torch.arange(h * w) for t in taken[:whole]] + [t * h * w + last for t in taken[whole:]]
            kept.append(torch.cat(parts).sort().values)
        return Assignment(torch.stack(kept).to(tokens.device))


def spread(score: Sequence[float], time: Sequence[float], count: int, apart: float) -> list[int]:
    """`count` frames, in the order in which they are taken; see `DATE`."""
    order = sorted(range(len(score)), key=lambda t: -score[t])
    some = [t for t in order if score[t] > fmean(score)][: MORE * count]
    if len(some) <= count:
        return some + [t for t in order if t not in some][: count - len(some)]
    taken: list[int] = []
    while len(taken) < count:
        for t in some:
            if len(taken) < count and t not in taken and all(abs(time[t] - time[o]) >= apart for o in taken):
                taken.append(t)
        apart /= 2
    return taken
