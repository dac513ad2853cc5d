"""Contrastive decoding: the uncompressed model says what the compressed one, which sees less, would not say.

The parameters are shared; each of the two has a cache of its own. What the compressed model says is followed by what is
generated, token by token, as in the guidance without a classifier of transformers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from hf_compress.engine.context import Context
from hf_compress.engine.paired import Option, check_caches, check_features, own_cache
from hf_compress.engine.state import Contrasting, Run
from hf_compress.methods.base import check_number
from hf_compress.patches.versions import cache_of

WHAT = "contrasting"


def contrasting(context: Context, alpha: float, beta: float) -> contextlib.AbstractContextManager[Contrasting]:
    """Inside the block the compressed model is the negative of what generate() decodes with.

    Raises:
        ValueError: `alpha` is not a number of at least 0, `beta` not one above 0 and at most 1, or the methods change
            what both of them read.
    """
    check_number("alpha", alpha, 0)
    check_number("beta", beta, 0, 1, above=True)
    check_features(context, WHAT)
    return _contrasting(context, Contrasting(alpha, beta))


@contextlib.contextmanager
def _contrasting(context: Context, knobs: Contrasting) -> Iterator[Contrasting]:
    state = context.state
    before, state.beside = state.beside, knobs
    try:
        yield knobs
    finally:
        state.beside = before


def check_call(given: dict[str, Any], option: Option, assisted: str | None) -> None:
    """Raises ValueError if a generate() with these arguments cannot be followed by a second cache."""
    if (beams := option(given, "num_beams") or 1) != 1:
        raise ValueError(
            f"{WHAT}: num_beams={beams} reorders the cache of the uncompressed model alone; decode greedily, or sample"
        )
    check_caches(given, option, assisted, WHAT)


class Negative(LogitsProcessor):
    """What the compressed model says of the same tokens, against what the uncompressed one has just said.

    Attributes:
        inputs: what the uncompressed model was just called with, by name.
    """

    def __init__(self, context: Context, knobs: Contrasting, rows: int | None):
        self.context, self.knobs = context, knobs
        self.inputs: dict[str, Any] = {}
        self.run, self.cache = Run(rows=rows), own_cache(context)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) logits of the uncompressed model to those that are decoded with."""
        inputs = dict(self.inputs)
        if cache_of(inputs) is not None:
            inputs[self.context.cache_names[0]] = self.cache
        with self.context.state.scope() as state:
            state.run, state.forward, state.prepared = None, None, self.run
            out = self.context.model(**inputs)
        negative = (out[0] if isinstance(out, tuple) else out.logits)[:, -1]
        return contrast(scores, negative.to(scores), self.knobs.alpha, self.knobs.beta)


def contrast(scores: Tensor, negative: Tensor, alpha: float, beta: float) -> Tensor:
    """(1 + alpha) * l - alpha * l', and -inf for what is less than `beta` times as probable as the best of l.

    Args:
        scores: (B, V) logits l; negative: (B, V) those to stay away from, l'.
    """
    least = scores.amax(-1, keepdim=True) + math.log(beta)
    return ((1 + alpha) * scores - alpha * negative).masked_fill(scores < least, -torch.inf)
