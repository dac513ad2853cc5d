"""Attention masks of one layer, from layouts alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_compress.layout import Layout
from hf_compress.patches.unsupported import SERVED_LAYERS


def visible(keys: Layout, queries: Layout, window: int | None, sight: Tensor | None) -> Tensor:
    """(B, 1 or Hkv, q, S) bool: which slots each query may see.

    Args:
        window: of a sliding layer, in the layout's positions.
        sight: (B, 1 or Hkv, q, S) bool, what of it each query may see at all; None: everything.
    """
    k, ok = (t if t.ndim == 3 else t[:, None] for t in (keys.position, keys.valid))
    q = queries.position[:, None, :, None]
    see = (k[:, :, None] <= q) & ok[:, :, None]
    if window is not None:
        see = see & (q - k[:, :, None] < window)
    if sight is not None:
        see = see & sight
    alone = ~queries.valid[:, None, :, None] & (k[:, :, None] == q)  # a filler row sees itself: no softmax of nothing
    return see | alone


def layer_mask(
    keys: Layout,
    queries: Layout,
    *,
    window: int | None,
    sight: Tensor | None,
    heads: int,
    eager: bool,
    dtype: torch.dtype,
) -> Tensor | None:
    """The mask in the form that sdpa (bool, or None where it is plain) or eager (additive) attention wants.

    `queries` are the newest slots of `keys`. `heads` is the number of query heads.
    """
    plain = sight is None and (window is None or keys.seen <= window)
    if not eager and keys.all_valid and plain and len(queries) in (1, len(keys)):
        return None  # a single query sees everything; a whole prompt is plain causal
    see = visible(keys, queries, window, sight)
    if see.shape[1] > 1:
        see = see.repeat_interleave(heads // see.shape[1], 1)
    if not eager:
        return see
    return torch.zeros(see.shape, dtype=dtype, device=see.device).masked_fill(~see, torch.finfo(dtype).min)


def both(mask: Tensor, sight: Tensor | None, heads: int) -> Tensor:
    """A ready-made (B, h, q, S) mask without what `sight` (B, 1 or Hkv, q, S) hides, for `heads` query heads."""
    if sight is None:
        return mask
    sight = sight.to(mask.device)
    sight = sight if sight.shape[1] == 1 else sight.repeat_interleave(heads // sight.shape[1], 1)
    return mask & sight if mask.dtype == torch.bool else mask.masked_fill(~sight, torch.finfo(mask.dtype).min)


def with_ahead(mask: Tensor, given: Tensor) -> Tensor:
    """A mask from layouts, and of a ready-made one what its queries see ahead of themselves (image blocks).

    Both are (B, h, q, past + q); the columns of the past may differ in number.
    """
    q = mask.shape[2]
    ahead = torch.ones(q, q, dtype=torch.bool, device=mask.device).triu(1)
    new, given = mask[..., -q:], given[..., -q:].to(mask.device)
    if mask.dtype == torch.bool:
        new = new | (given & ahead)
    else:
        new = torch.maximum(new, given.masked_fill(~ahead, torch.finfo(mask.dtype).min))
    return torch.cat([mask[..., :-q].expand(*new.shape[:2], -1, -1), new], -1)


def cut_masks(mask: Any, rows: Tensor, alive: Tensor, window: int | None) -> Any:
    """Ready-made masks (one, or one per kind of layer) cut to the rows of a shortened prompt.

    Those of layers that keep a state are (B, q) and say which rows are real; None: all of them.

    Args:
        window: width of sliding layers if survivors were renumbered: it is then measured between survivors.
    """
    if not isinstance(mask, dict):
        return cut_mask(mask, rows, alive)
    n = torch.arange(rows.shape[1], device=rows.device)
    causal = (n[:, None] >= n)[None, None]
    plain = None if bool(alive.all()) else cut_mask(causal, n.expand_as(rows), alive)  # what None stands for
    out = {
        kind: (plain if m is None else cut_mask(m, rows, alive)) if kind in SERVED_LAYERS else real_rows(m, rows, alive)
        for kind, m in mask.items()
    }
    sliding = out.get("sliding_attention")
    if window is not None and sliding is not None and "full_attention" in out:
        full = causal if out["full_attention"] is None else out["full_attention"]
        q, far = len(n), n[:, None] - n >= window
        near, least = full[..., -q:], False if full.dtype == torch.bool else torch.finfo(full.dtype).min
        near = near.masked_fill(far, least)
        new = torch.maximum(sliding[..., -q:], near)  # survivors only come nearer
        out["sliding_attention"] = torch.cat([sliding[..., :-q], new], -1)  # earlier turns: each layer knows its own
    return out


def real_rows(mask: Tensor | None, rows: Tensor, alive: Tensor) -> Tensor:
    """(B, L) int64: which of the rows that stay are real, by a mask (B, q) of all of them; None: all were."""
    return (alive if mask is None else alive & mask.gather(1, rows).bool()).long()


def cut_mask(mask: Tensor, rows: Tensor, valid: Tensor) -> Tensor:
    """Rows and columns of a ready-made (B, h, q, past + q) mask; filler slots, which it does not know, are hidden."""
    mask = mask.expand(rows.shape[0], -1, -1, -1)
    past, q = mask.shape[3] - mask.shape[2], rows.shape[1]
    earlier = torch.arange(past, device=rows.device).expand(len(rows), -1)  # slots of earlier turns stay
    mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    columns = torch.cat([earlier, past + rows], 1)
    mask = mask.gather(3, columns[:, None, None, :].expand(-1, mask.shape[1], q, -1))
    ok = valid[:, None, None, :] | torch.eye(q, dtype=torch.bool, device=mask.device)
    ok = torch.cat([ok.new_ones(*ok.shape[:3], past), ok], 3)
    return mask & ok if mask.dtype == torch.bool else mask.masked_fill(~ok, torch.finfo(mask.dtype).min)


def slot_mask(layout: Layout, mask: Tensor | None, q: int, new: Tensor | None = None) -> Tensor:
    """(B, seen + q) int64 mask whose columns [seen - held, seen) say which slots are real.

    transformers reads exactly these columns of the caller's mask for the slots of a cache that holds fewer than seen.
    """
    seen, held = layout.seen, len(layout)
    columns = torch.ones(layout.valid.shape[0], seen + q, dtype=torch.int64, device=layout.valid.device)
    columns[:, seen - held : seen] = layout.valid
    if new is not None:
        columns[:, seen:] = new
    elif mask is not None:
        columns[:, seen:] = mask[:, -q:]
    return columns
