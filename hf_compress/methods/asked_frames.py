"""Which frames of a video the rest of the prompt is about: what several methods score frames by."""

from __future__ import annotations

from torch import Tensor

from hf_compress.signals import Tokens


def looked_at(tokens: Tokens, layer: int) -> Tensor:
    """(n, T) fp32: the share of its attention that the text behind the video gives to each frame in a layer.

    Mean over heads and rows; 0 where no text follows. See `Tokens.looked_at`.
    """
    given = tokens.looked_at(layer, "text").mean(1)
    return given.unflatten(1, (len(tokens.grids), -1)).sum(-1)
