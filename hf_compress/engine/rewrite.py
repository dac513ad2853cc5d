"""The decision of the vision stage as a rewrite of the prompt, for caches that take whole prompts only."""

from __future__ import annotations

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
    out = {k: v for k, v in given.items() if k != "inputs"}
    out["mm_encoder_outputs"] = dict(given.get("mm_encoder_outputs") or {})
    with torch.no_grad():
        # encodes images and videos and takes their arguments away, as generate itself would do
        out = model._prepare_multimodal_encoder_kwargs_for_generation(out)
        out.update(input_ids=ids, attention_mask=mask)
        encoded = out["mm_encoder_outputs"]
        if not any(encoded.get(m) is not None for m in owner.prompt.ids):
            return out, torch.ones_like(ids, dtype=torch.bool)
        embeds = model.get_input_embeddings()(ids)
        for modality, token in owner.prompt.ids.items():
            if encoded.get(modality) is not None:
                rows = torch.cat(owner.adapter.images(model, modality, encoded[modality], given))
                embeds = embeds.masked_scatter((ids == token)[..., None], rows.to(embeds))
        now = Forward(dict(given, mm_encoder_outputs=encoded), ids, mask)
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
    owner.recorder = Recorder(found.book, mask.bool(), len(owner.layers))
    owner.recorder.finish(now)
    for name in PER_TOKEN:
        if out.get(name) is not None:
            out[name] = out[name].gather(1, rows)
    out["attention_mask"] = out["attention_mask"] * alive
    if positions is not None:
        out["position_ids"] = positions.gather(-1, rows.expand(*positions.shape[:-1], -1))
    # the placeholders that stay, in (row, sequence) order, are what the model fills with features
    for modality, token in owner.prompt.ids.items():
        if encoded.get(modality) is not None:
            flat = short[(ids.gather(1, rows) == token) & alive]
            encoded[modality] = owner.adapter.refill(encoded[modality], flat, keep[ids == token])
    out["input_ids"] = out["input_ids"].masked_fill(~alive, owner.model.config.get_text_config().pad_token_id or 0)
    return out, keep
