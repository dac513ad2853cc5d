"""How rows enter the language model: which of them, at which positions, under which mask; and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_compress.engine.layers import check_labels
from hf_compress.engine.masks import cut_masks, layer_mask, slot_mask
from hf_compress.engine.prompt import Placement
from hf_compress.engine.state import Forward
from hf_compress.layout import Layout, NextRows, compact, take
from hf_compress.stores import HeldLayer

if TYPE_CHECKING:
    from hf_compress.engine.runtime import Compression


def cut(
    owner: Compression,
    now: Forward,
    kw: dict[str, Any],
    valid: Tensor | None,
    removed: Tensor,
    images: Tensor,
    found: Placement,
) -> None:
    """Gather every per-token input of the language model; from here on all layers are short.

    `removed` as before this forward, `images` behind it.
    """
    x = kw["inputs_embeds"]
    B, q = now.size
    if found.merged is not None:
        b, col, vectors = found.merged
        x.index_put_((b, col), vectors.to(x))  # the model has just made it, of embeddings and features
    keep = found.keep if valid is None else found.keep & valid
    gone = ~keep if valid is None else valid & ~keep
    check_labels(now, gone)
    rows, alive = compact(keep)
    index, position = now.past + rows, kw.get("position_ids")
    if position is None:
        position = index
    else:
        position = position.expand(*position.shape[:-2], B, q)
        position = position.gather(-1, rows.expand(*position.shape[:-2], *rows.shape))
    shift = torch.zeros_like(rows)
    if owner.renumber:  # less what was removed before: right for padded rows and one-based positions too
        so_far = gone.cumsum(1)
        shift = removed[:, None] + so_far.gather(1, rows)
        own = shift if now.packing is None else now.packing.total(gone.long()).gather(1, rows)
        position = (position - own).clamp(min=0)
        removed = removed + so_far[:, -1]
    kw["inputs_embeds"], kw["position_ids"] = take(x, rows), position
    now.local, now.moved = rows, True
    image = found.image.gather(1, rows)
    now.layout = Layout(index, index - shift, image, alive, removed, now.past + q, images=images)
    if now.ready_made:
        window = getattr(owner.decoder.config, "sliding_window", None) if owner.renumber else None
        kw["attention_mask"] = cut_masks(kw["attention_mask"], rows, alive, window)
    else:
        kw["attention_mask"] = _mask(owner, now, alive, x.dtype)
    if now.packing is not None:
        kw.update(now.packing.arguments(rows, kw))
    owner.adapter.cut_extras(kw, keep, rows, alive)


def _mask(owner: Compression, now: Forward, alive: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Always explicit: without a mask, gaps in position_ids are read as packed sequences."""
    if now.packing is not None:
        if now.packing.flash:
            return None
        config, eager = owner.decoder.config, owner.decoder.config._attn_implementation == "eager"
        at, sight, heads = now.layout, now.packing.sight(now.local), config.num_attention_heads
        return layer_mask(at, at, window=None, sight=sight, heads=heads, eager=eager, dtype=dtype)
    before = layout_of(now.cache) if now.past else None
    if before is None or before.per_head:
        return alive.long()
    return slot_mask(before.to(alive.device), None, alive.shape[1], alive)


def whole(now: Forward, valid: Tensor | None, removed: Tensor, images: Tensor, image: Tensor | None) -> Layout:
    """Of a forward of which nothing is cut; `valid` and `image` (B, q), None: all rows are real, text."""
    if image is None and (valid is None or bool(valid.all())):
        return NextRows(now.size[1], removed, now.past + now.size[1], images)
    index = now.past + now.local
    image = torch.full_like(index, -1) if image is None else image
    every = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
    seen, known = now.past + now.size[1], True if valid is None else None
    return Layout(index, index - removed[:, None], image, every, removed, seen, known, images)


def layout_of(cache: Any) -> Layout | None:
    """Layout of a layer of a compressed cache: of one that sees everything, if there is one."""
    layers = getattr(cache, "layers", None)
    if not layers or not isinstance(layers[0], HeldLayer):
        return None
    return next((layer for layer in layers if layer.window is None), layers[0]).layout


def at_every_row(x: Tensor, layout: Layout, now: Forward) -> Tensor:
    """(B, q, D): every row of the caller repeats its last surviving predecessor among the rows x (B, S, D).

    Where nothing before it in its sample survives, the first that does.
    """

    def slots() -> Tensor:
        local = layout.index - now.past
        if layout.all_valid:
            every = torch.arange(now.size[1], device=local.device).repeat(now.size[0], 1)
            at, first = torch.searchsorted(local.contiguous(), every, right=True) - 1, torch.zeros_like(local[:, :1])
        else:
            slot = torch.arange(local.shape[1], device=local.device).masked_fill(~layout.valid, -1)
            at = torch.full(now.size, -1, device=local.device).scatter(1, local, slot).cummax(1).values
            first = layout.valid.long().argmax(1, keepdim=True)  # padding and fillers may stand on either side
        if now.packing is not None:
            first = now.packing.first_slots(local, layout.valid)
        return at.maximum(first).clamp(max=local.shape[1] - 1)

    return take(x, layout.derive(("survivors", now.size), slots).to(x.device))
