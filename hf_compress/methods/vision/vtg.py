"""VTG-LLM's slots: vectors that gather what they look for over all frames of a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_compress.methods.base import VisionMethod, check_count
from hf_compress.methods.cells import check_queries
from hf_compress.modules.frames import Frames
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.select import spaced

__all__ = ["VTG"]


@register("vtg", stage="vision", kind="trained", paper="arXiv:2405.13382", needs={"visual"})
@dataclass
class VTG(VisionMethod):
    """The first K of many slots, each a mean of all tokens of a video by what it looks for.

    A trained vector per frame, `frames` of them, stretched to the length of the video, zeros at first, is added to the
    projected tokens (n, T * N, D): where in time they are. A slot is a column of a trained matrix W; its shares are
    softmax(LN(x) W) over the tokens, its output their mean of x. Outputs have no order in time; they stand at evenly
    spaced places of the video. `ratio` is the fraction of the whole video; trained with another K at every step
    (`train.Sampled`), the first slots learn what matters most. Cost O(T * N * K * D). An image is one frame.

    Source: "VTG-LLM: Integrating Timestamp Knowledge into Video LLMs for Enhanced Video Temporal Grounding", AAAI 2025,
    arXiv:2405.13382 (gyxxyg/VTG-LLM). There W reads tokens as they are, K is that of training (256 slots for 96 frames
    of 32 tokens), and moments are told in seconds, in the prompt too, by tokens of their own; here W reads them normed,
    so that a new one does not hang on their scale, and vectors tell what part of the video a frame is.

    Args:
        slots: how many there are, and the largest K.
        frames: learnt vectors of time.

    Raises:
        ValueError: `slots` or `frames` is no integer of at least 1, or `positions` none of its values. Also: a budget
            of more tokens than slots.
    """

    slots: int = 256
    frames: int = 96

    scope: ClassVar[str] = "video"
    needs_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("slots", self.slots)
        check_count("frames", self.frames)

    def check(self, grid: tuple[int, int], keep: int) -> None:
        """Refuses more tokens than slots, unless all stay."""
        check_queries(self.slots, grid, keep, "slots")

    def module(self, model: nn.Module) -> nn.Module:
        """The slots, and the vectors of the frames."""
        return Slots(model.config.get_text_config().hidden_size, self.slots, self.frames)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Evenly spaced tokens, (n, K): where the outputs stand in the prompt."""
        h, w = tokens.grids[0]
        self.check((len(tokens.grids) * h, w), keep)
        return Assignment(torch.tensor(spaced(tokens.count, keep), device=tokens.device).repeat(len(tokens), 1))

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        assert tokens.module is not None
        sizes, keep = [h * w for h, w in tokens.grids], assignment.kept.shape[1]
        out: Tensor = tokens.module(tokens.embeddings, sizes, keep)
        return out


class Slots(nn.Module):
    """See `VTG`."""

    def __init__(self, width: int, slots: int, frames: int):
        super().__init__()
        self.time, self.norm = Frames(frames, width), nn.LayerNorm(width)
        self.slots = nn.Parameter(nn.init.normal_(torch.empty(width, slots), std=width**-0.5))

    def forward(self, x: Tensor, sizes: Sequence[int], keep: int) -> Tensor:
        """(n, N, D) of frames of so many tokens to (n, keep, D)."""
        x = x + self.time(sizes).to(x.dtype)
        return gathered(x, self.norm(x), self.slots[:, :keep])


def gathered(x: Tensor, key: Tensor, slots: Tensor) -> Tensor:
    """(n, K, D): means of x (n, N, D), by the products of keys (n, N, C) and slots (C, K)."""
    return (key @ slots).softmax(1).mT @ x
