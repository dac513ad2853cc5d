"""The decoder stage: which rows go on from a layer, and what a method sees of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.engine.entries import Sight
from hf_compress.engine.masks import visible
from hf_compress.engine.packing import Packing, Rotations, Samples
from hf_compress.engine.state import IGNORED, Forward
from hf_compress.layout import Layout
from hf_compress.methods.base import DecoderMethod
from hf_compress.patches.base import Architecture
from hf_compress.signals import Assignment
from hf_compress.tensors.ambient import own_precision
from hf_compress.tensors.attention import Record, at_once, flow, rows_attention, rows_logits
from hf_compress.tensors.rows import compact

VOTERS = 8  # rows whose attention to all others is held at once on a CPU


def _before(x: Tensor, dims: int) -> Tensor:
    """(B, ...) with as many dimensions as said, new ones behind the first."""
    return x.view(len(x), *[1] * (dims - x.ndim), *x.shape[1:])


class LayerView:
    """The rows that enter one layer: the `DecoderView` that a method sees, all of it where `hidden` is."""

    def __init__(
        self,
        forward: Forward,
        adapter: Architecture,
        decoder: nn.Module,
        method: DecoderMethod,
        layer: int,
        hidden: Tensor,
        rotary: Any,
        module: nn.Module | None,
    ):
        self.module, self.losses = module, forward.notes.losses
        self._forward, self._adapter, self._decoder, self._rotary = forward, adapter, decoder, rotary
        self._method, self.memory = method, forward.notes.memory
        self.layers = len(adapter.layers(decoder))
        self._own = layer - 1  # whose attention is the last that was run
        self.layer, self.hidden, self._layout = layer, hidden, forward.rows.layout.to(hidden.device)
        self.valid = self._layout.valid
        self.image = self._layout.image
        self.visual = self.valid & (self.image >= 0)

    @property
    def kv_heads(self) -> int:
        config: Any = self._decoder.config
        return config.num_key_value_heads or config.num_attention_heads

    @property
    def prompt(self) -> Tensor:
        self._forward.given.check_told()
        return self.valid & self.memory["prompt"].to(self.valid.device)

    @property
    def first(self) -> Tensor:
        return self.memory["first"].to(self.valid.device)

    @property
    def last(self) -> Tensor:
        self._forward.given.check_told()
        return self.memory["last"].to(self.valid.device)

    @property
    def budget(self) -> list[int]:
        return self._forward.notes.budget

    def inside(self, record: Record) -> LayerView:
        """The same rows in the attention of this layer, whose own queries and keys are there."""
        self._own = self.layer
        self._forward.notes.records[self.layer] = record
        return self

    @property
    def generated(self) -> Tensor:
        """(B, S) bool: rows behind the prompt of the generate() that is running."""
        rows = self._forward.given.prompt_rows
        return torch.zeros_like(self.valid) if rows is None else self._layout.index >= rows

    @functools.cached_property
    def removable(self) -> Tensor:
        return self._method.removable(self) & self.valid

    @functools.cached_property
    def voters(self) -> tuple[Tensor, Tensor]:
        """(B, R) rows that vote and their 0/1 weights."""
        return voters(self._forward, self._layout)

    @functools.cached_property
    def speaks(self) -> Tensor:
        rows, weight = self.voters
        return torch.zeros_like(self.valid).scatter(1, rows, weight.bool())

    @functools.cached_property
    def final(self) -> Tensor:
        norm: Tensor = self._decoder.norm(self.hidden).to(self.hidden.device)
        return norm

    def keys(self, *, source: str) -> Tensor:
        (_, key, _), _, _ = self._read(source, self.voters[0])
        return key[:, :, -len(self._layout) :].transpose(1, 2).flatten(2).to(self.valid.device)

    def attention(
        self,
        *,
        source: str,
        voters: Tensor | None = None,
        of: Callable[[Tensor], Tensor] | None = None,
        over: str = "mean",
        softmax: bool = True,
        back: int = 0,
    ) -> Tensor:
        rows, weight = self.voters if voters is None else compact(voters & self.valid)
        (query, key, scaling), keys, window = self._read(source, rows, back)
        newest = voters is None and newest_votes(self._forward, self._layout)
        plain = window is None and keys.all_valid and newest
        total: Tensor | None = None
        many = VOTERS
        if query.device.type != "cpu":
            many = at_once(query.device, query.shape[0] * query.shape[1] * key.shape[2], least=VOTERS)
        for some, asks, counts in zip(*(t.split(many, dim) for t, dim in ((query, 2), (rows, 1), (weight, 1)))):
            see = None if plain else visible(keys, self._layout.gather(asks).to(keys.device), window, None)
            a = (rows_attention if softmax else rows_logits)(some, key, scaling, see)[..., -len(self._layout) :]
            a = (a.mean(1) if of is None else of(a)).to(rows.device)
            if rows.shape[1] == 1 and voters is None:
                return a[..., 0, :]
            a = a * _before(counts[..., None], a.ndim)
            share = a.amax(-2) if over == "max" else a.sum(-2)
            total = share if total is None else total.maximum(share) if over == "max" else total + share
        assert total is not None
        return total if over == "max" else total / _before(weight.sum(1, keepdim=True).clamp(min=1), total.ndim)

    @property
    def changes(self) -> list[tuple[Tensor, Tensor]]:
        place = self.valid.device
        return [(ratio.to(place), cosine.to(place)) for ratio, cosine in self._forward.notes.changes]

    def received(self, weight: Tensor, *, source: str, sharpness: float = 1.0) -> Tensor:
        (query, key, scaling), keys, window = self._read(source, None)
        sight = Sight(keys, self._layout.to(keys.device), window)
        weight = (weight * self.valid[:, None]).to(key.device).expand(-1, query.shape[1], -1)
        out = flow(query, key, scaling * sharpness, sight, weight, sight.ends)
        return out[..., -len(self._layout) :].to(self.valid.device)

    def _read(self, source: str, rows: Tensor | None, back: int = 0) -> tuple[Record, Layout, int | None]:
        """Queries of `rows` (B, R) (None: all), and all keys, of the layer just run or the next; keys' layout; window.

        `back` 1: of the layer before the one just run.

        Raises:
            RuntimeError: the rows of the layer just run are others than those alive now.
        """
        layer = self._own - back if source == "own" else self.layer
        window = self._adapter.window(self._decoder, layer)
        if source != "own":
            rows = (
                torch.arange(len(self._layout), device=self.valid.device).expand_as(self.valid)
                if rows is None
                else rows
            )
            module = self._adapter.layers(self._decoder)[layer]
            query, key = self._adapter.query_key(module, self.hidden, rows, self._rotary)
            return (query, key, module.self_attn.scaling), self._layout.to(key.device), window
        if layer not in self._forward.notes.records:
            raise RuntimeError(
                f"layer {layer}: its attention was not declared by `reads`, or rows waited there and have none"
            )
        query, key, scaling = self._forward.notes.records[layer]
        if rows is not None:
            at = rows.to(query.device)[:, None, :, None]
            query = query.gather(2, at.expand(-1, query.shape[1], -1, query.shape[-1]))
        keys = self._layout
        if self._forward.given.past:  # the cache holds earlier turns in front
            keys = self._forward.given.cache.layers[layer].layout
        return (query, key, scaling), keys.to(key.device), window


@own_precision
@torch.no_grad()
def decide(view: LayerView, method: DecoderMethod, keep: list[int] | None) -> Assignment | None:
    """The answer of a method for the rows that enter a layer, in fp32; None: all of them go on."""
    return method.decide(view, keep)


@own_precision
@torch.no_grad()
def enter(view: LayerView, method: DecoderMethod) -> None:
    """Let a method note what it wants to know of the rows that come into the language model."""
    method.enter(view)


def remember_places(now: Forward) -> None:
    """What `LayerView` tells of the places of rows in their prompts, noted where all of them are still there."""
    layout, given = now.rows.layout, now.given
    valid, packing = layout.valid, given.packing
    prompt = valid if given.prompt_rows is None else valid & (layout.index < given.prompt_rows)
    labels = given.inputs.get("labels")
    if torch.is_tensor(labels) and labels.shape[1] == given.size[1]:
        prompt = prompt & labels.to(valid.device).gather(1, now.rows.local).eq(IGNORED)
    sample = _samples(packing, now.rows.local)
    memory = now.notes.memory
    earlier: Any = given.past
    if given.past and given.mask is not None:  # rows that were padded are longer in a batch than alone
        earlier = given.mask[:, : -given.size[1]].long().sum(1, keepdim=True).to(valid.device)
    memory["prompt"], memory["first"] = prompt, _rank(valid, sample) + earlier
    memory["last"] = _rank(prompt.flip(0, 1), sample.flip(0, 1)).flip(0, 1)


def _samples(packing: Packing | None, local: Tensor) -> Tensor:
    """(B, S): which sample of the batch each row belongs to."""
    if packing is not None:
        return packing.numbers(local)
    return torch.arange(len(local), device=local.device)[:, None].expand_as(local)


def _rank(mask: Tensor, sample: Tensor) -> Tensor:
    """(B, S): how many rows that are True in `mask` come before each row in its sample; samples stand together."""
    before = (mask.flatten().long().cumsum(0) - mask.flatten().long()).view(mask.shape)
    start = torch.full((int(sample.max()) + 1,), before.numel(), device=mask.device)
    return before - start.scatter_reduce(0, sample.flatten(), before.flatten(), "amin")[sample]


def newest_votes(forward: Forward, layout: Layout) -> bool:
    """Whether the newest row of every sample is known to be its only voter, without a look at the rows."""
    forward.given.check_told()
    answers = forward.given.prompt_rows is not None and forward.given.prompt_rows < forward.given.size[1]
    return layout.all_valid and not answers and forward.given.inputs.get("labels") is None


def voters(forward: Forward, layout: Layout) -> tuple[Tensor, Tensor]:
    """Rows of the layer that vote: (B, R) int64 and (B, R) 0/1 weights, one of each sample at least 1.

    The last valid row of each sample's prompt (answers follow it while generating without a cache); with labels, every
    row that precedes an answer (a labelled row whose predecessor has no label), so that no answer votes on what it may
    read.
    """
    S, prompt = len(layout), layout.valid
    if newest_votes(forward, layout):
        last = torch.full((len(prompt), 1), S - 1, device=layout.device)
        return last, torch.ones_like(last)
    if forward.given.prompt_rows is not None:
        prompt = prompt & (forward.rows.local < forward.given.prompt_rows).to(layout.device)
    last = (prompt * torch.arange(S, device=layout.device)).amax(1)
    labels = forward.given.inputs.get("labels")
    if labels is None or forward.rows.local is None:
        return last[:, None], torch.ones_like(last[:, None])
    given = labels.to(layout.device).gather(1, forward.rows.local.to(layout.device)).ne(IGNORED) & layout.valid
    starts = given & ~torch.cat([torch.zeros_like(given[:, :1]), given[:, :-1]], 1)
    before = torch.cat([starts[:, 1:], torch.zeros_like(starts[:, :1])], 1) & layout.valid
    before[torch.arange(len(last), device=last.device), last] |= ~before.any(1)
    width = int(before.sum(1).max())
    rows = before.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    return rows, before.gather(1, rows).long()


def sample_by_sample(
    now: Forward, layer: int, x: Tensor, rotary: Rotations | None
) -> tuple[Forward, Tensor, Rotations | None, Samples]:
    """The packed rows that enter a layer as a padded batch of samples: forward, states (n, W, D), rotations."""
    packing = now.given.packing
    assert packing is not None
    samples = packing.samples(now.rows.layout, now.rows.local)
    counts = torch.tensor(packing.counts, device=now.rows.local.device)
    row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=sum(packing.counts))
    index, position, image, _ = (samples.split(t) for t in now.rows.layout.slots)
    layout = Layout(index, position, image, samples.real, now.rows.layout.removed[row], now.rows.layout.seen)
    inputs, records = dict(now.given.inputs), {}
    if torch.is_tensor(labels := inputs.get("labels")):
        inputs["labels"] = labels[row.to(labels.device)]
    for i, record in now.notes.records.items():
        query, key = (samples.split(t.transpose(1, 2)).transpose(1, 2) for t in record[:2])
        records[i] = query, key, record[2]
    changes = [(samples.split(ratio), samples.split(cosine)) for ratio, cosine in now.notes.changes]
    if rotary is not None:
        cos, sin = (samples.split(t.expand(len(counts), -1, -1)) for t in rotary)
        rotary = cos, sin
    one = Forward(
        replace(now.given, inputs=inputs, packing=None),
        replace(now.rows, layout=layout, local=samples.split(now.rows.local)),
        replace(
            now.notes,
            records=records,
            changes=changes,
            memory={k: samples.split(t) for k, t in now.notes.memory.items()},
        ),
    )
    return one, samples.split(x), rotary, samples


def join(samples: Samples, one: Forward, now: Forward, answer: Assignment | None) -> Assignment | None:
    """An answer for a padded batch of samples as one for the packed rows; what it remembers goes along.

    Raises:
        ValueError: rows are mixed by a matrix, which packed rows cannot be.
    """
    valid = now.rows.layout.valid
    now.notes.memory = {k: samples.join(t, valid) for k, t in one.notes.memory.items()}
    if answer is None:
        return None
    if answer.dense is not None:
        raise ValueError(
            "position_ids: several samples are packed into one row, and this method mixes rows by a matrix inside the "
            "language model; pad the samples instead"
        )
    if answer.groups is None:
        return Assignment.selection(samples.join(answer.stays(samples.rows.shape[1]), valid))
    owner = answer.kept.gather(1, answer.groups.clamp(min=0))
    place = samples.rows.to(owner.device).gather(1, owner) % valid.shape[1]
    joined = samples.join(torch.where(answer.groups < 0, 0, place + 1), valid) - 1
    return Assignment.owned(joined, None if answer.weight is None else samples.join(answer.weight, valid))
