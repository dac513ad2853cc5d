"""Where rows become fewer: one rewrite of everything that is kept per row, and the way back for rows that waited."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.engine.context import Context
from hf_compress.engine.decoder import LayerView
from hf_compress.engine.state import IGNORED, Forward, Rows
from hf_compress.layout import Layout
from hf_compress.methods.base import DecoderMethod
from hf_compress.signals import Assignment
from hf_compress.stores import HeldLayer
from hf_compress.tensors.rows import compact


def rewrite(now: Forward, x: Tensor, answer: Assignment, *, for_good: bool = True) -> Tensor:
    """The rows (B, S, D) that stay of those alive, and all that the forward knows of each of them.

    Args:
        for_good: rows that go do not come back, so none of them may carry a label.

    Raises:
        ValueError: one does.
    """
    rows = now.rows
    here = answer.kept.to(rows.local.device)  # the book stays where the rows came in, layers may lie elsewhere
    valid = None if answer.valid is None else answer.valid.to(here.device)
    if for_good:
        check_labels(now, rows.layout.valid & ~answer.stays(x.shape[1]).to(here.device))
        rows.moved = True
    rows.layout, rows.local = rows.layout.gather(here, valid), rows.local.gather(1, here)
    rows.cut = here if rows.cut is None else rows.cut.gather(1, here)
    memory = now.notes.memory  # a view of the layer may still be asked for what it held
    now.notes.memory = {name: Assignment(answer.kept.to(t.device)).pick(t) for name, t in memory.items()}
    now.notes.records.clear()
    now.notes.changes = []
    return answer.apply(x)


def check_labels(now: Forward, gone: Tensor) -> None:
    """Raises ValueError if a row that is removed carries a label; `gone` (B, S) bool over the rows alive."""
    labels = now.given.inputs.get("labels")
    if labels is None or not torch.is_tensor(labels) or labels.shape[1] != now.given.size[1]:
        return
    if bool((labels.to(gone.device).gather(1, now.rows.local.to(gone.device)).ne(IGNORED) & gone).any()):
        raise ValueError(
            "labels: some visual tokens that are removed carry a label; set the labels of visual placeholders to -100"
        )


def trim_earlier(now: Forward, layer: int, answer: Assignment) -> None:
    """Take the rows that go out of the caches of the layers run before, by the caller's numbers."""
    layout = now.rows.layout
    gone = layout.valid & ~answer.stays(len(layout)).to(layout.device)
    take_out(now.given.cache.layers[:layer], numbered(layout, gone), ("trimmed", id(answer)))


def numbered(layout: Layout, gone: Tensor) -> Tensor:
    """(B, R + 1) bool by the caller's numbers, of R rows fed so far, what `gone` (B, S) says of the rows alive."""
    hidden = gone.new_zeros(len(gone), layout.seen + 1)
    hidden.scatter_(1, torch.where(gone, layout.index.to(gone.device), layout.seen), True)
    hidden[:, layout.seen] = False
    return hidden


def take_out(layers: Iterable[HeldLayer], hidden: Tensor, key: object) -> None:
    """Take rows out of the caches of some layers, by the caller's numbers: those that are True in `hidden` (B, R).

    Args:
        key: of this change, by which layers that hold the same go on sharing it.
    """
    for held in layers:
        assert held.layout is not None
        layout = held.layout

        def kept(layout: Layout = layout) -> tuple[Tensor, Tensor]:
            return compact(layout.valid & ~hidden.to(layout.device).gather(1, layout.index))

        held.select_rows(*layout.derive(key, kept))


@dataclass
class Waiting:
    """What a layer is run without: its input (B, S, D), the book of it, and what will be asked for the gate."""

    x: Tensor
    rows: Rows
    memory: dict[str, Tensor]
    answer: Assignment
    make: Callable[[], Tensor | None]

    @functools.cached_property
    def gate(self) -> Tensor | None:
        """(B, S) with gradient, or None."""
        return self.make()


def set_aside(now: Forward, layer: int, x: Tensor, answer: Assignment, gate: Callable[[], Tensor | None]) -> Tensor:
    """The rows that go through `layer`; the others wait for `LayerExit`."""
    now.notes.waiting[layer] = Waiting(x, replace(now.rows), now.notes.memory, answer, gate)
    return rewrite(now, x, answer, for_good=False)


def gate_of(name: str, method: DecoderMethod, view: LayerView, answer: Assignment) -> Tensor | None:
    """(B, S) what `method.gate` says of the rows of a view; 1 where rows go through as in a bare model.

    Those are generated rows, whose steps with a cache know of no gate, and the samples none of whose rows wait: alone
    they would not be asked about.

    Raises:
        ValueError: it says something else.
    """
    gate = method.gate(view, answer)
    if gate is None:
        return None
    if gate.shape != view.valid.shape:
        raise ValueError(
            f"method={name!r} gave a gate of shape {tuple(gate.shape)}; it must be (B, S) = {tuple(view.valid.shape)}"
        )
    waits = (view.valid & ~answer.stays(view.valid.shape[1]).to(view.valid.device)).any(1, keepdim=True)
    return gate.masked_fill((~waits | view.generated).to(gate.device), 1.0)


class LayerExit:
    """Forward hook of a decoder layer: rows that waited come back to their places."""

    def __init__(self, context: Context, layer: int):
        self.context, self.layer = context, layer

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        now = self.context.state.forward
        waiting = None if now is None else now.notes.waiting.pop(self.layer, None)
        if now is None or waiting is None:
            return None
        held = now.rows.held
        now.rows, now.notes.memory = waiting.rows, waiting.memory
        now.rows.held = held
        now.notes.records.pop(self.layer, None)  # of other rows than those alive now
        y = out[0] if isinstance(out, tuple) else out
        gate, answer, x = waiting.gate, waiting.answer, waiting.x
        kept, method = answer.kept.to(x.device), self.context.decoder_method
        if gate is not None and method is not None and method.gates == "mlp":
            x = x * gate.to(x.device)[..., None].to(x.dtype)
        elif gate is not None:
            before = Assignment(kept).pick(x)
            y = before + gate.to(x.device).gather(1, kept)[..., None].to(x.dtype) * (y - before)
        real = torch.ones_like(kept, dtype=torch.bool) if answer.valid is None else answer.valid.to(x.device)
        b, k = real.nonzero().unbind(1)  # fillers are rows that wait: what stands there must not be touched
        full = x.index_put((b, kept[b, k]), y[b, k])
        return (full, *out[1:]) if isinstance(out, tuple) else full


class MlpGate:
    """Forward hook of what a decoder layer adds last: what its MLP gives counts by the gate."""

    def __init__(self, context: Context, layer: int):
        self.context, self.layer = context, layer

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        now = self.context.state.forward
        waiting: Waiting | None = None if now is None else now.notes.waiting.get(self.layer)
        if waiting is None or waiting.gate is None:
            return None
        y = out[0] if isinstance(out, tuple) else out
        y = y * waiting.gate.gather(1, waiting.answer.kept.to(waiting.gate.device))[..., None].to(y)
        return (y, *out[1:]) if isinstance(out, tuple) else y
