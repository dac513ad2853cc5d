"""The decoder stage: which visual rows go on from a layer, scored by attention rows."""

from __future__ import annotations

import functools
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress import budget
from hf_compress.engine.masks import visible
from hf_compress.engine.packing import Rotations, Samples
from hf_compress.engine.stage import Budgeted
from hf_compress.engine.state import Forward
from hf_compress.layout import Layout
from hf_compress.methods.base import DecoderMethod
from hf_compress.patches.base import Architecture
from hf_compress.tensors.attention import rows_attention


class LayerView:
    """The rows that enter one layer: the `DecoderView` that a method sees, all of it where `hidden` is."""

    def __init__(
        self, forward: Forward, adapter: Architecture, decoder: nn.Module, layer: int, hidden: Tensor, rotary: Any
    ):
        assert forward.rows.layout is not None
        self._forward, self._adapter, self._decoder, self._rotary = forward, adapter, decoder, rotary
        self.layer, self.hidden, self._layout = layer, hidden, forward.rows.layout.to(hidden.device)
        self.valid = self._layout.valid
        self.image = self._layout.image
        self.visual = self.valid & (self.image >= 0)

    @functools.cached_property
    def voters(self) -> tuple[Tensor, Tensor]:
        """(B, R) rows that vote and their 0/1 weights."""
        return voters(self._forward, self._layout)

    def attention(self, *, source: str) -> Tensor:
        rows, weight = self.voters
        a = (self._own(rows) if source == "own" else self._next(rows)).to(rows.device)
        if rows.shape[1] == 1:
            return a[:, 0]
        return (a * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1)

    def _own(self, rows: Tensor) -> Tensor:
        """(B, R, S) attention of `rows` in the layer just run, mean over heads."""
        query, key, scaling = self._forward.notes.records[self.layer - 1]
        at = rows.to(query.device)[:, None, :, None]
        query = query.gather(2, at.expand(-1, query.shape[1], -1, query.shape[-1]))
        keys = self._layout
        if self._forward.given.past:  # the cache holds earlier turns in front
            keys = self._forward.given.cache.layers[self.layer - 1].layout
        see = self._sight(self.layer - 1, keys.to(key.device), rows)
        return rows_attention(query, key, scaling, see).mean(1)[..., -len(self._layout) :]

    def _next(self, rows: Tensor) -> Tensor:
        """The same in the layer about to run."""
        module = self._adapter.layers(self._decoder)[self.layer]
        query, key = self._adapter.query_key(module, self.hidden, rows, self._rotary)
        see = self._sight(self.layer, self._layout.to(key.device), rows)
        return rows_attention(query, key, module.self_attn.scaling, see).mean(1)

    def _sight(self, layer: int, keys: Layout, rows: Tensor) -> Tensor | None:
        """(B, 1, R, S) bool: which of `keys` the voting `rows` see; None: all."""
        window = self._adapter.window(self._decoder, layer)
        if window is None and keys.all_valid and newest_votes(self._forward, self._layout):
            return None
        return visible(keys, self._layout.gather(rows).to(keys.device), window, None)


def newest_votes(forward: Forward, layout: Layout) -> bool:
    """Whether the newest row of every sample is known to be its only voter, without a look at the rows."""
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
    given = labels.to(layout.device).gather(1, forward.rows.local.to(layout.device)).ne(-100) & layout.valid
    starts = given & ~torch.cat([torch.zeros_like(given[:, :1]), given[:, :-1]], 1)
    before = torch.cat([starts[:, 1:], torch.zeros_like(starts[:, :1])], 1) & layout.valid
    before[torch.arange(len(last), device=last.device), last] |= ~before.any(1)
    width = int(before.sum(1).max())
    rows = before.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    return rows, before.gather(1, rows).long()


def drop(method: DecoderMethod, view: LayerView, counts: list[int]) -> Tensor:
    """(B, S) bool keep mask: all text, and the `counts[b]` best scored visual rows of sample b.

    A voting row that is itself visual (a prompt that ends with its image) stays within that count.
    """
    with torch.no_grad():
        rows, weight = view.voters
        speaks = torch.zeros_like(view.visual).scatter(1, rows, weight.bool())  # what they predict from must not vanish
        score = method.score(view).masked_fill(speaks, float("inf")).masked_fill(~view.visual, float("-inf"))
    keep = view.valid & ~view.visual
    if method.scope == "joint":
        order = score.argsort(dim=-1, descending=True, stable=True)  # ties go to the lower index
        chosen = torch.arange(score.shape[1], device=score.device) < torch.tensor(counts, device=score.device)[:, None]
        return keep | torch.zeros_like(keep).scatter(1, order, chosen)
    for b, n in enumerate(counts):
        if not n:
            continue
        images = view.image[b][view.visual[b]]
        present = torch.bincount(images).tolist()
        weights = [float(c) for c in present]
        for i, share in enumerate(budget.shares(min(n, sum(present)), weights, present)):
            own = score[b].masked_fill(view.image[b] != i, float("-inf"))
            keep[b, own.argsort(descending=True, stable=True)[:share]] = True
    return keep


def sample_by_sample(
    now: Forward, layer: int, x: Tensor, rotary: Rotations
) -> tuple[Forward, Tensor, Rotations, Samples]:
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
    if (record := now.notes.records.get(layer - 1)) is not None:
        query, key = (samples.split(t.transpose(1, 2)).transpose(1, 2) for t in record[:2])
        records[layer - 1] = query, key, record[2]
    cos, sin = (samples.split(t.expand(len(counts), -1, -1)) for t in rotary)
    one = Forward(
        replace(now.given, inputs=inputs, packing=None),
        replace(now.rows, layout=layout, local=samples.split(now.rows.local)),
        replace(now.notes, records=records),
    )
    return one, samples.split(x), (cos, sin), samples


Plans = dict[tuple[int, int], dict[int, int]]  # {(visual rows, images): {layer: rows that stay}}


def plan(stage: Budgeted, layers: int, tokens: int, images: int, first: int) -> dict[int, int]:
    """{layer: visual rows kept} of a sample with so many visual rows, which are so many images.

    Args:
        first: the layer before which rows may be dropped at the earliest.

    Raises:
        ValueError: the budget cannot be reached, or rows would be dropped where they may not.
    """
    share = stage.ratio  # or from layer-averaged tokens per image
    if share is None:
        share = max(Fraction(0), 1 - Fraction((stage.keep or 0) * images, tokens))
    try:
        found = stage.method.plan(layers, tokens, share)
    except ValueError as error:
        if stage.keep is None:
            raise
        raise ValueError(f"keep={stage.keep} of {tokens // images} visual tokens: {error}") from error
    if early := [layer for layer in found if layer < first]:
        raise ValueError(
            f"method={stage.name!r} drops before layer {min(early)}; the model allows it from layer {first} on"
        )
    if wrong := sorted(set(found) - set(stage.method.boundaries(layers))):
        raise ValueError(f"method={stage.name!r} drops before layers {wrong}, which are none of its boundaries")
    return found


def schedule(
    stage: Budgeted, layers: int, tokens: list[int], images: list[int], first: int, plans: Plans
) -> dict[int, list[int]]:
    """{layer: visual rows kept per sample}, of the layers before which any sample loses some.

    Args:
        tokens: visual rows with which each sample enters the language model; images: how many images they are.
        first: the layer before which rows may be dropped at the earliest.
        plans: plans made before, added to; they depend on nothing but the counts.
    """
    samples = list(zip(tokens, images))
    for n, pictures in samples:
        if n and (n, pictures) not in plans:
            plans[n, pictures] = plan(stage, layers, n, pictures, first)
    left, out = tokens, {}
    for layer in sorted({layer for key in samples if key[0] for layer in plans[key]}):
        counts = [plans[key].get(layer, have) if have else 0 for key, have in zip(samples, left)]
        if counts != left:
            out[layer] = left = counts
    return out
