"""What asks in a prompt: rows of it for decoder methods, one vector for vision methods."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_compress.signals import DecoderView, Tokens


def behind_images(view: DecoderView) -> Tensor:
    """(B, S) bool: the rows of text of each prompt behind its last visual row; without any, the last row of the prompt.

    In training, where every row that precedes an answer speaks, text between answers asks too.
    """
    seen = (view.visual * view.first).amax(1, keepdim=True)
    asks = view.prompt & ~view.visual & (view.first > seen)
    return asks | (view.prompt & (view.last == 0) & ~asks.any(1, keepdim=True))


def asked(tokens: Tokens) -> Tensor:
    """(n, D): the mean of the embedded text behind each image, zero where there is none; for methods that read it."""
    text, real = tokens.question
    return (text * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)


def of_sample(view: DecoderView, name: str) -> list[Any]:
    """What the memory holds of each sample, the same on all of its rows and not negative; 0 where it has no row."""
    return (view.memory[name] * view.valid).amax(1).tolist()
