"""Further forwards beside the one that the caller asked for, through the model as it is without its compression."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.engine.context import Context
from hf_compress.engine.masks import visible
from hf_compress.engine.packing import Packing
from hf_compress.engine.state import IGNORED, Forward, Given, Notes
from hf_compress.layout import Layout
from hf_compress.patches.versions import CACHE
from hf_compress.tensors.attention import Record, at_once, rows_attention, rows_logits
from hf_compress.tensors.rows import compact

ROWS = 256  # of logits that are turned into losses at once


class Enough(Exception):
    """The deepest layer that somebody reads has been reached."""


@dataclass
class Prompt:
    """A prompt as the language model is given it, before anything of it is removed.

    Attributes:
        ids: (B, q), None where the caller passed none.
        mask: (B, q) bool, False on padding and behind the prompt.
        arguments: of the language model, by name; nothing is cached.
        packing: which rows belong together, None: a sample per row.
        labels: (B, q) of the caller, None: there are none.
    """

    ids: Tensor | None
    mask: Tensor
    arguments: dict[str, Any]
    packing: Packing | None = None
    labels: Tensor | None = None

    @functools.cached_property
    def unanswered(self) -> Tensor:
        """(B, q) bool: rows before the first one of their sample that carries a label."""
        if self.labels is None:
            return self.mask
        answer = self.labels.to(self.mask.device).ne(IGNORED).long()
        return self.mask & ((answer.cumsum(1) if self.packing is None else self.packing.total(answer)) == 0)

    @classmethod
    def of(cls, now: Forward, kw: dict[str, Any]) -> Prompt:
        """That of a forward whose language model is about to be run with the arguments `kw`."""
        given, x = now.given, kw["inputs_embeds"]
        B, q = given.size
        mask = torch.ones(B, q, dtype=torch.bool, device=x.device)
        if given.mask is not None:
            mask = given.mask[:, -q:].bool().to(x.device)
        own: Any = mask.long()
        if given.ready_made or given.packing is not None:
            own = _own(kw.get("attention_mask"), q)
        if given.prompt_rows is not None:  # without a cache what was generated stands behind it
            mask = mask & (torch.arange(given.past, given.past + q, device=x.device) < given.prompt_rows)
        rest = {k: v for k, v in kw.items() if k not in CACHE}
        arguments = dict(rest, inputs_embeds=x.detach(), attention_mask=own, use_cache=False)
        ids, labels = None if given.ids is None else given.ids.to(x.device), given.inputs.get("labels")
        return cls(ids, mask, arguments, given.packing, labels if torch.is_tensor(labels) else None)


def _own(masks: Any, rows: int) -> Any:
    """Of masks (B, 1, q, past + q), or of one per kind of layer, what the rows see of each other."""
    if isinstance(masks, dict):
        return {kind: _own(mask, rows) for kind, mask in masks.items()}
    return None if masks is None else masks[..., -rows:]


@contextlib.contextmanager
def aside(context: Context, layers: frozenset[int] = frozenset()) -> Iterator[Forward]:
    """A forward inside goes as in a bare model, but that the `layers` leave their records; stops behind the deepest."""
    one = Forward(Given({}, bare=True), notes=Notes(wanted=layers))
    with context.state.scope(), torch.no_grad():
        context.state.run, context.state.forward = None, one
        with contextlib.suppress(Enough):
            yield one


class Ahead:
    """What further forwards over a whole prompt tell, of all samples at once; run when somebody first asks.

    Args:
        layers: those whose attention will be read; the layers behind the deepest are not run.
    """

    def __init__(self, context: Context, prompt: Prompt, layers: frozenset[int]):
        self.context, self.prompt, self.layers = context, prompt, layers

    @functools.cached_property
    def records(self) -> Mapping[int, Record]:
        """Queries and keys of the layers that are read."""
        with aside(self.context, self.layers) as one:
            self.context.decoder(**self.prompt.arguments)
        return one.notes.records

    @functools.cached_property
    def loss(self) -> Tensor:
        """(B, q) fp32: how little each row was expected from those before it; 0 of the first."""
        ids, mask = self.prompt.ids, self.prompt.mask
        assert ids is not None
        logits, out = self._logits(), torch.zeros(ids.shape, device=ids.device)
        for start in range(0, ids.shape[1] - 1, ROWS):
            part = slice(start, min(start + ROWS, ids.shape[1] - 1))
            after = slice(part.start + 1, part.stop + 1)
            out[:, after] = F.cross_entropy(logits[:, part].float().mT, ids[:, after], reduction="none")
        return out.masked_fill(~(mask & F.pad(mask, (1, -1), value=False)), 0.0)

    def _logits(self) -> Tensor:
        """(B, q, V)."""
        names = ("inputs_embeds", "attention_mask", "position_ids", "use_cache")
        given = {name: value for name in names if (value := self.prompt.arguments.get(name)) is not None}
        with aside(self.context):
            out = self.context.outermost.original(**given)
        return out[0] if isinstance(out, tuple) else out.logits

    def last(self) -> Tensor:
        """(B, q) bool: the last row of each prompt, before whatever carries a label."""
        may = self.prompt.unanswered
        at = torch.arange(may.shape[1], device=may.device)
        return at == (may * at).amax(1, keepdim=True)

    def attention(self, layer: int, rows: Tensor, *, softmax: bool = True) -> Tensor:
        """(B, Hq, q) fp32: what `rows` (B, q) bool attend to in a layer, mean over them; 0 in samples that have none.

        Without `softmax` the scaled products of queries and keys, 0 where a row does not see. Streamed over the R rows:
        O(R * q) per head, never q x q.
        """
        query, key, scaling = self.records[layer]
        at, counts = (t.to(query.device) for t in compact(rows))
        B, H, q, d = query.shape
        total = torch.zeros(B, H, q, device=query.device)
        for some, real in zip(*(t.split(at_once(query.device, B * H * q), 1) for t in (at, counts))):
            few = query.gather(2, some[:, None, :, None].expand(-1, H, -1, d))
            see = self._see(layer, some.to(rows.device)).to(key.device)
            a = (rows_attention if softmax else rows_logits)(few, key, scaling, see)
            total += (a * real[:, None, :, None]).sum(2)
        return (total / counts.sum(1).clamp(min=1)[:, None, None]).to(rows.device)

    def _see(self, layer: int, rows: Tensor) -> Tensor:
        """(B, 1, R, q) bool: what the `rows` (B, R) of a layer see of the prompt."""
        mask, ready = self.prompt.mask, self.prompt.arguments["attention_mask"]
        if isinstance(ready, dict):
            ready = ready[self.context.decoder.config.layer_types[layer]]
        if torch.is_tensor(ready) and ready.ndim == 4:
            at = rows.to(ready.device)[:, None, :, None].expand(-1, -1, -1, ready.shape[-1])
            see = ready[:, :1].expand(len(rows), -1, -1, -1).gather(2, at)
            return see if see.dtype == torch.bool else see > torch.finfo(see.dtype).min / 2
        place, sight = torch.arange(mask.shape[1], device=mask.device).expand_as(mask), None
        if (packing := self.prompt.packing) is not None:
            sample = packing.sample.to(mask.device)
            sight = (sample.gather(1, rows)[..., None] == sample[:, None])[:, None]
        layout = Layout(place, place, torch.full_like(place, -1), mask, place.new_zeros(len(place)), mask.shape[1])
        window = self.context.adapter.window(self.context.decoder, layer)
        return visible(layout, layout.gather(rows), window, sight)


def look_ahead(context: Context, now: Forward, kw: dict[str, Any]) -> Ahead | None:
    """What methods of the stages before the language model may read of it; None: they read nothing."""
    if not context.probe.ahead or now.given.size[1] < 2:
        return None
    return Ahead(context, Prompt.of(now, kw), context.probe.ahead_layers)
