"""Models that cannot be served, and why: what `compress` says about them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

_QUERIES = "its images are a fixed number of learned query tokens, from which nothing can be read off per patch"
_STATE = "some of its layers keep a recurrent or convolutional state instead of keys and values per token"
ENTRY_ONLY = "layers that keep a state have no entries to evict, and rows that leave between layers would stay in it"
_LATENT = (
    "its attention is latent (MLA): one low-rank vector per token stands for the keys and values of all heads, so "
    "there are none per head to rank, evict or pack, and the cache is small already"
)
_SHARED = "its later layers read the keys and values of earlier ones, and tokens have inputs for every layer"
_TIMM = f"its vision tower is a convolutional network of timm, without attention to read; {_SHARED}"
_CHUNKS = (
    "its layers see chunks of positions and scale queries by the rows that came before them, which a shortened prompt "
    "would move, and its tiles have separators that do not tell where a picture ends"
)

UNSUPPORTED = {
    "mllama": "its images enter by cross-attention, so the prompt holds no visual tokens",
    "blip-2": _QUERIES,
    "instructblip": _QUERIES,
    "instructblipvideo": _QUERIES,
    "idefics2": "its perceiver resamples every image to a fixed number of learned query tokens",
    "kosmos-2": "its resampler turns every image into a fixed number of learned query tokens",
    "florence2": "it is an encoder-decoder: visual tokens are read by cross-attention",
    "git": "it prepends image features that have no placeholders in input_ids",
    "phi4_multimodal": "its embedding layer places image features itself, out of reach of the forward of the model",
    "qwen3_next": _STATE,
    "qwen3_5_text": _STATE,
    "qwen3_5_moe_text": _STATE,
    "lfm2": _STATE,
    "lfm2_moe": _STATE,
    "mamba": _STATE,
    "mamba2": _STATE,
    "falcon_mamba": _STATE,
    "jamba": _STATE,
    "bamba": _STATE,
    "gemma3n": _TIMM,
    "gemma3n_text": _SHARED,
    "gemma4_text": _SHARED,
    "llama4": _CHUNKS,
    "llama4_text": _CHUNKS,
}

SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})  # they keep keys and values per token


def reason(config: Any, states: Collection[str] = (), around: Collection[str] = ()) -> str | None:
    """Why a model of this configuration cannot be served; None if nothing is known against it.

    Latent attention is recognised by what the configuration says, under whatever name, inside multimodal models too.

    Args:
        states: types of layers that an adapter serves beside those that keep keys and values per token.
        around: types of language models that it serves, which alone are refused.
    """
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for kind in (config.model_type, text.model_type):
        if kind in UNSUPPORTED and kind not in around:
            return UNSUPPORTED[kind]
    if getattr(text, "kv_lora_rank", None):
        return _LATENT
    served = SERVED_LAYERS.union(states)
    others = set(getattr(text, "layer_types", None) or ()) - served
    if others:
        return f"some of its layers are of the type {' and '.join(sorted(others))}, served are {sorted(served)}"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder: the prompt is read by cross-attention and is not in the cache of the decoder"
    return None
