"""Models that cannot be served, and why: what `compress` says about them."""

from __future__ import annotations

from typing import Any

_QUERIES = "its images are a fixed number of learned query tokens, from which nothing can be read off per patch"
STATE = "some of its layers keep a recurrent or convolutional state instead of keys and values per token"
ENTRY_ONLY = "layers that keep a state have no entries to evict, and rows that leave between layers would stay in it"
_LATENT = (
    "its attention is latent (MLA): one low-rank vector per token stands for the keys and values of all heads, so "
    "there are none per head to rank, evict or pack, and the cache is small already"
)
_SHARED = "its layers share keys and values and take inputs per token and layer, which cannot be cut yet"

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
    "qwen3_next": STATE,
    "qwen3_5_text": STATE,
    "qwen3_5_moe_text": STATE,
    "lfm2": STATE,
    "lfm2_moe": STATE,
    "mamba": STATE,
    "mamba2": STATE,
    "falcon_mamba": STATE,
    "jamba": STATE,
    "bamba": STATE,
    "gemma3n": _SHARED,
    "gemma3n_text": _SHARED,
    "gemma4": _SHARED,
    "gemma4_text": _SHARED,
    "llama4": "its layers mix chunked attention and complex rotary tables, which cannot be cut yet",
    "llama4_text": "its layers mix chunked attention and complex rotary tables, which cannot be cut yet",
}

SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})  # they keep keys and values per token


def reason(config: Any, states: frozenset[str] = frozenset()) -> str | None:
    """Why a model of this configuration cannot be served; None if nothing is known against it.

    Latent attention is recognised by what the configuration says, under whatever name, inside multimodal models too.

    Args:
        states: types of layers that an adapter serves beside those that keep keys and values per token.
    """
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for kind in (config.model_type, text.model_type):
        why = UNSUPPORTED.get(kind)
        if why is not None and not (states and why == STATE):
            return why
    if getattr(text, "kv_lora_rank", None):
        return _LATENT
    served = SERVED_LAYERS | states
    others = set(getattr(text, "layer_types", None) or ()) - served
    if others:
        return f"some of its layers are of the type {' and '.join(sorted(others))}, served are {sorted(served)}"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder: the prompt is read by cross-attention and is not in the cache of the decoder"
    return None
