"""What asks in a prompt: rows of it for decoder methods, one vector for vision methods."""

from __future__ import annotations

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
