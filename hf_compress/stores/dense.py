"""The cache layer of a compressed model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hf_compress import kernels
from hf_compress.layout import HeadLayout, Layout
from hf_compress.stores.body import Body
from hf_compress.stores.crop import check_crop
from hf_compress.stores.ragged import Ragged, attend
from hf_compress.tensors.ambient import own_precision
from hf_compress.tensors.attention import rows_attention
from hf_compress.tensors.kvmerge import take

PER_SLOT = ("scores", "votes")  # optional tensors (B, Hkv, S), or of the newest slots only, that move with them
PER_ROW = ("keys", "values", "ages", *PER_SLOT, "budget", "cursor")  # tensors whose first dimension is the batch
SPARE = 128  # one free slot per so many entries: most appends then copy nothing


class HeldLayer(DynamicLayer):
    """Keys and values of one layer with the layout of their slots: a compressed body, if any, and a dense tail.

    `keys` and `values` are the tail: all entries, until a method packs the prompt into `body`. `get_seq_length`
    answers what the caller has fed, `get_mask_sizes` what is stored, as transformers' own sliding-window layer does.
    `scores` is an optional per-slot tensor (B, Hkv, S), or of the newest slots only, that moves with the slots.

    Args:
        window: of a sliding layer; older slots are dropped when the next token arrives.
        filled_by: the compression that fills the layer; no other may continue it.
    """

    keys: Tensor  # None until the first update, as in transformers
    values: Tensor
    is_croppable = True

    def __init__(self, window: int | None = None, filled_by: str = ""):
        super().__init__()
        self.window, self.is_sliding, self.filled_by = window, window is not None, filled_by
        self.layout: Layout | None = None
        self.body: tuple[Body, Body] | None = None  # of keys and of values; their tails may differ in length
        self.in_order = True  # whether the slots stand from the oldest to the newest
        self.ages: Tensor | None = None  # (B, 1 or Hkv, S) the slots from the oldest to the newest, if somebody counts
        self.scores: Tensor | None = None
        self.votes: Tensor | None = None  # how many rows `scores` sums, of methods that ask
        self.budget: Tensor | None = None  # (B,) entries per head, set when the prompt was evicted
        self.least = self.most = 0  # bounds of it, known without asking the device
        self.cursor: Tensor | int | None = None  # (B,), or of all rows, where a method that goes round them goes on
        self.turned = True  # whether keys are stored rotated; else `update` rotates them all by their places
        self.direct = False  # whether attention can ask `attend` instead of reading everything
        self.fused = False  # whether a kernel reads the packed body for the newest token
        self.row: Tensor | None = None  # (B, Hq, 1, S) attention of the newest token, if asked for
        self.sums: Tensor | None = None  # (B, Hkv, S) column sums of the prompt, where its attention gave them
        self.siblings: list[weakref.ref[HeldLayer]] = []  # all layers of the cache; copies and pickles do without
        self.dropped = False  # whether slots have left the window
        self._announced: Layout | None = None
        self._places: Any = None
        self._free: Tensor | None = None  # (B, Hkv, 1) where the next token goes
        self._rooms: dict[str, tuple[Tensor, Tensor]] = {}  # of keys and values: all slots, those used

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "siblings": []}

    def announce(self, layout: Layout, places: Any = None) -> None:
        """What the next `update` appends; called by the engine before the layer runs.

        Args:
            places: `Rotary` of all slots, the new ones included, where keys are not stored rotated.
        """
        self._announced, self._places = layout, places

    def set_budget(self, budget: Tensor) -> None:
        """(B,) or (B, Hkv) entries that a held cache comes back to, on the host."""
        self.budget = budget.to(self.keys.device, non_blocking=True)
        self.least, self.most = int(budget.min()), int(budget.max())

    def unturn(self, rotary: Any) -> None:
        """Store the keys before their rotation (`Rotary` of all slots) from now on."""
        self.keys, self.turned = rotary.back(self.keys), False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, Hkv, q, d); returns all that is stored, or `attend` is asked to read it.

        Raises:
            RuntimeError: the engine did not announce the rows: the model is no longer compressed as it was.
        """
        new, places = self._announced, self._places
        self._announced = self._places = None
        if new is None:
            raise RuntimeError(
                "this KV cache was filled by a compressed model and cannot be continued without its compression; "
                "compress the model in the same way again, or start with a new cache"
            )
        self._leave_behind()
        self.layout = self.next_layout(new).to(key_states.device)
        if not self.turned:
            key_states = places.newest(key_states.shape[-2]).back(key_states)
        if not self.is_initialized:
            super().update(key_states, value_states)
        elif self._free is not None:
            self._overwrite(key_states, value_states)
            return self.keys, self.values
        else:
            self._append("keys", key_states)
            self._append("values", value_states)
        self._slots(lambda t: torch.cat([t, t.new_zeros(*t.shape[:2], key_states.shape[-2])], -1))
        self.fused = self.direct and self.turned and self.body is not None and kernels.reads(self.body, key_states)
        if self.in_place:
            return self.keys, self.values
        keys, values = self.whole()
        return keys if self.turned else places.apply(keys), values

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

    def _append(self, name: str, new: Tensor) -> None:
        """Put `new` (B, Hkv, q, d) behind the keys or values, into free slots where there are enough of them."""
        old: Tensor = getattr(self, name)
        if torch.is_grad_enabled() and (old.requires_grad or new.requires_grad):  # what was read must not change
            setattr(self, name, torch.cat([old, new], 2))
            return
        room, used = self._rooms.get(name, (old, None))
        stop = old.shape[2] + new.shape[2]
        if used is not old or room.shape[2] < stop:
            room = old.new_empty(*old.shape[:2], stop + stop // SPARE, old.shape[3])
            room[:, :, : old.shape[2]] = old
        room[:, :, old.shape[2] : stop] = new
        self._use(name, room, stop)

    def _use(self, name: str, room: Tensor, slots: int) -> None:
        """Take the first `slots` of a tensor as the keys or values; the others are free."""
        used = room[:, :, :slots]
        self._rooms.pop(name, None)
        if slots < room.shape[2]:
            self._rooms[name] = room, used
        setattr(self, name, used)

    @property
    def replaceable(self) -> bool:
        """Whether entries can be replaced one by one."""
        assert self.layout is not None
        whole = self.body is None and self.layout.per_head and self.layout.all_valid
        return whole and self.turned and not self.keys.requires_grad

    def replace(self, slot: Tensor, ages: Tensor | None = None) -> None:
        """The next token takes the place of one entry of every head: nothing else is copied.

        Args:
            slot: (B, 1 or Hkv, 1), where that entry is.
            ages: (B, 1 or Hkv, S) the slots from the oldest to the newest then, if somebody counts.
        """
        self._free = slot = slot.expand(*self.keys.shape[:2], -1)
        self.in_order, self.ages = False, ages
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
        if not self.in_order:
            assert isinstance(self.layout, HeadLayout)
            self.in_order, self.ages = True, None
            self.select(self.layout.numbers.argsort(-1))

    @property
    def by_segments(self) -> bool:
        """Whether `attend` reads the entries head by head, and needs no mask from outside."""
        return self.direct and self.body is not None and isinstance(self.body[0], Ragged)

    @property
    def in_place(self) -> bool:
        """Whether `attend` reads the entries where they are."""
        return self.body is not None and (self.fused or self.by_segments)

    @property
    def bias(self) -> Tensor | None:
        """(B, Hkv, n) fp32, what is added to the logits of the oldest n slots that `whole` gives; None: nothing."""
        return self.body[0].bias() if self.body is not None and isinstance(self.body[0], Ragged) else None

    @own_precision
    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """(B, q, Hq, d) attention of the newest q rows, queries (B, Hq, q, d), over all that is stored."""
        assert self.body is not None and self.layout is not None
        if self.fused:
            return kernels.attend(query, scaling, self.body, (self.keys, self.values), self.layout)
        assert isinstance(self.layout, HeadLayout)
        keys, values = self.body
        assert isinstance(keys, Ragged) and isinstance(values, Ragged)
        q, T, see = query.shape[2], self.keys.shape[2], None
        tail = self.layout.newest(T)
        if q > 1 or not tail.all_valid:
            see = (tail.position[:, None, None] <= tail.position[:, None, -q:, None]) & tail.valid[:, None, None]
            see = see | torch.eye(T, dtype=torch.bool, device=see.device)[T - q :]
        return attend(query, scaling, keys, values, (self.keys, self.values), see)

    @own_precision
    def attend_row(self, query: Tensor, key: Tensor, scaling: float, see: Tensor | None) -> Tensor:
        """(B, 1, Hq, d) attention of the newest row over dense keys and values, whose weights are kept as `row`.

        Args:
            query: (B, Hq, 1, d); key: (B, Hkv, S, d) as `update` gave them.
            see: (B, 1 or Hkv, 1, S) bool; None: all.
        """
        self.row = rows_attention(query, key, scaling, see)
        B, Hq, _, S = self.row.shape
        weights = self.row.view(B, key.shape[1], -1, S).to(self.values.dtype)
        return (weights @ self.values).view(B, 1, Hq, -1)

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
        return len(self.layout) if self.window is None else self.layout.within(self.window)

    def tensors(self) -> list[Tensor]:
        """Everything that is stored for the entries: the tail, the packed body, which entries each head holds."""
        if not self.is_initialized:
            return []
        packed = [t for part in self.body or () for t in part.tensors()]
        mine = self.layout.tensors() if self.layout is not None else []
        return [self._stored("keys"), self._stored("values"), *packed, *mine]

    def _stored(self, name: str) -> Tensor:
        """Keys or values with the free slots behind them."""
        room, used = self._rooms.get(name, (None, None))
        mine: Tensor = getattr(self, name)
        return mine if room is None or used is not mine else room

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
        for name, t in zip(("keys", "values"), kept):
            self._use(name, t, slots.shape[2])
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
        for name, t in zip(("keys", "values"), [take(x, at) for x in self.whole()]):
            self._use(name, t, rows.shape[1])
        self.body = None
        self._slots(lambda t: t.gather(2, at))
        self.layout = self.layout.trim(rows, valid)

    def settle(self, counts: Tensor, cursor: Tensor | None) -> None:
        """After a choice of entries.

        Args:
            counts: (B,) or (B, Hkv) how many each head holds; where heads differ, they are put end to end.
            cursor: (B, 1, 1), where a method that goes round the slots goes on.
        """
        self.cursor = None
        if cursor is not None:
            rows = cursor[:, 0, 0]
            self.cursor = int(rows[0]) if bool((rows == rows[0]).all()) else rows
        if counts.ndim == 2:
            lists = counts.tolist()
            self.pack(Ragged.of(self.keys, lists), Ragged.of(self.values, lists))

    def pack(self, keys: Body, values: Body) -> None:
        """Put the oldest `len(keys)` keys and `len(values)` values into a body; the rest stays in the tail."""
        self.body = keys, values
        self._rooms.clear()  # nobody else would let go of what they replace
        self.keys, self.values = self.keys[:, :, len(keys) :].clone(), self.values[:, :, len(values) :].clone()

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
        check_crop(self, -tokens_to_remove)
        self.line_up()
        self.layout = self.layout.crop(-tokens_to_remove)
        self.keys, self.values = self.keys[:, :, :tokens_to_remove], self.values[:, :, :tokens_to_remove]
        self._slots(lambda t: t[..., :tokens_to_remove])

    def _slots(self, change: Callable[[Tensor], Tensor]) -> None:
        """The same change in what is remembered of every slot."""
        for name in PER_SLOT:
            t = getattr(self, name)
            if t is not None:
                setattr(self, name, change(t))

    def _rows(self, which: Tensor) -> None:
        self._rooms.clear()
        for name in PER_ROW:
            t = getattr(self, name)
            if torch.is_tensor(t):
                setattr(self, name, t[which.to(t.device)])
        if self.body is not None:
            self.body = self.body[0].rows(which), self.body[1].rows(which)
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
        self._rooms.clear()
        for name in PER_ROW:
            t = getattr(self, name)
            if torch.is_tensor(t):
                setattr(self, name, t.to(device))
        if self.body is not None:
            self.body = self.body[0].to(device), self.body[1].to(device)
        self.layout = None if self.layout is None else self.layout.to(device)

    def reset(self) -> None:
        self.keys = self.values = None  # type: ignore[assignment]
        self.layout = self.body = self.ages = self.scores = self.votes = None
        self.budget = self.cursor = self.row = self.sums = self._free = None
        self._announced, self.turned, self.in_order, self.dropped, self._rooms = None, True, True, False, {}
        self.is_initialized = False
