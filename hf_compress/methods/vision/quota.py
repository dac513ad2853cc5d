"""QuoTA: frames keep tokens by how much they have to do with the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_compress.budget import shares
from hf_compress.methods.asked_frames import looked_at
from hf_compress.methods.base import VisionMethod, check_choice, check_count, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.cells import cells
from hf_compress.tensors.merge import by_owner
from hf_compress.tensors.select import identity, spaced_grid

__all__ = ["QuoTA"]


@register("quota", stage="vision", kind="video", paper="arXiv:2503.08689", needs={"visual", "video", "columns"})
@dataclass
class QuoTA(VisionMethod):
    """The question shares the tokens of a video out among its frames, each of which is made as much smaller.

    1. The layers of the language model up to `layer` run over the whole prompt: p_t is the share of its attention that
    the text behind the video gives to frame t there, mean over heads and rows. 2. The K tokens are shared over the
    frames in proportion to p_t ** `power`, by largest remainders and none above its N tokens; alike where no text
    follows. 3. A frame that gets fewer than N is cut into as many cells, each the mean of its tokens in the slot of the
    middle one (`resize="cells"`), or keeps evenly spaced tokens (`"spaced"`); with none it is gone. `ratio` is the
    fraction of the whole video. Cost: `layer` + 1 layers of the language model over the whole prompt.

    An image is one frame, made smaller.

    Source: "QuoTA: Query-oriented Token Assignment via CoT Query Decoupling for Long Video Comprehension",
    arXiv:2503.08689. There p_t is the probability with which a second model, Qwen2-VL-2B, says that a frame holds what
    the question needs, asked once per frame and after the question was taken apart; here the model's own first layers
    stand in for it. The authors resize by bilinear interpolation to grids nearly square, which loses up to 2 sqrt(n)
    tokens of n, and truncate shares; here counts are exact. Choosing evenly spaced tokens is among their variants.

    Args:
        layer: whose attention scores the frames, counted from 0.
        power: the larger, the more of the budget goes to the frames that are looked at most.
        resize: "cells" or "spaced".

    Raises:
        ValueError: `layer` is not an integer of at least 0, `power` not a number of at least 0, `resize` none of its
            values.
    """

    layer: int = 2
    power: float = 2.0
    resize: str = "cells"

    scope: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("layer", self.layer, least=0)
        check_number("power", self.power, 0)
        check_choice("resize", self.resize, ("cells", "spaced"))

    def reads(self, depth: int) -> set[Read]:
        return {Read("layer", self.layer, "attention")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Kept tokens (n, K), and groups (n, T * N) with plain means where tokens are merged."""
        n, frames, (h, w) = len(tokens), len(tokens.grids), tokens.grids[0]
        if keep == tokens.count:
            return Assignment(identity(n, keep, tokens.device))
        seen = looked_at(tokens, self.layer)
        most = seen.amax(1, keepdim=True).clamp(min=torch.finfo(seen.dtype).tiny)  # powers of small shares are nothing
        weights = ((seen / most) ** self.power).tolist()
        counts = [shares(keep, mine, [h * w] * frames) for mine in weights]
        owner = torch.stack([torch.stack([self.frame(h, w, k) for k in mine]) for mine in counts])
        owner += torch.where(owner < 0, 0, h * w * torch.arange(frames)[:, None])
        groups, kept = by_owner(owner.flatten(1).to(tokens.device))
        return Assignment(kept, groups if self.resize == "cells" else None)

    def frame(self, h: int, w: int, count: int) -> Tensor:
        """(N,): of each token of a frame the one whose slot it goes to, -1: none."""
        if count and self.resize == "cells":
            layout = cells(h, w, count)
            return layout.centres[layout.groups]
        out = torch.full((h * w,), -1)
        if count:
            at = torch.tensor(spaced_grid(h, w, count))
            out[at] = at
        return out
