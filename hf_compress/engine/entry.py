"""How rows enter the language model: which of them, at which positions, under which mask; and the way back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.engine import packing
from hf_compress.engine.book import Placement
from hf_compress.engine.context import Context
from hf_compress.engine.inputs import check_fillers
from hf_compress.engine.masks import cut_masks, layer_mask, slot_mask
from hf_compress.engine.seams import rewrite
from hf_compress.engine.state import Forward
from hf_compress.layout import Layout, NextRows
from hf_compress.signals import Assignment
from hf_compress.stores import layout_of
from hf_compress.tensors.rows import compact, take


def find_packing(context: Context, now: Forward, kw: dict[str, Any]) -> packing.Packing | None:
    """How the model itself will read its rows; None: every row as one sample.

    Ready-made masks say it of every kernel. Else transformers looks at the position ids of text where there is neither
    a cache nor a 2-D mask: a step other than 1 begins a sample. Flash attention also takes the lengths of the samples.

    Args:
        kw: arguments of the language model, by name.
    """
    config, mrope = context.decoder.config, context.adapter.positions == "original"
    mask, lengths, (B, q) = kw.get("attention_mask"), kw.get("cu_seq_lens_q"), now.given.size
    own = now.given.inputs.get("attention_mask")
    asked = now.given.inputs.get("position_ids") is not None or lengths is not None
    if now.given.past or q < 2 or not (asked or (own is not None and now.given.ready_made)):
        return None
    if now.given.ready_made:
        return packing.of_mask(mask, B) if now.given.mask is None else None  # what is made of a 2-D mask packs nothing
    flash, text = "flash" in config._attn_implementation, _text(kw.get("position_ids"), mrope)
    if flash and B == 1 and lengths is not None:
        first = torch.zeros(1, q, dtype=torch.bool, device=lengths.device)
        first[0, lengths[:-1].long()] = True
        return packing.of_firsts(first, flash=True)
    padded = now.given.mask is not None and not (flash and bool(now.given.mask.all()))
    if text is None or padded or (B > 1 if flash else now.given.cache is not None):
        return None
    first = text == text.min() if flash else F.pad(text.diff(dim=-1) != 1, (1, 0), value=True)
    return packing.of_firsts(first.expand(B, q), flash=flash)


def _text(positions: Tensor | None, mrope: bool) -> Tensor | None:
    """(B or 1, q) position ids that count tokens; None: there are only those of axes."""
    if positions is None or positions.ndim == 2:
        return None if mrope else positions
    return positions[0] if len(positions) == 4 else None


def cut(
    context: Context,
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
    x, given = kw["inputs_embeds"], now.given
    found.fill(x)  # the model has just made it, of embeddings and features
    keep = found.keep if valid is None else found.keep & valid
    gone = ~keep if valid is None else valid & ~keep
    rows, alive = compact(keep)
    now.rows.layout = whole(now, valid, removed, images, found.image)
    kw["inputs_embeds"] = rewrite(now, x, Assignment(rows, valid=alive))
    now.rows.cut = None  # masks and rotary tables will be made for what is left
    at, position = now.rows.layout, kw.get("position_ids")
    if position is None:
        position = at.index
    else:
        position = position.expand(*position.shape[:-2], *given.size)
        position = position.gather(-1, rows.expand(*position.shape[:-2], *rows.shape))
    if context.renumber:  # less what was removed before: right for padded rows and one-based positions too
        so_far = gone.cumsum(1)
        shift = removed[:, None] + so_far.gather(1, rows)
        own = shift if given.packing is None else given.packing.total(gone.long()).gather(1, rows)
        position, removed = (position - own).clamp(min=0), removed + so_far[:, -1]
        if (step := context.step) is not None:
            if given.packing is not None:
                raise ValueError(f"positions={step}: samples packed into one row lie whole positions apart; pad them")
            visual = (found.image.gather(1, rows) >= 0) & alive
            position, saved = stepped(position, visual, *step)
            removed = removed + saved
        now.rows.layout = Layout(at.index, at.index - shift, at.image, at.valid, removed, at.seen, images=images)
    kw["position_ids"] = position
    if now.given.ready_made:
        window = getattr(context.decoder.config, "sliding_window", None) if context.renumber else None
        kw["attention_mask"] = cut_masks(kw["attention_mask"], rows, alive, window)
    else:
        kw["attention_mask"] = _mask(context, now, alive, x.dtype)
    if context.adapter.states:
        check_fillers(context, now, alive, kw["attention_mask"])
    if now.given.packing is not None:
        kw.update(now.given.packing.arguments(rows, kw))
    context.adapter.cut_extras(kw, keep, rows, alive)


def stepped(position: Tensor, visual: Tensor, apart: float, share: int = 1) -> tuple[Tensor, Tensor]:
    """Consecutive positions (B, S) with `visual` rows closer, and (B,) int64 by how much what follows is nearer.

    A run of n visual rows behind a row at p lies at p + apart, ..., p + n * apart, of rows that `share` positions at so
    many fewer, and text goes on at ceil of the last one + 1.
    """
    passed = visual.long().cumsum(1)
    nth = passed - passed.masked_fill(visual, 0).cummax(1).values  # in its run, from 1; 0 on text
    last, place = visual & ~F.pad(visual[:, 1:], (0, 1)), (nth + share - 1) // share
    saved = (nth - (place * apart - 1e-6).ceil().long()).masked_fill(~last, 0)
    before = saved.cumsum(1) - saved
    return position - before - nth + place * apart, saved.sum(1)


def _mask(context: Context, now: Forward, alive: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Always explicit: without a mask, gaps in position_ids are read as packed sequences."""
    if now.given.packing is not None:
        if now.given.packing.flash:
            return None
        config, eager = context.decoder.config, context.decoder.config._attn_implementation == "eager"
        at, sight, heads = now.rows.layout, now.given.packing.sight(now.rows.local), config.num_attention_heads
        return layer_mask(at, at, window=None, sight=sight, heads=heads, eager=eager, dtype=dtype)
    before = layout_of(now.given.cache) if now.given.past else None
    if before is None or before.per_head:
        return alive.long()
    return slot_mask(before.to(alive.device), None, alive.shape[1], alive)


def whole(now: Forward, valid: Tensor | None, removed: Tensor, images: Tensor, image: Tensor | None) -> Layout:
    """Of a forward of which nothing is cut; `valid` and `image` (B, q), None: all rows are real, text."""
    if image is None and (valid is None or bool(valid.all())):
        return NextRows(now.given.size[1], removed, now.given.past + now.given.size[1], images)
    index = now.given.past + now.rows.local
    image = torch.full_like(index, -1) if image is None else image
    every = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
    seen, known = now.given.past + now.given.size[1], True if valid is None else None
    return Layout(index, index - removed[:, None], image, every, removed, seen, known, images)


def at_every_row(x: Tensor, layout: Layout, now: Forward) -> Tensor:
    """(B, q, D): every row of the caller repeats its last surviving predecessor among the rows x (B, S, D).

    Where nothing before it in its sample survives, the first that does.
    """

    def slots() -> Tensor:
        local = layout.index - now.given.past
        if layout.all_valid:
            every = torch.arange(now.given.size[1], device=local.device).repeat(now.given.size[0], 1)
            at, first = torch.searchsorted(local.contiguous(), every, right=True) - 1, torch.zeros_like(local[:, :1])
        else:
            slot = torch.arange(local.shape[1], device=local.device).masked_fill(~layout.valid, -1)
            at = torch.full(now.given.size, -1, device=local.device).scatter(1, local, slot).cummax(1).values
            first = layout.valid.long().argmax(1, keepdim=True)  # padding and fillers may stand on either side
        if now.given.packing is not None:
            first = now.given.packing.first_slots(local, layout.valid)
        return at.maximum(first).clamp(max=local.shape[1] - 1)

    return take(x, layout.derive(("survivors", now.given.size), slots).to(x.device))
