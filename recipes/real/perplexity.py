"""How likely a real text still is behind a context whose cache was compressed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

import hf_compress

BARE = "none"


@torch.inference_mode()
def likelihood(model: Any, context: torch.Tensor, after: torch.Tensor) -> float:
    """Mean logarithm of the probability of every token of `after` but the first, given all before it.

    Args:
        context: (1, L) tokens, which are read in one call; a compressed model keeps less of them.
        after: (1, M) tokens, read in a second call from the cache of the first.
    """
    cache = model(context, use_cache=True, logits_to_keep=1).past_key_values
    logits = model(after, past_key_values=cache, use_cache=True).logits
    return float(logits[0, :-1].log_softmax(-1).gather(1, after[0, 1:, None]).mean())


def perplexities(
    model: Any, texts: Sequence[torch.Tensor], context: int, methods: Sequence[str], ratio: float
) -> dict[str, float | str]:
    """exp of the mean over all texts, per method and of the model as it is; why, where a method cannot act on it.

    Args:
        texts: (1, more than `context` + 1) tokens each.
        context: so many of them are read before the compression.
        methods: of the cache stage. Those that draw are run with as many seeds as there are texts, one for each.
    """
    found: dict[str, float | str] = {}
    for name in [BARE, *methods]:
        values = []
        for number, ids in enumerate(texts):
            try:
                if name != BARE:
                    knobs = {"seed": number} if "seed" in hf_compress.methods()[name].knobs else {}
                    model.compress(name, ratio=ratio, **knobs)
            except (ValueError, NotImplementedError) as error:
                found[name] = str(error)
                break
            try:
                values.append(likelihood(model, ids[:, :context], ids[:, context:]))
            finally:
                if name != BARE:
                    model.decompress()
        else:
            found[name] = round(math.exp(-sum(values) / len(values)), 4)
            print(f"{name}: {found[name]:.2f}", flush=True)
    return found
