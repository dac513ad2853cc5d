"""What a forward of a compressed model may be passed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.engine import packing, trained
from hf_compress.engine.context import Context
from hf_compress.engine.state import Forward
from hf_compress.patches import versions
from hf_compress.stores import layout_of, ours

_PER_ROW = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")


def check(context: Context, inputs: dict[str, Any]) -> None:
    """Raises ValueError where what a forward was passed cannot go with the compression of its model."""
    model, stages = context.model, context.stages
    trained.check_trained(model, stages, context.trained)
    if (cache := versions.cache_of(inputs)) is not None:
        ours(cache, context.name)
    if context.policy is not None and not context.uses_cache(inputs) and not model.training:
        raise ValueError(
            f"use_cache=False (argument or config): method={stages['cache'].name!r} compresses the KV cache "
            "and can do nothing without one; call with use_cache=True, or compress another stage"
        )
    trims = context.decoder_method is not None and context.decoder_method.trims
    if trims and context.state.run is not None and not context.uses_cache(inputs) and stages["decoder"].ratio != 0:
        raise ValueError(
            f"use_cache=False (argument or config): method={stages['decoder'].name!r} takes rows out of the caches of "
            "earlier layers, and without a cache what is generated would see them; generate with use_cache=True"
        )
    again = versions.checkpoints(context.decoder)
    reader = None if context.policy is None else context.policy.reader
    if again and reader is not None and (reader.attends or reader.chooses):
        raise ValueError(
            f"gradient checkpointing: method={stages['cache'].name!r} takes part in the attention, which cannot be run "
            "again in backward; train without gradient checkpointing, or with another method"
        )
    method = context.decoder_method
    if again and method is not None and (method.picks or (method.waits and method.gates == "mlp")):
        raise ValueError(
            f"gradient checkpointing: method={stages['decoder'].name!r} takes part in what layers do inside, which "
            "cannot be run again in backward; train without gradient checkpointing, or with another method"
        )
    cached = context.uses_cache(inputs) and not again
    if context.policy is not None and cached and context.state.run is None:
        check_one_sample(context, inputs)
    places = {n: t.device for n in _PER_ROW if torch.is_tensor(t := inputs.get(n))}
    if len(set(places.values())) > 1 and not hasattr(model, "_hf_hook"):  # accelerate would move them
        raise ValueError(f"{type(model).__name__}: inputs lie on different devices, {places}; move them to one")
    check_pixels(model, inputs)
    videos = inputs.get("pixel_values_videos") is not None or (inputs.get("mm_encoder_outputs") or {}).get("video")
    if context.visual.images and videos and "video" not in context.adapter.modalities:
        stage = stages.get("vision") or stages["decoder"]
        raise ValueError(
            f"pixel_values_videos: on {type(model).__name__} method={stage.name!r} compresses images only; "
            "pass images, or decompress() for this call (cache methods take videos as they are)"
        )
    check_ids(context, inputs)


def check_pixels(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raises ValueError where pixels are no floats: a tower would take them for what they are not."""
    pixels = inputs.get("pixel_values")
    if torch.is_tensor(pixels) and not pixels.is_floating_point():
        raise ValueError(
            f"{type(model).__name__}: pixel_values has dtype {pixels.dtype}; pass what the model's processor "
            "gives (normalised floats)"
        )


def check_ids(context: Context, inputs: dict[str, Any]) -> None:
    """Raises ValueError where visual tokens cannot be found because embeddings were passed in place of ids."""
    if context.visual.images and inputs.get("input_ids") is None and inputs.get("inputs_embeds") is not None:
        stages = context.stages
        stage = stages.get("vision") or stages["decoder"]
        raise ValueError(
            f"inputs_embeds without input_ids: method={stage.name!r} finds visual tokens by their placeholder ids; "
            "pass input_ids and pixel_values"
        )


def check_one_sample(context: Context, inputs: dict[str, Any]) -> None:
    """Raises ValueError where rows that are to be continued or stored hold several samples each."""
    positions, mask, lengths = (inputs.get(n) for n in ("position_ids", "attention_mask", "cu_seq_lens_q"))
    flat = mask if torch.is_tensor(mask) and mask.ndim == 2 else None
    if lengths is not None and len(lengths) > 2:
        what = f"cu_seq_lens_q: {len(lengths) - 1} samples are packed into the batch"
    elif packing.starts_anew(positions, flat):
        what = "position_ids: they start anew inside a row, so that it holds several samples"
    elif torch.is_tensor(mask) and mask.ndim == 4 and mask.shape[2] == mask.shape[3] and packing.of_mask(mask, 1):
        what = "attention_mask: some rows do not see the row before them, so that a row holds several samples"
    else:
        return
    name = "/".join(stage.name for stage in context.stages.values())
    raise ValueError(
        f"{what}; method={name!r} compresses prompts of one sample per row here. Pad the samples; pack them only where "
        "nothing is cached (use_cache=False, vision and decoder methods)"
    )


def check_apart(context: Context, now: Forward) -> None:
    """Raises ValueError where rows that will be cut hold samples that the model itself would let read each other."""
    given = now.given
    if given.packing is not None and context.adapter.states:
        raise ValueError(
            f"attention_mask (or position_ids): layers of {type(context.model).__name__} that keep a state would carry "
            "it over to rows that are not to see the row before them; pad the samples, under a 2-D mask"
        )
    if given.packing is not None or given.ready_made or not context.visual.images or context.state.run is not None:
        return
    lengths = given.inputs.get("cu_seq_lens_q")
    if lengths is not None and len(lengths) > 2 and "flash" in context.decoder.config._attn_implementation:
        raise ValueError(
            f"cu_seq_lens_q: lengths of {len(lengths) - 1} samples in {given.size[0]} rows; pack all of them into one, "
            "without padding"
        )
    if packing.starts_anew(given.inputs.get("position_ids"), given.mask):
        raise ValueError(
            "position_ids: they start anew inside a row, but the model would let the samples read each other; pass "
            "use_cache=False and no attention_mask (or a 4-D one that keeps them apart), on M-RoPE 4 rows of positions "
            "of which the first counts tokens"
        )


def check_fillers(context: Context, now: Forward, alive: Tensor, mask: Any) -> None:
    """Raises ValueError where slots that only fill up would change what layers with a state remember.

    In front of an empty state they do nothing as long as a mask of the rows names them, which transformers does not
    look at where there is a single row.

    Args:
        alive: (B, L) bool, False on them; mask: what the language model will be given.
    """
    fills = ~alive.all(1)
    if not bool(fills.any()):
        return
    kind, before = type(context.model).__name__, layout_of(now.given.cache) if now.given.past else None
    hint = "feed the samples one by one, or with equally many tokens that stay"
    if before is not None and bool((fills & before.valid.any(-1).to(fills.device)).any()):
        raise ValueError(
            f"past_key_values (or prefill_chunk_size): {(~alive).sum(1).tolist()} slots per sample would only fill up "
            f"behind what the layers of {kind} that keep a state have read, and change it; {hint}"
        )
    if alive.shape[1] == 1 or not (isinstance(mask, dict) or (torch.is_tensor(mask) and mask.ndim == 2)):
        raise ValueError(
            f"attention_mask: the layers of {kind} that keep a state would read {(~alive).sum(1).tolist()} slots per "
            f"sample that only fill up, as no 2-D mask of several rows hides them; pass a 2-D mask, or {hint}"
        )
