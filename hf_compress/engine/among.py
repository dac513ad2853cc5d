"""The attention of a layer among some of the rows of a prompt: gathered, through the layer's own kernel, put back."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from hf_compress.engine.attention import Call, Weighted
from hf_compress.engine.context import Context
from hf_compress.engine.decoder import LayerView
from hf_compress.engine.seams import numbered, take_out
from hf_compress.engine.state import Forward
from hf_compress.tensors.ambient import own_precision
from hf_compress.tensors.rows import compact


def check_among(context: Context, ratio: Fraction | None) -> None:
    """Raises ValueError if a cache method takes part in the attention too, or chooses from what has left the cache.

    `ratio`: of the decoder method.
    """
    method, policy = context.decoder_method, context.policy
    if method is None or policy is None or not method.picks or ratio == 0:
        return
    decoder, cache = context.stages["decoder"].name, context.stages["cache"].name
    if policy.attends or policy.store is not None or policy.method.ragged or policy.method.policy == "hold":
        raise ValueError(
            f"method={cache!r} takes part in the attention (or has it read what it has packed), and so does "
            f"method={decoder!r}; take a cache method that only evicts at the end of the prompt"
        )
    if method.discards:
        raise ValueError(
            f"method={decoder!r} takes rows out of the cache of its layers, from which method={cache!r} would choose; "
            "compress with one of them"
        )


def among(context: Context, now: Forward, layer: int, call: Call) -> Weighted | None:
    """(B, q, Hq, d), the attention of a layer of the plan, and its weights if any; None: it is the layer's own.

    Rows of the prompt that the method leaves out neither look nor are looked at, and come out as zeros. Rows behind the
    prompt look at everything that the cache of the layer keeps.
    """
    method, view = context.decoder_method, now.notes.picking.pop(layer, None)
    if method is None or view is None:
        return None
    picked = _picked(context, now, view.inside(call.record()), call)
    if picked is None:
        return None
    late = view.valid & ~view.prompt if _answers(now) else None
    rows, real, (some, weights) = _attend(call, picked)
    out = _put(some.new_zeros(len(some), call.query.shape[2], *some.shape[2:]), rows, real, some)
    if late is not None and bool(late.any()):
        rows, real, (some, _) = _behind(call, late, picked[:, 0] | late if method.discards else None)
        out = _put(out, rows, real, some)
    gone = view.valid & ~picked[:, 0]
    if now.notes.recorder is not None:
        now.notes.recorder.attended[layer] = picked.sum(-1)
    if method.discards and now.given.cache is not None:
        _discard(now, layer, gone if late is None else gone & ~late)
    return out, weights


@own_precision
@torch.no_grad()
def _picked(context: Context, now: Forward, view: LayerView, call: Call) -> Tensor | None:
    """(B, h, q) bool: the rows of the prompt that take part, in every head or in all of them; None: all rows do.

    Raises:
        ValueError: samples are packed, or the method answers with something else.
    """
    method, name = context.decoder_method, context.stages["decoder"].name
    assert method is not None
    if now.given.packing is not None:
        raise ValueError(
            f"position_ids: several samples are packed into one row, and method={name!r} chooses rows inside the "
            "attention; pad the samples instead"
        )
    chosen = method.among(view, now.notes.plan[view.layer])
    if chosen is None:
        return None
    (B, Hq, q, _), Hkv = call.query.shape, call.key.shape[1]
    heads = (1,) if method.discards else (1, Hkv, Hq)
    if chosen.dtype != torch.bool or chosen.ndim != 3 or chosen.shape[::2] != (B, q) or chosen.shape[1] not in heads:
        raise ValueError(
            f"method={name!r}: among() gave {chosen.dtype} of shape {tuple(chosen.shape)}; it must be bool "
            f"(B, {' or '.join(map(str, heads))}, S) = ({B}, ..., {q})"
        )
    return (chosen | ~view.removable[:, None]) & (view.valid & view.prompt)[:, None]


def _answers(now: Forward) -> bool:
    """Whether rows behind the prompt can be among those of this forward."""
    rows, given = now.given.prompt_rows, now.given
    return (rows is not None and rows < given.past + given.size[1]) or torch.is_tensor(given.inputs.get("labels"))


def _put(out: Tensor, rows: Tensor, real: Tensor, some: Tensor) -> Tensor:
    """`out` (B, q, Hq, d) with what came of `rows` (B, h, n), `some` (B, n, Hq, d), at their places."""
    Hq = some.shape[2]
    at, real = (t.repeat_interleave(Hq // t.shape[1], 1).transpose(1, 2)[..., None] for t in (rows, real))
    return out.scatter_add(1, at.expand_as(some), some * real.to(some.dtype))


def _attend(call: Call, picked: Tensor) -> tuple[Tensor, Tensor, Weighted]:
    """The rows (B, h, n) that take part, which of them are real, and what comes of them (B, n, Hq, d)."""
    B, h, q = picked.shape
    rows, real = (t.view(B, h, -1) for t in compact(picked.flatten(0, 1)))
    rows, real = rows.to(call.query.device), real.to(call.query.device)
    past = call.key.shape[2] - q
    old = torch.arange(past, device=rows.device).expand(B, h, -1)
    columns = torch.cat([old, past + rows], -1)
    key, value = (take_heads(x, columns) for x in (call.key, call.value))
    some = call.over(take_heads(call.query, rows), key, value, _mask(call, rows, real, columns))
    return rows, real, some


def take_heads(x: Tensor, rows: Tensor) -> Tensor:
    """(B, H, S, d) at `rows` (B, h, n), where one of H and h is a multiple of the other: (B, max(H, h), n, d)."""
    B, H, S, d = x.shape
    heads = max(H, rows.shape[1])
    head = torch.arange(heads, device=x.device) // (heads // H)
    first = S * (H * torch.arange(B, device=x.device)[:, None] + head)
    at = rows.to(x.device).repeat_interleave(heads // rows.shape[1], 1) + first[..., None]
    return x.reshape(-1, d).index_select(0, at.flatten()).view(B, heads, -1, d)


def _mask(call: Call, rows: Tensor, real: Tensor, columns: Tensor) -> Tensor | None:
    """What `rows` (B, h, n) see of `columns` (B, h, m), as the kernel takes it; None: those before them."""
    n, m, Hq = rows.shape[-1], columns.shape[-1], call.query.shape[1]
    whole = bool(real.all())
    if call.mask is None and whole and n == m:
        return None
    new = real[:, :, None].expand(-1, -1, n, -1)
    seen = torch.cat([new.new_ones(*new.shape[:3], m - n), new], -1)
    if call.mask is None:
        see = seen & torch.ones(n, m, dtype=torch.bool, device=new.device).tril(m - n)
        least: bool | float = False
    else:
        see, least = _cells(call.mask, rows, columns), False if call.mask.dtype == torch.bool else _least(call.mask)
        see = see.masked_fill(~seen, least)
    fills = torch.eye(n, m, dtype=torch.bool, device=new.device).roll(m - n, 1) & ~real[..., None]
    see = see.masked_fill(fills, 0.0 if see.dtype != torch.bool else True)  # no softmax of nothing
    return see if see.shape[1] in (1, Hq) else see.repeat_interleave(Hq // see.shape[1], 1)


def _cells(mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A mask (B or 1, 1 or Hq, q, S) at these rows and columns (B, h, n or m); heads that are alike once."""
    B, h, _ = rows.shape
    heads = max(h, mask.shape[1])
    rows, columns = (t.repeat_interleave(heads // h, 1) for t in (rows, columns))
    sample = torch.arange(B, device=mask.device)[:, None, None, None] % len(mask)
    head = torch.arange(heads, device=mask.device)[None, :, None, None] % mask.shape[1]
    return mask[sample, head, rows[..., None], columns[:, :, None]]


def _least(mask: Tensor) -> float:
    return torch.finfo(mask.dtype).min


def _behind(call: Call, late: Tensor, sees: Tensor | None) -> tuple[Tensor, Tensor, Weighted]:
    """The same of the rows behind the prompt, `late` (B, q), who see all rows, or those True in `sees` (B, q)."""
    rows, real = (t.to(call.query.device)[:, None] for t in compact(late))
    S, q = call.key.shape[2], late.shape[1]
    every = torch.arange(S, device=rows.device).expand(len(rows), 1, -1)
    if call.mask is None:
        mask = every[:, :, None] <= (S - q + rows)[..., None]
    else:
        mask = _cells(call.mask, rows, every)
    if sees is not None:
        stays = torch.cat([sees.new_ones(len(sees), S - q), sees], 1).to(mask.device)[:, None, None]
        mask = mask & stays if mask.dtype == torch.bool else mask.masked_fill(~stays, _least(mask))
    return rows, real, call.over(take_heads(call.query, rows), call.key, call.value, mask)


def _discard(now: Forward, layer: int, gone: Tensor) -> None:
    """Take rows (B, q) of this forward out of the cache of a layer."""
    take_out([now.given.cache.layers[layer]], numbered(now.rows.layout, gone), ("discarded", layer))
