"""The entries of one layer as methods see them: keys, values, order, and attention rows of the prompt on request."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.engine.masks import visible
from hf_compress.engine.rotary import Rotary, turn
from hf_compress.engine.trained import Module, untrained
from hf_compress.layout import HeadLayout, Layout
from hf_compress.stores import HeldLayer
from hf_compress.tensors.attention import Record, column_sums, group_mean, rows_attention


@dataclass
class Rows:
    """The entries of one layer as each of several new rows finds them, were it alone: an `Order`."""

    depth: int
    depths: int
    valid: Tensor  # (B, 1 or Hkv, 1, S)
    order: Tensor  # (B, 1 or Hkv, 1, S)
    lengths: Tensor  # (B, 1 or Hkv, q, 1), entries before each row
    budget: Tensor  # (B, 1 or Hkv, 1, 1)
    cursor: Tensor | int | None  # (B, 1, 1, 1)
    incoming: int = 1  # the row itself


class StoredView:
    """The entries of one layer: the `CacheView` that a method sees.

    Args:
        budget: (B,) or (B, Hkv); or a number, of a full cache whose slots may stand in any order.
        prompt: the layout of the prompt while it is still whole, and `record` its (query, key, scaling); both None
            while decoding.
        rotary: cos and sin of the prompt's rows, and `rotate` the function of the model that applies them.
        place: how many of the layers that the method acts on come before this one, and how many there are.
        content: (B,) int64, of methods that draw.
        module: gives what the method trains, as it is now.
    """

    def __init__(
        self,
        held: HeldLayer,
        layer: int,
        layers: int,
        budget: Tensor | int,
        prompt: Layout | None = None,
        record: Record | None = None,
        rotary: Rotary | None = None,
        place: tuple[int, int] = (0, 1),
        content: Tensor | None = None,
        module: Module = untrained,
    ):
        assert held.layout is not None
        self._module = module
        self.held, self._prompt, self._record, self._rotary = held, prompt, record, rotary
        self._made: dict[str, Tensor] = {}
        self._content, self.layer, self.layers = content, layer, layers
        self.depth, self.depths = place
        self.incoming = int(prompt is None)
        self.budget: Any
        self.lengths: Any
        self._entries = None if prompt is None else held.whole()  # as attention saw them; later few methods ask
        self.shape = (*held.keys.shape[:2], len(held.layout))
        self.scores, self.votes = held.side.get("scores"), held.side.get("votes")
        self.sums: Tensor | None = None  # those of all rows of the prompt, where its attention gave them
        cursor = None if held.quota is None else held.quota.cursor
        self.cursor = cursor[:, None, None] if torch.is_tensor(cursor) else cursor
        self.valid, self.order, self.lengths = _ranks(held.layout, self.shape[0])
        if isinstance(budget, int):
            assert isinstance(held.layout, HeadLayout)
            self.budget, self.order, self.lengths = budget, held.layout.numbers, held.layout.came
        else:
            self.budget = budget.view(len(budget), -1, 1)

    @property
    def prompt_lengths(self) -> Tensor:
        """(B,) entries of each row of the prompt, on the host."""
        assert self._prompt is not None
        return on_host(self._prompt)

    @property
    def module(self) -> nn.Module | None:
        return self._module()

    def once(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def keys(self) -> Tensor:
        return self._whole()[0]

    @property
    def values(self) -> Tensor:
        return self._whole()[1]

    def _whole(self) -> tuple[Tensor, Tensor]:
        if self._entries is None:
            self._entries = self.held.whole()
        return self._entries

    @property
    def visual(self) -> Tensor:
        image = self._layout.image
        return (image if image.ndim == 3 else image[:, None]) >= 0

    @property
    def content(self) -> Tensor:
        if self._content is None:
            raise RuntimeError("what a prompt holds is known at its end only, to methods that read it")
        return self._content.to(self.valid.device, non_blocking=True)

    @property
    def position(self) -> Tensor:
        position = self._layout.position
        return position if position.ndim == 3 else position[:, None]

    @property
    def _layout(self) -> Layout:
        assert self.held.layout is not None
        return self.held.layout

    def _whole_prompt(self) -> tuple[Layout, Tensor, float]:
        if self._record is None or self._prompt is None:
            raise RuntimeError("attention rows can be read at the end of the prompt only")
        return self._prompt, self._record[0], self._record[2]

    @property
    def queries(self) -> Tensor:
        return self._whole_prompt()[1]

    @property
    def scaling(self) -> float:
        return self._whole_prompt()[2]

    def unrotate(self, x: Tensor) -> Tensor:
        if self._rotary is None:
            raise RuntimeError("rotations can be undone at the end of the prompt only")
        return self._rotary.back(x)

    def rotate(self, x: Tensor) -> Tensor:
        if self._rotary is None:
            raise RuntimeError("rotations can be redone at the end of the prompt only")
        return self._rotary.apply(x)

    @property
    def rotation(self) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        if self._rotary is None:
            raise RuntimeError("rotations can be read at the end of the prompt only")
        return self._rotary.cos, self._rotary.sin, functools.partial(turn, self._rotary.function)

    def future_rotation(self, count: int) -> Tensor:
        if self._rotary is None:
            raise RuntimeError("rotations can be foreseen at the end of the prompt only")
        return self._rotary.ahead(count, self.keys.shape[-1]).to(self.keys.device)

    def window_rows(self, rows: Tensor) -> Tensor:
        prompt, query, scaling = self._whole_prompt()
        window = self.held.window
        at, real, see = prompt.derive(("newest", tuple(rows.tolist()), window), lambda: _newest(prompt, rows, window))
        q = query.gather(2, at[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1]))
        return rows_attention(q, self.keys, scaling, see) * real

    def window_attention(self, rows: Tensor) -> Tensor:
        return group_mean(self.window_rows(rows).sum(2), self.keys.shape[1])

    def column_sums(self, *, normalize: bool = False, weight: Tensor | None = None) -> Tensor:
        prompt = self._whole_prompt()[0]
        every = prompt.valid.float()
        if weight is None and self.sums is not None:
            sums, weight = self.sums, every
        else:
            weight = every if weight is None else weight * every
            sums = self._sum_up(weight)
        if not normalize:
            return sums
        after = weight.flip(1).cumsum(1).flip(1)[:, None]  # an entry is seen by itself and every later row
        return sums / after.clamp(min=torch.finfo(torch.float32).tiny)

    def _sum_up(self, weight: Tensor) -> Tensor:
        (prompt, query, scaling), at = self._whole_prompt(), None
        rows = prompt
        if (n := int(weight.ne(0).sum(1).max())) < len(prompt):  # what counts in no sample is not computed
            at = weight.ne(0).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :n]
            query = query.gather(2, at[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1]))
            rows, weight = prompt.gather(at), weight.gather(1, at)
        sight = Sight(prompt, rows, self.held.window, at)
        return column_sums(query, self.keys, scaling, sight, weight, sight.ends)


class Sight:
    """What rows of a layer see of its keys, block by block: arguments of `column_sums`.

    Args:
        rows: the newest slots of `keys`, or those at the slots `at` (B, q).

    Attributes:
        ends: of every row, how many keys stand up to its own.
    """

    def __init__(self, keys: Layout, rows: Layout, window: int | None, at: Tensor | None = None):
        S, q = len(keys), len(rows)
        self.keys, self.rows, self.window = keys, rows, window
        self.ends = list(range(S - q + 1, S + 1)) if at is None else (at.amax(0) + 1).tolist()
        starts = self.ends if at is None else (at.amin(0) + 1).tolist()
        everything = keys.all_valid and window is None and not keys.per_head  # that stands before a row
        self._causal = everything and at is None
        if not everything:
            starts = [0] * q
        if keys.per_head:
            self.ends = [S] * q
        self._starts = starts

    def __call__(self, part: slice) -> Tensor:
        """(B, 1 or Hkv, rows, m) bool, of the newest m of the keys that the rows reach; they see all older ones."""
        stop, start = max(self.ends[part]), min(self._starts[part])
        if self._causal:
            rows = stop - start + 1
            own = torch.ones(rows, rows, dtype=torch.bool, device=self.rows.device).tril()
            return own.expand(len(self.rows.removed), 1, -1, -1)
        keys = self.keys if stop == len(self.keys) else self.keys.crop(len(self.keys) - stop)
        if start:
            keys = keys.tail(stop - start + 1)
        if len(self.rows) == 1:
            return visible(keys, self.rows, self.window, None)
        at = torch.arange(len(self.rows), device=self.rows.device)[part].expand(len(self.rows.valid), -1)
        return visible(keys, self.rows.gather(at), self.window, None)


def on_host(prompt: Layout) -> Tensor:
    """(B,) valid rows on the host, where counts are settled: a device that is asked has to finish first."""

    def count() -> Tensor:
        if prompt.all_valid:
            return torch.full((len(prompt.removed),), len(prompt))
        return prompt.valid.sum(-1).cpu()

    return prompt.derive("rows", count)


def _newest(prompt: Layout, rows: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The newest rows[b] valid rows of each sample: (B, w) indices, which of them are real, what they see."""
    newest = prompt.valid.long().flip(1).cumsum(1).flip(1)  # 1 on the newest valid row, 2 on the one before ...
    inside = prompt.valid & (newest <= rows[:, None])
    at = inside.long().argsort(dim=1, stable=True)[:, -int(rows.max()) :]  # short rows are filled up in front
    return at, inside.gather(1, at)[:, None, :, None], visible(prompt, prompt.gather(at), window, None)


def _ranks(layout: Layout, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the slots of so many rows, (B, 1 or Hkv, S): which are valid, their order; and (B, 1 or Hkv, 1) lengths."""
    if layout.all_valid:  # nothing to look up, whatever the heads hold
        return in_order(rows, len(layout), layout.device)
    valid = layout.valid if layout.per_head else layout.valid[:, None]
    order = layout.derive("order", lambda: valid.long().cumsum(-1) - 1)
    return valid, order, layout.derive("lengths", lambda: valid.sum(-1, keepdim=True))


@functools.lru_cache(maxsize=8)  # a cache that is held at its budget asks for the same at every layer and step
def in_order(rows: int, slots: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What `_ranks` says of slots that are all valid and stand from the oldest to the newest."""
    with torch.inference_mode(False):  # they may be asked for again where gradients are wanted
        every = torch.arange(slots, device=device).expand(rows, 1, -1)
        return torch.ones_like(every, dtype=torch.bool), every, torch.full_like(every[..., :1], slots)
