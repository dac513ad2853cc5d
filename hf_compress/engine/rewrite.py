"""The decision of the vision stage as a rewrite of the prompt, for caches that take whole prompts only."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_compress.engine.state import Forward
from hf_compress.layout import Layout, compact, take
from hf_compress.report import Recorder

if TYPE_CHECKING:
    from hf_compress.engine.runtime import Compression

PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids")


def shorten(owner: Compression, given: dict[str, Any], ids: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Arguments of `generate` with a shortened prompt and ready-made features, and the (B, L) keep mask.

    Rows of a ragged batch are padded at the left.
    """
    model = owner.model
    mask = given.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    out = {k: v for k, v in given.items() if k not in ("inputs", "pixel_values", "image_grid_thw", "image_sizes")}
    out.update(input_ids=ids, attention_mask=mask)
    if given.get("pixel_values") is None:
        return out, torch.ones_like(ids, dtype=torch.bool)
    encode = model.base_model.get_image_features
    wanted = ("pixel_values", "image_grid_thw", "image_sizes")
    with torch.no_grad():
        features = encode(**{k: given[k] for k in wanted if given.get(k) is not None}, return_dict=True)
        embeds = model.get_input_embeddings()(ids)
        visual = owner.prompt.visual(ids)
        embeds = embeds.masked_scatter(visual[..., None], torch.cat(list(features.pooler_output)).to(embeds))
        now = Forward(given, ids, mask)
        found = owner.prompt.locate(now, embeds)
        assert found is not None
        if found.merged is not None:
            b, col, vectors = found.merged
            embeds = embeds.index_put((b, col), vectors.to(embeds))
        positions = None
        if not owner.renumber:
            positions = model._prepare_position_ids_for_generation(ids, dict(given, input_ids=ids, attention_mask=mask))
        keep = found.keep & mask.bool()
        rows, alive = compact(keep)
        short = take(embeds, rows)
    now.layout = Layout(rows, rows, found.image.gather(1, rows), alive, rows.new_zeros(len(rows)), ids.shape[1])
    owner.recorder = Recorder(found, mask.bool(), len(owner.layers))
    owner.recorder.finish(now)
    for name in PER_TOKEN:
        if out.get(name) is not None:
            out[name] = out[name].gather(1, rows)
    out["attention_mask"] = out["attention_mask"] * alive
    if positions is not None:
        out["position_ids"] = positions.gather(-1, rows.expand(*positions.shape[:-1], -1))
    # the placeholders that stay, in (row, sequence) order, are what the model fills with features
    flat = short[visual.gather(1, rows) & alive]
    out["input_ids"] = out["input_ids"].masked_fill(~alive, owner.model.config.get_text_config().pad_token_id or 0)
    ready = copy.copy(features)
    ready.pooler_output = [flat]
    out["mm_encoder_outputs"] = {"image": ready}
    return out, keep
