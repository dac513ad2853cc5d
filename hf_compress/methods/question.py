"""Which rows of a prompt ask: what several decoder methods take for its instruction."""

from __future__ import annotations

from torch import Tensor

from hf_compress.signals import DecoderView


def behind_images(view: DecoderView) -> Tensor:
    """(B, S) bool: the rows of text of each prompt behind its last visual row; without any, the last row of the prompt.

    In training, where every row that precedes an answer speaks, text between answers asks too.
    """
    seen = (view.visual * view.first).amax(1, keepdim=True)
    asks = view.prompt & ~view.visual & (view.first > seen)
    return asks | (view.prompt & (view.last == 0) & ~asks.any(1, keepdim=True))
