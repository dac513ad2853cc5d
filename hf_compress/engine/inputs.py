"""What a forward of a compressed model may be passed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hf_compress.stores import ours

if TYPE_CHECKING:
    from hf_compress.engine.runtime import Compression

_PER_ROW = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")


def check(owner: Compression, inputs: dict[str, Any]) -> None:
    """Raises ValueError where what a forward was passed cannot go with the compression of its model."""
    model, stages = owner.model, owner.stages
    if (cache := inputs.get("past_key_values")) is not None:
        ours(cache, owner.owner)
    if owner.policy is not None and not owner.uses_cache(inputs) and not model.training:
        raise ValueError(
            f"use_cache=False (argument or config): method={stages['cache'].name!r} compresses the KV cache "
            "and can do nothing without one; call with use_cache=True, or compress another stage"
        )
    places = {n: t.device for n in _PER_ROW if torch.is_tensor(t := inputs.get(n))}
    if len(set(places.values())) > 1 and not hasattr(model, "_hf_hook"):  # accelerate would move them
        raise ValueError(f"{type(model).__name__}: inputs lie on different devices, {places}; move them to one")
    pixels = inputs.get("pixel_values")
    if torch.is_tensor(pixels) and not pixels.is_floating_point():
        raise ValueError(
            f"{type(model).__name__}: pixel_values has dtype {pixels.dtype}; pass what the model's processor "
            "gives (normalised floats)"
        )
    videos = inputs.get("pixel_values_videos") is not None or (inputs.get("mm_encoder_outputs") or {}).get("video")
    if owner.prompt.images and videos and "video" not in owner.adapter.modalities:
        stage = stages.get("vision") or stages["decoder"]
        raise ValueError(
            f"pixel_values_videos: on {type(model).__name__} method={stage.name!r} compresses images only; "
            "pass images, or decompress() for this call (cache methods take videos as they are)"
        )
    if owner.prompt.images and inputs.get("input_ids") is None and inputs.get("inputs_embeds") is not None:
        stage = stages.get("vision") or stages["decoder"]
        raise ValueError(
            f"inputs_embeds without input_ids: method={stage.name!r} finds visual tokens by their placeholder ids; "
            "pass input_ids and pixel_values"
        )
