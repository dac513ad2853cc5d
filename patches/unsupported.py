"""Models that cannot be served, and why: what `compress` says about them."""

from __future__ import annotations

from typing import Any

_QUERIES = "its images are a fixed number of learned query tokens, from which nothing can be read off per patch"
_STATE = "some of its layers keep a recurrent or convolutional state instead of keys and values per token"
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
    "qwen3_next": _STATE,
    "qwen3_5": _STATE,
    "qwen3_5_text": _STATE,
    "qwen3_5_moe": _STATE,
    "qwen3_5_moe_text": _STATE,
    "lfm2": _STATE,
    "lfm2_moe": _STATE,
    "lfm2_vl": _STATE,
    "mamba": _STATE,
    "mamba2": _STATE,
    "falcon_mamba": _STATE,
    "jamba": _STATE,
    "bamba": _STATE,
    "gemma3n": _SHARED,
    "gemma3n_text": _SHARED,
    "gemma4": _SHARED,
    "gemma4_text": _SHARED,
    "llama4": "its layers mix chunked attention and complex rotary tables, which cannot be cut yet",
    "llama4_text": "its layers mix chunked attention and complex rotary tables, which cannot be cut yet",
}

SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})  # they keep keys and values per token


def reason(config: Any) -> str | None:
    """Why a model of this configuration cannot be served; None if nothing is known against it.

    Latent attention is recognised by what the configuration says, under whatever name, inside multimodal models too.
    """
    if config is None:
        return None
    if config.model_type in UNSUPPORTED:
        return UNSUPPORTED[config.model_type]
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text.model_type in UNSUPPORTED:
        return UNSUPPORTED[text.model_type]
    if getattr(text, "kv_lora_rank", None):
        return _LATENT
    others = set(getattr(text, "layer_types", None) or ()) - SERVED_LAYERS
    if others:
        return f"some of its layers are of the type {' and '.join(sorted(others))}, served are {sorted(SERVED_LAYERS)}"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder: the prompt is read by cross-attention and is not in the cache of the decoder"
    return None
