"""The book of the engine: which of the caller's rows every slot stands for."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Slots = tuple[Tensor, Tensor, Tensor, Tensor]  # index, position, image, valid


class Layout:
    """The slots of one or more decoder layers, immutable, shared by all layers that hold the same set.

    Masks, rows of the rotary tables, the way back to the caller's length, reports and pictures derive from it.
    Layers ask for the same change one after the other (`append` in `update`, `rows` in `reorder_cache` ...): the
    last change is remembered, so they keep sharing one layout and one mask.

    Args:
        index: (B, S) int64, the row of the caller's sequence behind each slot ((B, Hkv, S) in `HeadLayout`).
        position: same shape, the coordinate in which causality and windows are measured (`index` less the rows
            removed before it, where survivors are renumbered).
        image: same shape, ordinal of the image within the sample, -1 on text.
        valid: same shape, bool; False on padding and on slots that only fill up a ragged batch.
        removed: (B,) int64, what later positions have to be reduced by; on the device where rows enter the language
            model, whatever the device of the slots.
        images: (B,) int64, how many images have been shown so far, those without a slot included; beside `removed`
            (None: as many as `image` tells).
        seen: how many rows the caller has fed so far.
        per_head: whether KV heads hold different rows.
        all_valid: `valid.all()` as a Python value (None: computed here), so that decoding never synchronises.
    """

    def __init__(
        self,
        index: Tensor,
        position: Tensor,
        image: Tensor,
        valid: Tensor,
        removed: Tensor,
        seen: int,
        all_valid: bool | None = None,
        images: Tensor | None = None,
    ):
        self._slots: Slots | None = (index, position, image, valid)
        self._joined: tuple[Layout, Layout] | None = None
        self._length, self.per_head, self.device = index.shape[-1], False, index.device
        self.removed, self.seen = removed, seen
        self.images = image.flatten(1).amax(1).add(1).to(removed.device) if images is None else images
        self.all_valid = bool(valid.all()) if all_valid is None else all_valid
        self._last: tuple[object, weakref.ref[Layout]] | None = None
        self._derived: dict[object, Any] = {}

    def __len__(self) -> int:
        return self._length

    def rest(self) -> None:
        """Between forwards: what was derived for the prompt goes, numbers are kept as small as they are."""
        self._derived, self._last = {}, None
        if self._slots is not None:
            self._slots = _narrow(self._slots, self.seen)

    @property
    def slots(self) -> Slots:
        """The four per-slot tensors; appended ones are joined when somebody first looks."""
        index, position, image, valid = self._kept
        return index.long(), position.long(), image.long(), valid

    @property
    def _kept(self) -> Slots:
        """The same as they are stored."""
        if self._slots is None:
            pieces, node = [], self
            while node._joined is not None:
                node, new = node._joined
                pieces.append(new.to(self.device)._kept)
            pieces.append(node._kept)
            if pieces[-1][0].dtype != torch.int64:  # so it stays
                pieces = [_narrow(piece, self.seen) for piece in pieces]
            columns = [torch.cat([piece[i] for piece in reversed(pieces)], -1) for i in range(4)]
            self._slots, self._joined = (columns[0], columns[1], columns[2], columns[3]), None
        return self._slots

    def _column(self, i: int) -> Tensor:
        column = self._kept[i]
        return column if i == 3 else column.long()

    @property
    def index(self) -> Tensor:
        """Row of the caller's sequence behind each slot."""
        return self._column(0)

    @property
    def position(self) -> Tensor:
        """Coordinate of causality and windows."""
        return self._column(1)

    @property
    def image(self) -> Tensor:
        """Ordinal of the image, -1 on text."""
        return self._column(2)

    @property
    def valid(self) -> Tensor:
        """False on padding and filler slots."""
        return self._column(3)

    def tensors(self) -> list[Tensor]:
        """What is stored for one layer alone: nothing, all layers share it."""
        return []

    def derive(self, key: object, make: Callable[[], Any]) -> Any:
        """Something that follows from the layout alone, computed once for all layers that share it."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def _once(self, key: object, make: Callable[[], Layout]) -> Layout:
        if self._last is not None:
            last, made = self._last[0], self._last[1]()
            if made is not None and (last is key or (isinstance(key, tuple) and last == key)):
                return made
        made = make()
        self._last = (key, weakref.ref(made))  # whoever keeps an old layout must not keep all later ones
        return made

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_slots": self.slots, "_joined": None, "_last": None, "_derived": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, device=state["_slots"][0].device)  # it may be loaded elsewhere

    def _map(self, slots: Callable[[Tensor], Tensor], rows: Callable[[Tensor], Tensor], seen: int) -> Layout:
        index, position, image, valid = (slots(t) for t in self.slots)
        known = self.all_valid or None
        return Layout(index, position, image, valid, rows(self.removed), seen, known, rows(self.images))

    def to(self, device: torch.device) -> Layout:
        """The same slots on another device, one copy for all layers there. `removed` stays where the rows came in."""
        if device == self.device:
            return self

        def make() -> Layout:
            index, position, image, valid = (t.to(device) for t in self.slots)
            return Layout(index, position, image, valid, self.removed, self.seen, self.all_valid, self.images)

        return self.derive(("to", device), make)

    def append(self, new: Layout) -> Layout:
        """These slots followed by `new` ones, on the device of these."""

        def make() -> Layout:
            out = object.__new__(Layout)  # without the tensors: most decode steps never look at them
            out._slots, out._joined, out._last, out._derived = None, (self, new), None, {}
            out._length, out.per_head = len(self) + len(new), False
            out.device = self.device  # where `new` is brought to when they are joined
            out.removed, out.images, out.seen = new.removed, new.images, new.seen
            out.all_valid = self.all_valid and new.all_valid
            return out

        return self._once(new, make)

    def gather(self, at: Tensor, valid: Tensor | None = None) -> Layout:
        """The slots `at` (B, n), the same in every head; `valid` (same shape) hides some of them."""
        index, position, image, old = (t.gather(-1, at) for t in self.slots)
        known = (self.all_valid and valid is None) or None
        valid = old if valid is None else old & valid
        return Layout(index, position, image, valid, self.removed, self.seen, known, self.images)

    def trim(self, at: Tensor, valid: Tensor | None = None) -> Layout:
        """`gather`, one result for all layers that ask for it by the same tensors one after the other."""
        return self._once(at, lambda: self.gather(at, valid))

    def passed(self, rows: int) -> Layout:
        """The same slots when `rows` more have been fed, none of which came here."""

        def make() -> Layout:
            index, position, image, valid = self._kept
            return Layout(index, position, image, valid, self.removed, self.seen + rows, self.all_valid, self.images)

        return self._once(("passed", rows), make)

    def pick(self, at: Tensor, fillers: Tensor | None = None) -> HeadLayout:
        """The slots `at` (B, Hkv, n), a choice per head, the first `fillers[b, h]` of which only fill up."""
        return HeadLayout(self, at.to(small(len(self))), fillers)

    def rows(self, which: Tensor) -> Layout:
        """The batch rows `which` (beam search, batch selection)."""

        def pick(t: Tensor) -> Tensor:
            return t[which.to(t.device)]

        return self._once(which, lambda: self._map(pick, pick, self.seen))

    def repeat(self, times: int) -> Layout:
        """Every batch row `times` times, copies adjacent."""

        def pick(t: Tensor) -> Tensor:
            return t.repeat_interleave(times, 0)

        return self._once(("repeat", times), lambda: self._map(pick, pick, self.seen))

    def newest_rows(self) -> int:
        """How many of the newest slots are the newest rows of the caller, none of which has been removed."""

        def count() -> int:
            rows = torch.arange(self.seen - len(self), self.seen, device=self.device)
            there = (self.index == rows) & (self.valid | (self.removed.to(self.device)[:, None] == 0))
            return int(there.flip(-1).long().cumprod(-1).sum(-1).min())

        return self.derive("newest rows", count)

    def crop(self, rows: int) -> Layout:
        """Without the newest `rows` slots, which must be the newest rows of the caller (see `newest_rows`)."""

        def cut(t: Tensor) -> Tensor:
            return t[..., :-rows]

        return self._once(("crop", rows), lambda: self._map(cut, lambda t: t, self.seen - rows))

    def within(self, window: int) -> int:
        """How many of the newest slots a sliding window of so many positions can still reach."""
        n = min(len(self), window - 1)
        if n == len(self) or self.all_valid:
            return n
        return self.derive(("within", window), lambda: max(n, self._reach(window)))

    def _reach(self, window: int) -> int:
        """The same where fillers stand between the slots of a row."""
        next_ = (self.seen - self.removed.to(self.device))[:, None]
        near = self.valid & (next_ - self.position < window)
        return len(self) - int(near.flatten(0, -2).any(0).long().argmax()) if bool(near.any()) else 0

    def tail(self, slots: int) -> Layout:
        """The newest `slots` slots."""
        return self._once(("tail", slots), lambda: self._map(lambda t: t[..., -slots:], lambda t: t, self.seen))


class NextRows(Layout):
    """Text that follows what was fed before, all of it valid: most decode steps never look at its tensors."""

    def __init__(self, rows: int, removed: Tensor, seen: int, images: Tensor | None = None):
        self._slots, self._joined, self._last, self._derived = None, None, None, {}
        self._length, self.per_head, self.device, self.all_valid = rows, False, removed.device, True
        self.removed, self.seen = removed, seen
        self.images = torch.zeros_like(removed) if images is None else images

    def rest(self) -> None:
        super().rest()
        self._slots = None  # they are made again when somebody looks

    def append(self, new: Layout) -> Layout:
        if not isinstance(new, NextRows) or new.removed is not self.removed:
            return super().append(new)
        return self._once(new, lambda: NextRows(len(self) + len(new), self.removed, new.seen, new.images))

    def tail(self, slots: int) -> Layout:
        return self._once(("tail", slots), lambda: NextRows(slots, self.removed, self.seen, self.images))

    @property
    def _kept(self) -> Slots:
        if self._slots is None:
            index = torch.arange(self.seen - len(self), self.seen, device=self.device).expand(len(self.removed), -1)
            image, valid = torch.full_like(index, -1), torch.ones_like(index, dtype=torch.bool)
            self._slots = index, index - self.removed[:, None], image, valid
        return self._slots


class HeadLayout(Layout):
    """Slots of one layer whose heads hold different rows: small integers into slots that all heads and layers share.

    Two or four bytes per entry and head; everything else is looked up when asked for, and not kept.

    Args:
        base: the shared slots; at: (B, Hkv, n) which of them; fillers: (B, Hkv) how many of those in front only fill
            up (None: none); tail: shared slots appended since.
    """

    def __init__(self, base: Layout, at: Tensor, fillers: Tensor | None = None, tail: Layout | None = None):
        self._base, self._at, self._fillers, self._tail = base, at, fillers, tail
        newest = base if tail is None else tail
        self.removed, self.images, self.seen = newest.removed, newest.images, newest.seen
        self.device, self.per_head = at.device, True
        self.all_valid = base.all_valid and fillers is None and (tail is None or tail.all_valid)
        self._length = at.shape[-1] + (0 if tail is None else len(tail))

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_base"], state["_at"], state["_fillers"], state["_tail"])  # type: ignore[misc]

    def _column(self, i: int) -> Tensor:
        out = self._base._kept[i][:, None].expand(-1, self._at.shape[1], -1).gather(-1, self._at.long())
        out = out if i == 3 else out.long()
        if i == 3 and self._fillers is not None:
            out = out & (torch.ones_like(self._at, dtype=torch.int64).cumsum(-1) > self._fillers[..., None])
        if self._tail is not None:
            out = torch.cat([out, self._tail._column(i)[:, None].expand(-1, out.shape[1], -1)], -1)
        return out

    @property
    def slots(self) -> Slots:
        return self._column(0), self._column(1), self._column(2), self._column(3)

    @property
    def counts(self) -> Tensor:
        """(B, Hkv) entries picked, fillers and what was appended since not counted."""
        n = torch.full(self._at.shape[:2], self._at.shape[-1], device=self.device)
        return n if self._fillers is None else n - self._fillers

    def tensors(self) -> list[Tensor]:
        return [t for t in (self._at, self._fillers) if t is not None]

    def rest(self) -> None:
        self._base.rest()
        if self._tail is not None:
            self._tail.rest()

    def derive(self, key: object, make: Callable[[], Any]) -> Any:
        return make()  # of one layer only, and as large as its slots

    def _again(self, change: Callable[[Layout], Layout], at: Callable[[Tensor], Tensor]) -> HeadLayout:
        fillers = None if self._fillers is None else at(self._fillers)
        return HeadLayout(change(self._base), at(self._at), fillers, None if self._tail is None else change(self._tail))

    def to(self, device: torch.device) -> HeadLayout:
        return self if device == self.device else self._again(lambda x: x.to(device), lambda t: t.to(device))

    def append(self, new: Layout) -> HeadLayout:
        new = new.to(self.device)
        return HeadLayout(self._base, self._at, self._fillers, new if self._tail is None else self._tail.append(new))

    def passed(self, rows: int) -> HeadLayout:
        return self._again(lambda x: x.passed(rows), lambda t: t)

    def pick(self, at: Tensor, fillers: Tensor | None = None) -> HeadLayout:
        base, here = self._base, self._at.long()
        if self._tail is not None:
            more = len(base) + torch.arange(len(self._tail), device=self.device)
            base, here = base.append(self._tail), torch.cat([here, more.expand(*here.shape[:2], -1)], -1)
        return base.pick(here.gather(-1, at), fillers)

    @property
    def came(self) -> int:
        """How many shared slots there have been, those that no head holds any more included."""
        return len(self._base) + (0 if self._tail is None else len(self._tail))

    @property
    def numbers(self) -> Tensor:
        """(B, Hkv, S): which of all that `came` each slot is; the newer, the larger."""
        if self._tail is None:
            return self._at
        more = torch.arange(len(self._base), self.came, dtype=self._at.dtype, device=self.device)
        return torch.cat([self._at, more.expand(*self._at.shape[:2], -1)], -1)

    def replace(self, slot: Tensor, new: Layout) -> HeadLayout:
        """One `new` slot in the place of one of every head, at `slot` (B, Hkv, 1)."""
        base, at, number = self._base, self.numbers, self.came
        base = (base if self._tail is None else base.append(self._tail)).append(new.to(self.device))
        if at.dtype != small(number + 1):
            at = at.to(small(number + 1))
        return HeadLayout(base, at.scatter(-1, slot, number), self._fillers)

    def newest(self, slots: int) -> Layout:
        """The newest `slots` slots, which no head has been choosing from."""
        assert self._tail is not None
        return self._tail if slots == len(self._tail) else self._tail.tail(slots)

    def rows(self, which: Tensor) -> HeadLayout:
        return self._again(lambda x: x.rows(which), lambda t: t[which.to(t.device)])

    def repeat(self, times: int) -> HeadLayout:
        return self._again(lambda x: x.repeat(times), lambda t: t.repeat_interleave(times, 0))

    def newest_rows(self) -> int:
        return 0 if self._tail is None else self._tail.newest_rows()

    def crop(self, rows: int) -> HeadLayout:
        assert self._tail is not None
        tail = self._tail.crop(rows) if len(self._tail) > rows else None
        return HeadLayout(self._base, self._at, self._fillers, tail)


def _narrow(slots: Slots, seen: int) -> Slots:
    """The same in the smallest integers that hold it."""
    index, position, image, valid = slots
    return index.to(small(seen)), position.to(small(seen)), image.to(torch.int16), valid


def small(length: int) -> torch.dtype:
    """What numbers of so many slots are stored in, per head."""
    return torch.int16 if length < 2**15 else torch.int32
