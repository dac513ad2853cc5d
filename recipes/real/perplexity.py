"""How likely a real text still is behind a context whose cache was compressed."""

from __future__ import annotations

from typing import Any

import torch

from hf_compress.patches.versions import cache_name, cache_of


@torch.inference_mode()
def likelihood(model: Any, context: torch.Tensor, after: torch.Tensor) -> float:
    """Mean logarithm of the probability of every token of `after` but the first, given all before it.

    Args:
        context: (1, L) tokens, which are read in one call; a compressed model keeps less of them.
        after: (1, M) tokens, read in a second call from the cache of the first.
    """
    cache = cache_of(model(context, use_cache=True, logits_to_keep=1))
    logits = model(after, use_cache=True, **{cache_name(model): cache}).logits[0, :-1].float()
    return float(logits.log_softmax(-1).gather(1, after[0, 1:, None]).mean())
