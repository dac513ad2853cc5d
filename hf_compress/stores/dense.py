"""The cache layer of a compressed model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hf_compress import kernels
from hf_compress.layout import HeadLayout, Layout, NextRows
from hf_compress.stores.body import Body
from hf_compress.stores.crop import croppable
from hf_compress.stores.quota import Quota
from hf_compress.stores.ragged import Ragged, attend, visible
from hf_compress.stores.room import Rooms
from hf_compress.tensors.ambient import own_precision
from hf_compress.tensors.kvmerge import take


class Coming(NamedTuple):
    """What the next `update` appends: see `HeldLayer.announce`."""

    layout: Layout
    places: Any = None
    direct: bool = False


class HeldLayer(DynamicLayer):
    """Keys and values of one layer with the layout of their slots: a compressed body, if any, and a dense tail.

    `keys` and `values` are the tail: all entries, until a method packs the prompt into `body`. `get_seq_length`
    answers what the caller has fed, `get_mask_sizes` what is stored, as transformers' own sliding-window layer does.

    Args:
        window: of a sliding layer; older slots are dropped when the next token arrives.
        filled_by: the compression that fills the layer; no other may continue it.

    Attributes:
        body: of keys and of values; their tails may differ in length.
        side: by name, tensors (B, Hkv, S), or of the newest slots only, that move with the slots; new slots have zeros.
        quota: set when the prompt was evicted.
        turned: whether keys are stored rotated; else `update` rotates them all by their places.
        in_place: whether `attend` reads the entries where they are: what `update` gave is then the tail alone.
        dropped: whether slots have left the window.
        turn: how many rows had been fed when the newest prompt ended.
        slack: how many more than the window reaches are held, of tokens that may be taken back.
        siblings: all layers of the cache; copies and pickles do without.
    """

    keys: Tensor  # None until the first update, as in transformers
    values: Tensor
    is_croppable = True
    turned = True
    in_place = False
    dropped = False
    turn = 0
    slack = 0
    siblings: Sequence[weakref.ref[HeldLayer]] = ()

    def __init__(self, window: int | None = None, filled_by: str = ""):
        super().__init__()
        self.window, self.filled_by = window, filled_by
        self.layout: Layout | None = None
        self.body: tuple[Body, Body] | None = None
        self.side: dict[str, Tensor] = {}
        self.quota: Quota | None = None
        self._coming: Coming | None = None
        self._free: Tensor | None = None  # (B, Hkv, 1) where the next token goes
        self._rooms = Rooms()

    @property
    def is_sliding(self) -> bool:  # type: ignore[override]
        return self.window is not None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "siblings": ()}

    def announce(self, layout: Layout, places: Any = None, direct: bool = False) -> None:
        """What the next `update` appends; called by the engine before the layer runs.

        Args:
            places: `Rotary` of all slots, the new ones included, where keys are not stored rotated.
            direct: attention will ask `attend`, where that reads what is stored.
        """
        self._coming = Coming(layout, places, direct)

    def pass_by(self, rows: int) -> None:
        """`rows` were fed that do not come to this layer."""
        self._coming = None
        if self.layout is not None:
            self.layout = self.layout.passed(rows)

    def unturn(self, rotary: Any) -> None:
        """Store the keys before their rotation (`Rotary` of all slots) from now on."""
        self.keys, self.turned = rotary.back(self.keys), False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, Hkv, q, d); returns all that is stored, or `attend` is asked to read it.

        Raises:
            RuntimeError: the engine did not announce the rows: the model is no longer compressed as it was.
        """
        coming, self._coming = self._coming, None
        if coming is None:
            raise RuntimeError(
                "this KV cache was filled by a compressed model and cannot be continued without its compression; "
                "compress the model in the same way again, or start with a new cache"
            )
        self._leave_behind()
        self.layout = self.next_layout(coming.layout).to(key_states.device)
        if not self.turned:
            key_states = coming.places.newest(key_states.shape[-2]).back(key_states)
        if not self.is_initialized:
            super().update(key_states, value_states)
        elif self._free is not None:
            self._overwrite(key_states, value_states)
            return self.keys, self.values
        else:
            self.keys = self._rooms.append("keys", self.keys, key_states)
            self.values = self._rooms.append("values", self.values, value_states)
        self._slots(lambda t: torch.cat([t, t.new_zeros(*t.shape[:2], key_states.shape[-2])], -1))
        self.in_place = coming.direct and (self.by_segments or self._by_kernel(key_states))
        if self.in_place:
            return self.keys, self.values
        keys, values = self.whole()
        return keys if self.turned else coming.places.apply(keys), values

    def _leave_behind(self) -> bool:
        """Let go of the slots that the window cannot reach any more; whether there were any."""
        if self.layout is None or (n := self.held()) == len(self.layout):
            return False
        first = len(self.layout) - n
        self.keys, self.values = self.keys[:, :, first:], self.values[:, :, first:]
        self._slots(lambda t: t[:, :, first:])
        self.layout, self.dropped = self.layout.tail(n), True
        return True

    def bound(self) -> None:
        """Hold no more than the window reaches, already before the next token."""
        if self._leave_behind():
            self.keys, self.values = self.keys.clone(), self.values.clone()

    def rest(self) -> None:
        """Between forwards: nothing stays that only the prompt needed."""
        if self.layout is not None:
            self.layout.rest()

    @property
    def replaceable(self) -> bool:
        """Whether entries can be replaced one by one."""
        assert self.layout is not None
        whole = self.body is None and self.layout.per_head and self.layout.all_valid
        return whole and self.turned and not self.keys.requires_grad

    def replace(self, slot: Tensor, quota: Quota) -> None:
        """The next token takes the place of one entry of every head: nothing else is copied.

        Args:
            slot: (B, 1 or Hkv, 1), where that entry is.
            quota: what is known of the budget and of the order of the slots then.
        """
        self._free = slot = slot.expand(*self.keys.shape[:2], -1)
        self.quota = quota
        self._slots(lambda t: t.scatter(2, slot, 0))

    def _overwrite(self, key: Tensor, value: Tensor) -> None:
        assert self._free is not None
        slot, self._free = self._free[..., None], None
        for name, new in (("keys", key), ("values", value)):
            old, at = getattr(self, name), slot.expand_as(new)
            read = torch.is_grad_enabled() and new.requires_grad  # what was read must not change then
            setattr(self, name, old.scatter(2, at, new) if read else old.scatter_(2, at, new))

    def line_up(self) -> None:
        """Slots from the oldest to the newest again."""
        if self.quota is not None and not self.quota.in_order:
            assert isinstance(self.layout, HeadLayout)
            self.quota = replace(self.quota, in_order=True, ages=None)
            self.select(self.layout.numbers.argsort(-1))

    @property
    def by_segments(self) -> bool:
        """Whether `attend` reads the entries head by head, and needs no mask from outside."""
        return self.body is not None and isinstance(self.body[0], Ragged)

    def _by_kernel(self, new: Tensor) -> bool:
        """Whether a kernel reads the body for a `new` token (B, H, 1, d)."""
        return self.turned and self.body is not None and kernels.reads(self.body, new)

    @property
    def bias(self) -> Tensor | None:
        """(B, Hkv, n) fp32, what is added to the logits of the oldest n slots that `whole` gives; None: nothing."""
        return self.body[0].bias() if self.body is not None and isinstance(self.body[0], Ragged) else None

    @own_precision
    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """(B, q, Hq, d) attention of the newest q rows, queries (B, Hq, q, d), over all that is stored."""
        assert self.body is not None and self.layout is not None
        if self._by_kernel(query):
            return kernels.attend(query, scaling, self.body, (self.keys, self.values), self.layout)
        assert isinstance(self.layout, HeadLayout)
        keys, values = self.body
        assert isinstance(keys, Ragged) and isinstance(values, Ragged)
        see = visible(self.layout.newest(self.keys.shape[2]), query.shape[2])
        return attend(query, scaling, keys, values, (self.keys, self.values), see)

    @own_precision
    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, Hkv, S, d) of all slots, as stored; what is packed is unpacked for the moment."""
        if self.body is None:
            return self.keys, self.values
        keys, values = (part.read().to(t.dtype) for part, t in zip(self.body, (self.keys, self.values)))
        return torch.cat([keys, self.keys], 2), torch.cat([values, self.values], 2)

    def next_layout(self, new: Layout) -> Layout:
        """The layout that the next attention finds when `new` rows are appended."""
        old = self.layout
        if old is None:
            return new
        if self._free is not None:
            assert isinstance(old, HeadLayout)
            return old.replace(self._free, new)
        if (n := self.held()) < len(old):
            old = old.tail(n)
        return old.append(new)

    def held(self) -> int:
        """Number of slots that the next attention of this layer finds."""
        if self.layout is None:
            return 0
        return len(self.layout) if self.window is None else self.layout.within(self.window + self.slack)

    def tensors(self) -> list[Tensor]:
        """Everything that is stored for the entries: the tail, the packed body, which entries each head holds."""
        if not self.is_initialized:
            return []
        packed = [t for part in self.body or () for t in part.tensors()]
        mine = self.layout.tensors() if self.layout is not None else []
        tail = [self._rooms.whole("keys", self.keys), self._rooms.whole("values", self.values)]
        return [*tail, *packed, *mine]

    def nbytes(self) -> int:
        """Bytes that are really allocated for the entries held."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def get_seq_length(self) -> int:
        return 0 if self.layout is None else self.layout.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held() + query_length, self.get_seq_length() - self.held()

    def select(
        self,
        slots: Tensor,
        fillers: Tensor | None = None,
        merged: tuple[Tensor, Tensor] | None = None,
        room: int = 0,
    ) -> None:
        """Evict everything but `slots` (B, Hkv, n), ascending, all in a dense tail again.

        Args:
            fillers: (B, Hkv) how many of those in front only fill up.
            merged: keys and values (B, Hkv, n, d) to stand there, if they are not the entries themselves.
            room: free slots to leave behind them for what comes next.
        """
        assert self.layout is not None
        at = F.pad(slots, (0, room))
        kept = merged or (take(x, at) for x in self.whole())
        self.keys, self.values = (self._rooms.use(n, t, slots.shape[2]) for n, t in zip(("keys", "values"), kept))
        self.body = None
        self._slots(lambda t: t.gather(2, slots))
        self.layout = self.layout.pick(slots, fillers)

    def select_rows(self, rows: Tensor, valid: Tensor | None = None) -> None:
        """Drop everything but the slots `rows` (B, n), ascending, the same in all heads.

        Layers that shared a layout go on sharing it if they are given the same tensors.

        Args:
            valid: (B, n) bool, False on rows that only fill up; None: all are meant.

        Raises:
            ValueError: heads hold different entries already.
        """
        assert self.layout is not None
        if self.layout.per_head:
            raise ValueError("rows cannot be taken out of a cache whose heads hold different entries")
        at = rows.to(self.keys.device)[:, None].expand(-1, self.keys.shape[1], -1)
        self._rooms.clear()
        self.keys, self.values = (take(x, at) for x in self.whole())
        self.body = None
        self._slots(lambda t: t.gather(2, at))
        self.layout = self.layout.trim(rows, valid)

    def settle(self, counts: Tensor, cursor: Tensor | None) -> None:
        """After a choice of entries.

        Args:
            counts: (B,) or (B, Hkv) how many each head holds; where heads differ, they are put end to end.
            cursor: (B, 1, 1), where a method that goes round the slots goes on.
        """
        assert self.quota is not None
        self.quota = self.quota.at(cursor)
        if counts.ndim == 2:
            lists = counts.tolist()
            self.pack(Ragged.of(self.keys, lists), Ragged.of(self.values, lists))

    def pack(self, keys: Body, values: Body) -> None:
        """Put the oldest `len(keys)` keys and `len(values)` values of all slots into a body; the tail has the rest."""
        assert self.layout is not None
        rest, self.body = [len(self.layout) - len(part) for part in (keys, values)], (keys, values)
        self._rooms.clear()  # nobody else would let go of what they replace
        self.keys, self.values = (t[:, :, t.shape[2] - n :].clone() for t, n in zip((self.keys, self.values), rest))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens.

        Raises:
            ValueError: that cannot be done in all layers of the cache; none is changed.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, of tokens to take back")
        if not tokens_to_remove or self.layout is None:
            return
        if -tokens_to_remove >= self.layout.seen:
            return self.reset()
        self._check_crop(-tokens_to_remove)
        self.line_up()
        self.layout = self.layout.crop(-tokens_to_remove)
        self.keys, self.values = self.keys[:, :, :tokens_to_remove], self.values[:, :, :tokens_to_remove]
        self._slots(lambda t: t[..., :tokens_to_remove])

    def keep_path(self, rows: Sequence[int], of: int) -> None:
        """Of the newest `of` tokens, fed as a tree of drafts, keep those at `rows`, as if they alone had been fed.

        They must have stood at the positions at which they stand now: one behind the other.

        Raises:
            ValueError: `rows` are not ascending numbers of range(of), or so many tokens cannot be taken back.
        """
        assert self.layout is not None
        if list(rows) != sorted(set(rows) & set(range(of))) or not 0 < of < self.layout.seen:
            raise ValueError(
                f"rows={list(rows)}, of={of}: rows must be ascending numbers of range(of), and of={of} at least 1 and "
                f"less than the {self.layout.seen} tokens that were fed"
            )
        self._check_crop(of)
        self.line_up()

        def keep(t: Tensor, dim: int) -> Tensor:
            older = t.shape[dim] - of
            at = [*range(older), *(older + row for row in rows)]
            return t.index_select(dim, torch.tensor(at, dtype=torch.int64, device=t.device))

        self._rooms.clear()
        self.keys, self.values = keep(self.keys, 2), keep(self.values, 2)
        self._slots(lambda t: keep(t, -1))
        before = self.layout.crop(of)
        if rows:
            self.layout = before.append(NextRows(len(rows), before.removed, before.seen + len(rows), before.images))
        else:
            self.layout = before

    def _check_crop(self, tokens: int) -> None:
        """A cache crops its layers one after the other: of the first of them, all the others are looked at too."""
        every = [layer for ref in self.siblings if (layer := ref())]
        for layer in every if every and every[0] is self else [self]:
            if layer.layout is None:
                continue
            unpacked = None if layer.body is None else min(layer.keys.shape[2], layer.values.shape[2])
            most, why = croppable(layer.layout, unpacked, layer.window if layer.dropped else None)
            if most < tokens:
                raise ValueError(
                    f"crop({-tokens}): the newest {most} tokens of this compressed cache can be taken back at most "
                    f"({why}); start a new cache instead"
                )

    def _slots(self, change: Callable[[Tensor], Tensor]) -> None:
        """The same change in what is remembered of every slot."""
        if self.side:
            self.side = {name: change(t) for name, t in self.side.items()}

    def _each(self, tensor: Callable[[Tensor], Tensor], body: Callable[[Body], Body]) -> None:
        """The same change in everything that is stored; the batch comes first in all tensors."""
        self._rooms.clear()
        self.keys, self.values = tensor(self.keys), tensor(self.values)
        self._slots(tensor)
        self.quota = None if self.quota is None else self.quota.each(tensor)
        self.body = None if self.body is None else (body(self.body[0]), body(self.body[1]))

    def _rows(self, which: Tensor) -> None:
        self._each(lambda t: t[which.to(t.device)], lambda part: part.rows(which))
        if self.layout is not None:
            self.layout = self.layout.rows(which)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.get_seq_length():
            self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.get_seq_length():
            self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.layout is None:
            return
        n = self.keys.shape[0]
        # the same change in every layer: one index and one layout for all, so that what they share stays shared
        rows = self.layout.derive(("repeated", n, repeats), lambda: torch.arange(n).repeat_interleave(repeats))
        layout = self.layout.repeat(repeats)
        self._rows(rows)
        self.layout = layout

    def offload(self) -> None:
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        self._move(self.device)

    def _move(self, device: torch.device) -> None:
        if not self.is_initialized:
            return
        self._each(lambda t: t.to(device), lambda part: part.to(device))
        self.layout = None if self.layout is None else self.layout.to(device)

    def reset(self) -> None:
        window, filled_by, siblings = self.window, self.filled_by, self.siblings
        self.__dict__.clear()
        self.__init__(window, filled_by)  # type: ignore[misc]
        self.siblings = siblings
