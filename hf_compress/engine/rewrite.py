"""The decision of the vision stage as a rewrite of the prompt, for caches that take whole prompts only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_compress.engine.context import Context
from hf_compress.engine.recorder import Recorder
from hf_compress.engine.state import Forward, Given
from hf_compress.layout import Layout
from hf_compress.tensors.rows import compact, take

PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids")


def shorten(context: Context, given: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """Arguments of `generate` with a shortened prompt and ready-made features.

    Rows of a ragged batch are padded at the left.
    """
    model = context.model
    if (step := context.step) is not None:
        raise ValueError(f"positions={step}: prompts of static caches count whole positions; use a dynamic cache")
    mask = given.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    out = {k: v for k, v in given.items() if k != "inputs"}
    out["mm_encoder_outputs"] = dict(given.get("mm_encoder_outputs") or {})
    with torch.no_grad():
        # encodes images and videos and takes their arguments away, as generate itself would do
        out = model._prepare_multimodal_encoder_kwargs_for_generation(out)
        out.update(input_ids=ids, attention_mask=mask)
        encoded = out["mm_encoder_outputs"]
        if not any(encoded.get(m) is not None for m in context.visual.ids):
            return out
        embeds = model.get_input_embeddings()(ids)
        for modality, token in context.visual.ids.items():
            if encoded.get(modality) is not None:
                rows = torch.cat(context.adapter.images(model, modality, encoded[modality], given))
                embeds = embeds.masked_scatter((ids == token)[..., None], rows.to(embeds))
        now = Forward(Given(dict(given, mm_encoder_outputs=encoded), ids, mask))
        found = context.visual.locate(now, embeds)
        assert found is not None
        if found.told is not None:
            raise ValueError(
                f"method={context.name!r} adds to the text of a prompt, which static caches are given as ids; use a "
                "dynamic cache"
            )
        found.fill(embeds)
        positions = None
        if not context.renumber:
            positions = model._prepare_position_ids_for_generation(ids, dict(given, input_ids=ids, attention_mask=mask))
        keep = found.keep & mask.bool()
        rows, alive = compact(keep)
        short = take(embeds, rows)
    layout = Layout(rows, rows, found.image.gather(1, rows), alive, rows.new_zeros(len(rows)), ids.shape[1])
    recorder = Recorder(found.book, mask.bool())
    recorder.finish([layout] * len(context.layers))
    assert context.state.run is not None
    context.state.run.recorder = recorder
    for name in PER_TOKEN:
        if out.get(name) is not None:
            out[name] = out[name].gather(1, rows)
    out["attention_mask"] = out["attention_mask"] * alive
    if positions is not None:
        out["position_ids"] = positions.gather(-1, rows.expand(*positions.shape[:-1], -1))
    # the placeholders that stay, in (row, sequence) order, are what the model fills with features
    for modality, token in context.visual.ids.items():
        if encoded.get(modality) is not None:
            flat = short[(ids.gather(1, rows) == token) & alive]
            encoded[modality] = context.adapter.refill(encoded[modality], flat, keep[ids == token])
    out["input_ids"] = out["input_ids"].masked_fill(~alive, context.model.config.get_text_config().pad_token_id or 0)
    return out


def whole_ids(short: dict[str, Any], ids: Tensor, width: int) -> None:
    """Show the whole prompt `ids` to what a caller has passed to look at ids, in place of a prompt of `width`."""
    if short.get("streamer") is not None:
        short["streamer"] = Streamed(short["streamer"], ids)
    if (allowed := short.get("prefix_allowed_tokens_fn")) is not None:
        short["prefix_allowed_tokens_fn"] = lambda b, row: allowed(b, torch.cat([ids[b].to(row.device), row[width:]]))
    for name in ("logits_processor", "stopping_criteria"):
        if short.get(name):
            short[name] = type(short[name])([Shown(each, ids, width) for each in short[name]])


class Shown:
    """A logits processor or stopping criterion that is shown the caller's prompt in place of the shortened one."""

    def __init__(self, inner: Any, ids: Tensor, width: int):
        self.inner, self.ids, self.width = inner, ids, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        """What `inner` says."""
        return self.inner(torch.cat([self.ids.to(input_ids.device), input_ids[:, self.width :]], 1), scores)


class Streamed:
    """A streamer that is shown the caller's prompt in place of the shortened one."""

    def __init__(self, streamer: Any, ids: Tensor):
        self.streamer, self.ids = streamer, ids

    def put(self, value: Tensor) -> None:
        """The first thing generate streams is the prompt."""
        if self.ids is not None:
            value, self.ids = self.ids.cpu(), None  # type: ignore[assignment]
        self.streamer.put(value)

    def end(self) -> None:
        """Passed on."""
        self.streamer.end()
