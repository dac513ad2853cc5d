"""The attention of one layer under a reader."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.engine.attention import Call
from hf_compress.engine.context import Context
from hf_compress.engine.masks import both, visible
from hf_compress.engine.rotary import turn
from hf_compress.engine.state import Forward
from hf_compress.layout import Layout
from hf_compress.methods.reader import Reader
from hf_compress.stores import HeldLayer
from hf_compress.tensors.ambient import own_precision
from hf_compress.tensors.kvmerge import take


class OneReading:
    """What a reader is shown: a `signals.Reading`."""

    def __init__(self, context: Context, now: Forward, layer: int, held: HeldLayer | None, call: Call):
        policy = context.policy
        assert policy is not None
        self._reader, self._now, self._held, self._context = policy.reader, now, held, context
        self.layer, self.layers = layer, policy.total
        self.depth, self.depths = policy.place[layer]
        kind = call.value.dtype  # autocast leaves what was rotated in fp32, which the kernel would cast
        self.queries, self.keys, self.values = call.query.to(kind), call.key.to(kind), call.value
        self.scaling = call.scaling
        self._module = policy.module
        self.memory: dict[str, Tensor] = now.notes.read
        self.side: dict[str, Tensor] = {} if held is None else held.side

    @property
    def module(self) -> nn.Module | None:
        return self._module()

    @property
    def owner(self) -> Tensor | None:
        owner, past = self._now.notes.owner, self._now.given.past
        if owner is None:
            return None
        return F.pad(torch.where(owner < 0, -1, owner + past), (past, 0), value=-1).to(self.entries.device)

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        return further_on(self._context, self.layer, x, by)

    @property
    def entries(self) -> Layout:
        stored = None if self._held is None else self._held.layout
        return self._now.rows.layout if stored is None else stored

    @property
    def rows(self) -> Layout:
        return self._now.rows.layout.to(self.entries.device)

    @functools.cached_property
    def visible(self) -> Tensor:
        keys, rows = self.entries, self.rows
        return visible(keys, rows, None, seen(self._reader, self._now, keys, rows))  # sliding layers are not asked


def further_on(context: Context, layer: int, x: Tensor, by: Tensor) -> Tensor:
    """(B, H, S, d) rotated rows of one decoder layer as they would be `by` (B, S) positions further on.

    Raises:
        ValueError: positions are more than one number.
    """
    decoder: Any = context.decoder
    attention = context.layers[layer].self_attn
    if not context.adapter.rotates(attention):
        return x
    kinds = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
    kind = [decoder.config.layer_types[layer]] if kinds else []
    own = copy.deepcopy(decoder.rotary_emb, {id(decoder.config): decoder.config})  # some adapt to the positions asked
    cos, sin = own(x.new_zeros(1, dtype=torch.float32), by, *kind)
    if cos.ndim != 3:
        raise ValueError(f"{type(context.model).__name__}: its positions are not one number, so none lie further on")
    scale = (cos.square() + sin.square()).mean().sqrt()  # tables may carry a factor, which x has already
    function = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return turn(function, x, (cos / scale).to(x.dtype), (sin / scale).to(x.dtype))


@own_precision
def seen(reader: Reader | None, now: Forward, keys: Layout, rows: Layout) -> Tensor | None:
    """(B, 1 or Hkv, q, S) bool: what a reader lets the newest rows see, themselves included; once for all layers that
    hold the same.

    Raises:
        ValueError: it says something else.
    """
    key = ("sight", id(keys), id(rows))
    if key not in now.notes.memo:
        sight = None if reader is None else reader.sight(keys, rows)
        if sight is not None:
            sight = with_itself("sight", sight, keys, rows)
        now.notes.memo[key] = (keys, rows, sight)  # holding them keeps their ids taken
    return now.notes.memo[key][-1]


def with_itself(what: str, sight: Tensor, keys: Layout, rows: Layout) -> Tensor:
    """`sight` (B, 1 or Hkv, q, S), where every row sees itself too.

    Raises:
        ValueError: `what` a reader said has another shape or type.
    """
    (B, q), S = rows.index.shape, keys.index.shape[-1]
    if sight.dtype != torch.bool or sight.ndim != 4 or len(sight) not in (1, B) or sight.shape[2:] != (q, S):
        raise ValueError(
            f"{what}: {sight.dtype} of shape {tuple(sight.shape)} is not bool (B, 1 or Hkv, q, S) = ({B}, 1 or Hkv, "
            f"{q}, {S})"
        )
    index = keys.index if keys.index.ndim == 3 else keys.index[:, None]
    return sight | (index[:, :, None] == rows.index[:, None, :, None])


@own_precision
def read(context: Context, now: Forward, layer: int, held: HeldLayer | None, call: Call) -> Tensor | Call | None:
    """The output (B, q, Hq, d) of the attention of one layer, or what its kernel shall read; None: everything.

    Raises:
        ValueError: a reader looks at something else than (B, Hkv, n) entries before the newest, chooses by something
            else than a bool (B, 1 or Hkv, q, S), or gives something else than an output (B, q, Hq, d); or it attends
            itself in a model whose attention does more than that (caps its logits, or has sinks).
    """
    policy = context.policy
    reader = None if policy is None else policy.reader
    if (
        policy is None
        or reader is None
        or not policy.attends
        or layer not in policy.place
        or now.given.reread is not None
    ):
        return None
    packed = now.given.packing is not None or now.given.ready_made
    if packed and (reader.attends or reader.chooses):
        raise ValueError(
            f"method={context.stages['cache'].name!r} takes part in the attention, which a ready-made mask "
            "(rows that see ahead), or several samples in one row, would have to tell it of; use a model of causal "
            "rows, pass a 2-D attention_mask, and pad the samples"
        )
    reading = OneReading(context, now, layer, held, call)
    out, (B, Hq, q, _) = reader.attend(reading), call.query.shape
    if out is not None and (out.ndim != 4 or out.shape[:3] != (B, q, Hq)):
        raise ValueError(f"attend: {tuple(out.shape)} is not (B, q, Hq, d) = ({B}, {q}, {Hq}, d)")
    if out is not None:
        if more := sorted(name for name in ("softcap", "s_aux") if call.kwargs.get(name) is not None):
            raise ValueError(
                f"method={context.stages['cache'].name!r} attends itself, and the attention of "
                f"{type(context.model).__name__} does what it does not know of ({', '.join(more)}); use another model"
            )
        return out
    with torch.no_grad():
        if (chosen := reader.choose(reading)) is not None:
            return under(call, with_itself("choose", chosen, reading.entries, reading.rows), reading)
        if call.query.shape[2] > 1 or not now.given.past or held is None:
            return None
        slots = reader.look(reading)
    if slots is None:
        return None
    (B, H, S), n = call.key.shape[:3], slots.shape[-1]
    if slots.shape != (B, H, n) or n >= S:
        raise ValueError(f"look: {tuple(slots.shape)} is not (B, Hkv, n) = ({B}, {H}, n) of the {S - 1} older entries")
    if slots.device.type == "cpu" and n and not 0 <= int(slots.min()) <= int(slots.max()) < S - 1:  # waits elsewhere
        raise ValueError(f"look: slots {int(slots.min())} to {int(slots.max())} must be in range({S - 1})")
    return among(call, torch.cat([slots, slots.new_full((B, H, 1), S - 1)], -1))


def under(call: Call, chosen: Tensor, reading: OneReading) -> Call:
    """The same call over what every row reads of what it sees, `chosen` (B, 1 or Hkv, q, S)."""
    mask, heads = call.mask, call.query.shape[1]
    if mask is None:
        see = reading.visible.to(call.query.device)
        see = see if see.shape[1] == 1 else see.repeat_interleave(heads // see.shape[1], 1)
        mask = torch.zeros(see.shape, dtype=call.query.dtype, device=see.device)
        mask = mask.masked_fill_(~see, torch.finfo(mask.dtype).min)
    return call._replace(mask=both(mask, chosen, heads))


def among(call: Call, slots: Tensor) -> Call:
    """The same call of one row over the entries `slots` (B, Hkv, n) of each head."""
    mask = call.mask
    if mask is not None:
        (B, heads), groups = call.query.shape[:2], call.query.shape[1] // slots.shape[1]
        at = slots.repeat_interleave(groups, 1)[:, :, None]
        mask = mask.expand(B, heads, -1, -1).gather(-1, at)
    return call._replace(key=take(call.key, slots), value=take(call.value, slots), mask=mask)
