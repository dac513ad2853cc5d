"""What a vision method sees: sequences of visual tokens, and what the vision tower left behind of them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress import registry
from hf_compress.engine import content
from hf_compress.engine.encoded import Encoded, Setting
from hf_compress.engine.stage import Budgeted
from hf_compress.engine.trained import module_of
from hf_compress.patches.base import Architecture, Crops, Grid, TowerCall, Unit, each
from hf_compress.signals import QUESTION
from hf_compress.tensors.attention import Record, received, rows_attention
from hf_compress.tensors.draw import key

ROWS = ("cls", "mean", "all")
STATES = ("key", "value", "hidden")


class UnitTokens:
    """Units of one shape, batched: the `Tokens` that a method sees.

    Args:
        members: which of the units of the call.
    """

    def __init__(
        self,
        stage: Budgeted,
        adapter: Architecture,
        model: nn.Module,
        encoded: Encoded,
        setting: Setting,
        members: list[int],
    ):
        self._stage, self._adapter, self._model, self._encoded = stage, adapter, model, encoded
        self._setting, self._members = setting, members
        self._units: list[Unit] = [encoded.units[i] for i in members]
        self.device = encoded.images[self._units[0].image].device
        self.pooled = self._units[0].pooled

    def __len__(self) -> int:
        return len(self._units)

    @property
    def module(self) -> nn.Module | None:
        return module_of(self._model, "vision")

    @property
    def losses(self) -> list[Tensor]:
        return self._setting.losses

    @property
    def count(self) -> int:
        return len(self._units[0].rows)

    @property
    def grid(self) -> Grid:
        grid = self._units[0].grid
        if grid is None:
            raise ValueError(
                f"method={self._stage.name!r} needs the token grid of the images, which mm_encoder_outputs alone does "
                "not tell; pass the grid argument of the model too (image_grid_thw), or pixel_values"
            )
        return grid

    @property
    def place(self) -> Tensor:
        h, w = self.grid
        cells = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2)
        number = content.numbers(self._encoded)
        parts = torch.tensor([number[i] for i in self._members])[:, None, None].expand(-1, h * w, 1)
        return torch.cat([parts, cells.expand(len(parts), -1, -1)], 2).to(self.device)

    @property
    def content(self) -> Tensor:
        number, nth = content.numbers(self._encoded), self._setting.ordinals
        tags = [(u.image, number[i], nth[u.image]) for u, i in zip(self._units, self._members)]
        image, number_, ordinal = torch.tensor(tags, device=self.device).unbind(1)
        shown = content.of_images(self._adapter, self._model, self._encoded).to(self.device)
        return key(shown[image], number_, ordinal)

    @property
    def embeddings(self) -> Tensor:
        whole = [self._encoded.images[u.image] for u in self._units]
        return torch.stack([x if len(x) == len(u.rows) else x[u.rows] for x, u in zip(whole, self._units)])

    @property
    def features(self) -> Tensor:
        return self._stack(self._adapter.features(self._model, self._call()))

    def attention(self, back: int = 0, *, rows: str = "cls", surrogate: str | None = None) -> Tensor:
        self._check("rows", rows, ROWS)
        if rows == "cls" and not self._adapter.cls_tokens(self._model):
            if surrogate not in ROWS[1:]:
                raise ValueError(
                    f"rows='cls': the vision tower of {type(self._model).__name__} has no [CLS], so that method="
                    f"{self._stage.name!r} has to name a surrogate={surrogate!r} that is one of {ROWS[1:]}"
                )
            rows = surrogate
        call, records = self._read("attention", back)
        return self._stack(attention(self._adapter, self._model, call, records, rows)).transpose(1, 2)

    def states(self, what: str, back: int = 0) -> Tensor:
        self._check("what", what, STATES)
        call, found = self._read(what, back)
        return self._stack(states(self._adapter, self._model, call, found))

    @property
    def question(self) -> tuple[Tensor, Tensor]:
        asked = self._setting.question
        if asked is None:
            raise self._undeclared("the question", QUESTION)
        at = torch.tensor([u.image for u in self._units], device=asked.ids.device)
        ids, real = asked.ids[at], asked.real[at]
        ids, real = (t[:, t.shape[1] - int(real.sum(1).max()) :] for t in (ids, real))  # padded at the left
        text = self._adapter.decoder(self._model).get_input_embeddings()(ids)
        return text.to(self.device), real.to(self.device)

    def _check(self, name: str, value: str, known: tuple[str, ...]) -> None:
        if value not in known:
            raise ValueError(f"{name}={value!r} asked for by method={self._stage.name!r} must be one of {known}")

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
            return crops
        return torch.stack([unit.read(crops) for unit in self._units])


def attention(adapter: Architecture, model: nn.Module, call: TowerCall, records: list[Record], rows: str) -> Crops:
    """(N, H) fp32 per crop: what rows of the attention of one block give to every token.

    Args:
        records: of every call of its kernel; rows: one of `ROWS`.
    """
    read = functools.partial(_given, rows=rows, skip=adapter.cls_tokens(model), real=adapter.real(call))
    sizes = adapter.packed(model, call)
    if sizes is not None and len(records) < len(sizes):  # kernels for packed sequences attend to all crops in one call
        ((query, keys, scaling),) = records
        records = [(q, k, scaling) for q, k in zip(query.split(sizes, 2), keys.split(sizes, 2))]
    return _tokens(adapter, model, call, torch.cat([read(*record) for record in records], 2).mT)


def states(adapter: Architecture, model: nn.Module, call: TowerCall, found: list[Tensor]) -> Crops:
    """(N, d) per crop: keys or values (B, H, P, d) of one block, their mean over the heads, or its hidden states."""
    heads = [x.mean(1) if x.ndim == 4 else x if x.ndim == 3 else x[None] for x in found]
    return _tokens(adapter, model, call, torch.cat(heads, 1)[:, adapter.cls_tokens(model) :])


def _tokens(adapter: Architecture, model: nn.Module, call: TowerCall, x: Tensor) -> Crops:
    """Signals of patches as those of tokens: the mean over the patches that one joins."""
    joined = adapter.per_token(model, call, x)
    return each(lambda tokens: tokens.mean(-2) if tokens.shape[-2] > 1 else tokens[..., 0, :], joined)


def _given(query: Tensor, keys: Tensor, scaling: float, *, rows: str, skip: int, real: Tensor | None) -> Tensor:
    """(B, H, P): the attention of `rows` on the patches behind `skip` rows of [CLS], of which some may be padding."""
    if rows == "all":
        return received(query, keys, scaling, real)[:, :, skip:]
    if rows == "cls":
        row = query[:, :, :1]
    elif real is None:
        row = query[:, :, skip:].float().mean(2, keepdim=True)
    else:
        row = (query.float() * real[:, None, :, None]).sum(2, keepdim=True) / real.sum(1)[:, None, None, None]
    see = None if real is None else real[:, None, None]
    return rows_attention(row.to(query.dtype), keys, scaling, see)[:, :, 0, skip:]
