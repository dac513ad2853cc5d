"""What a vision method sees: sequences of visual tokens, and what the vision tower left behind of them."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress import registry
from hf_compress.engine import content
from hf_compress.engine.encoded import Encoded, Setting
from hf_compress.engine.stage import Budgeted
from hf_compress.engine.trained import module_of
from hf_compress.patches.base import Architecture, Box, Crops, Grid, TowerCall, Unit, each
from hf_compress.signals import LOOKS, QUESTION, Read
from hf_compress.tensors.attention import Record, received, rows_attention
from hf_compress.tensors.draw import key

ROWS = ("cls", "mean", "all")
STATES = ("key", "value", "hidden")
HEADS = ("mean", "all")


class UnitTokens:
    """Sequences of units of one shape, batched: the `Tokens` that a method sees.

    Args:
        sequences: which of the units of the call are the parts of each.
    """

    def __init__(
        self,
        stage: Budgeted,
        adapter: Architecture,
        model: nn.Module,
        encoded: Encoded,
        setting: Setting,
        sequences: list[list[int]],
    ):
        self._stage, self._adapter, self._model, self._encoded = stage, adapter, model, encoded
        self._setting, self._sequences = setting, sequences
        self._units: list[Unit] = [encoded.units[i] for parts in sequences for i in parts]
        self._parts = self._units[: len(sequences[0])]
        self.device = encoded.images[self._units[0].image].device
        self.pooled = any(unit.pooled for unit in self._parts)

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def module(self) -> nn.Module | None:
        return module_of(self._model, "vision")

    @property
    def losses(self) -> list[Tensor]:
        return self._setting.losses

    @property
    def count(self) -> int:
        return sum(len(unit.rows) for unit in self._parts)

    @property
    def grids(self) -> list[Grid]:
        grids = [unit.grid for unit in self._parts if unit.grid is not None]
        if len(grids) < len(self._parts):
            raise ValueError(
                f"method={self._stage.name!r} needs the token grid of the images, which mm_encoder_outputs alone does "
                "not tell; pass the grid argument of the model too (image_grid_thw), or pixel_values"
            )
        return grids

    @property
    def grid(self) -> Grid:
        (grid,) = self.grids
        return grid

    @property
    def place(self) -> Tensor:
        cells = [torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2) for h, w in self.grids]
        number = content.numbers(self._encoded)
        parts = [[number[parts[0]]] if len(parts) == 1 else range(len(parts)) for parts in self._sequences]
        rows = [F.pad(mine, (1, 0), value=i) for numbers in parts for i, mine in zip(numbers, cells)]
        return self._join(rows).to(self.device)

    @property
    def boxes(self) -> list[Box]:
        boxes = [unit.box for unit in self._parts if unit.box is not None]
        if len(boxes) < len(self._parts):
            kind = type(self._model).__name__
            raise ValueError(
                f"method={self._stage.name!r}: where the tiles of a picture lie in it is not told to {kind}"
            )
        return boxes

    @property
    def image(self) -> Tensor:
        nth = self._setting.ordinals
        return self._join([torch.full_like(unit.rows, nth[unit.image]) for unit in self._units]).to(self.device)

    @property
    def content(self) -> Tensor:
        number, nth = content.numbers(self._encoded), self._setting.ordinals
        every = [i for parts in self._sequences for i in parts]
        tags = [(u.image, number[i], nth[u.image]) for u, i in zip(self._units, every)]
        image, number_, ordinal = torch.tensor(tags, device=self.device).unbind(1)
        shown = content.of_images(self._adapter, self._model, self._encoded).to(self.device)
        return key(shown[image], number_, ordinal).view(len(self), -1).sum(1)

    @property
    def embeddings(self) -> Tensor:
        whole = [self._encoded.images[u.image] for u in self._units]
        return self._join([x if len(x) == len(u.rows) else x[u.rows] for x, u in zip(whole, self._units)])

    @property
    def features(self) -> Tensor:
        return self._stack(self._adapter.features(self._model, self._call()))

    @property
    def pixels(self) -> Tensor:
        return self._stack(self._adapter.token_pixels(self._model, self._call()))

    def attention(
        self,
        back: int = 0,
        *,
        rows: str = "cls",
        surrogate: str | None = None,
        logits: bool = False,
        heads: str = "each",
    ) -> Tensor:
        _check(self._stage.name, "heads", heads, ("each", "all"))
        rows = row_kind(self._stage.name, rows, surrogate, bool(self._adapter.cls_tokens(self._model)))
        call, records = self._read("attention", back)
        if heads == "all":
            records = [as_one(record) for record in records]
        return self._stack(attention(self._adapter, self._model, call, records, rows, logits)).transpose(1, 2)

    def states(self, what: str, back: int = 0, *, heads: str = "mean") -> Tensor:
        _check(self._stage.name, "what", what, STATES)
        _check(self._stage.name, "heads", heads, HEADS)
        call, found = self._read(what, back)
        return self._stack(states(self._adapter, self._model, call, found, heads))

    @property
    def depth(self) -> int:
        return len(self._call().blocks)

    def whole(self, what: str, back: int = 0) -> Tensor:
        _check(self._stage.name, "what", what, STATES)
        _, found = self._read(what, back)
        if self._adapter.cls_tokens(self._model):
            first = rows_of(found)[:, 0].float()
            parts = [first[unit.crop : unit.crop + unit.crops].mean(0) for unit in self._units]
            return torch.stack(parts).unflatten(0, (len(self), -1))
        x, weight = self.states(what, back).float(), self.attention(back, rows="all").mean(1)
        sizes = [len(unit.rows) for unit in self._parts]
        weights = [w / w.sum(1, keepdim=True) for w in weight.split(sizes, 1)]
        return torch.cat([w[:, None] @ part for w, part in zip(weights, x.split(sizes, 1))], 1)

    @property
    def question(self) -> tuple[Tensor, Tensor]:
        asked = self._setting.question
        if asked is None:
            raise self._undeclared("the question", QUESTION)
        first = self._units[:: len(self._parts)]
        at = torch.tensor([u.image for u in first], device=asked.ids.device)
        ids, real = asked.ids[at], asked.real[at]
        ids, real = (t[:, t.shape[1] - int(real.sum(1).max()) :] for t in (ids, real))  # padded at the left
        text = self._adapter.decoder(self._model).get_input_embeddings()(ids)
        return text.to(self.device), real.to(self.device)

    def looked_at(self, layer: int, rows: str = "last") -> Tensor:
        _check(self._stage.name, "rows", rows, LOOKS)
        looks = self._setting.looks
        if looks is None or layer not in looks.ahead.layers:
            what = f"what the prompt looks at in layer {layer} of the language model"
            raise self._undeclared(what, Read("layer", layer, "attention"))
        return looks.attention(layer, rows, self._sequences, self._encoded.sizes).to(self.device)

    def _undeclared(self, what: str, read: Any) -> ValueError:
        return ValueError(f"method={self._stage.name!r} asks for {what} but its reads() does not name {read}")

    def _read(self, what: str, back: int) -> tuple[TowerCall, list[Any]]:
        """What the calls of one block left behind."""
        call = self._call()
        found = call.reads.get((call.blocks[-1 - back], what)) if 0 <= back < len(call.blocks) else None
        if found is None:
            raise self._undeclared(f"{what!r} of block {back} of the tower", f"Read('tower', {back}, {what!r})")
        return call, found

    def _call(self) -> TowerCall:
        if self._encoded.call is None:
            others = [s.name for s in registry.methods("vision").values() if "cls" not in s.needs]
            raise ValueError(
                f"method={self._stage.name!r} reads the vision tower, but mm_encoder_outputs was computed elsewhere; "
                f"pass pixel_values, or use a method that needs the embeddings only: {others}"
            )
        return self._encoded.call

    def _stack(self, crops: Crops) -> Tensor:
        in_order = all(unit.crop == i and unit.source is None for i, unit in enumerate(self._units))
        if isinstance(crops, Tensor) and in_order and len(crops) == len(self._units):
            return crops.reshape(len(self), -1, *crops.shape[2:])
        return self._join([unit.read(crops) for unit in self._units])

    def _join(self, rows: list[Tensor]) -> Tensor:
        """(n, N, ...) of those of every unit."""
        parts = len(self._parts)
        if parts > 1:
            rows = [torch.cat(rows[i : i + parts]) for i in range(0, len(rows), parts)]
        return torch.stack(rows)


def row_kind(method: str, rows: str, surrogate: str | None, has_cls: bool) -> str:
    """Which of `ROWS` is meant on a tower with or without [CLS].

    Raises:
        ValueError: it is none of them, or [CLS] is asked for where there is none.
    """
    _check(method, "rows", rows, ROWS)
    if rows != "cls" or has_cls:
        return rows
    if surrogate not in ROWS[1:]:
        raise ValueError(
            f"rows='cls': the vision tower has no [CLS], so that method={method!r} has to name a surrogate="
            f"{surrogate!r} that is one of {ROWS[1:]}"
        )
    return surrogate


def _check(method: str, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} asked for by method={method!r} must be one of {known}")


def attention(
    adapter: Architecture, model: nn.Module, call: TowerCall, records: list[Record], rows: str, logits: bool = False
) -> Crops:
    """(N, H) fp32 per crop: what rows of the attention of one block give to every token.

    Args:
        records: of every call of its kernel; rows: one of `ROWS`; logits: before the softmax.
    """
    read = functools.partial(given, rows=rows, logits=logits, skip=adapter.cls_tokens(model), real=adapter.real(call))
    sizes = adapter.packed(model, call)
    if sizes is not None and len(records) < len(sizes):  # kernels for packed sequences attend to all crops in one call
        ((query, keys, scaling),) = records
        records = [(q, k, scaling) for q, k in zip(query.split(sizes, 2), keys.split(sizes, 2))]
    return _tokens(adapter, model, call, torch.cat([read(*record) for record in records], 2).mT)


def as_one(record: Record) -> Record:
    """Queries and keys (B, H, P, d) of all heads as those of one, (B, 1, P, H * d)."""
    query, keys, scaling = record
    one, other = (x.transpose(1, 2).flatten(2)[:, None] for x in (query, keys))
    return one, other, scaling / math.sqrt(query.shape[1])


def states(adapter: Architecture, model: nn.Module, call: TowerCall, found: list[Tensor], heads: str = "mean") -> Crops:
    """(N, d) per crop: keys or values (B, H, P, d) of one block by `HEADS`, or its hidden states."""
    if heads == "all":
        found = [x.transpose(1, 2).flatten(2) if x.ndim == 4 else x for x in found]
    return _tokens(adapter, model, call, rows_of(found)[:, adapter.cls_tokens(model) :])


def rows_of(found: list[Tensor]) -> Tensor:
    """(B, P, d): the same of every row of the tower, [CLS] first."""
    return torch.cat([x.mean(1) if x.ndim == 4 else x if x.ndim == 3 else x[None] for x in found], 1)


def _tokens(adapter: Architecture, model: nn.Module, call: TowerCall, x: Tensor) -> Crops:
    """Signals of patches as those of tokens: the mean over the patches that one joins."""
    joined = adapter.per_token(model, call, x)
    return each(lambda tokens: tokens.mean(-2) if tokens.shape[-2] > 1 else tokens[..., 0, :], joined)


def given(
    query: Tensor, keys: Tensor, scaling: float, *, rows: str, logits: bool, skip: int, real: Tensor | None
) -> Tensor:
    """(B, H, P): the attention of `rows` on the patches behind `skip` rows of [CLS], of which some may be padding."""
    if rows == "all":
        total = received(query, keys, scaling, real)[:, :, skip:]
        return total.log() if logits else total
    if rows == "cls":
        row = query[:, :, :1]
    elif real is None:
        row = query[:, :, skip:].float().mean(2, keepdim=True)
    else:
        row = (query.float() * real[:, None, :, None]).sum(2, keepdim=True) / real.sum(1)[:, None, None, None]
    row = row.to(query.dtype)
    if logits:
        return (row @ keys.mT).float()[:, :, 0, skip:] * scaling
    see = None if real is None else real[:, None, None]
    return rows_attention(row, keys, scaling, see)[:, :, 0, skip:]
