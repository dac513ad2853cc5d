"""Models that cannot be served, and why: what `compress` says about them."""

from __future__ import annotations

_QUERIES = "its images are a fixed number of learned query tokens, from which nothing can be read off per patch"
_STATE = "some of its layers keep a recurrent or convolutional state instead of keys and values per token"
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
