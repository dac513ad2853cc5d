"""The book of the engine: which of the caller's rows every slot stands for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Layout:
    """The slots of one or more decoder layers, immutable, shared by all layers that hold the same set.

    Masks, rows of the rotary tables, the way back to the caller's length, reports and pictures derive from it.
    Layers ask for the same change one after the other (`append` in `update`, `select` in `reorder_cache` ...): the
    last change is remembered, so they keep sharing one layout and one mask.

    Args:
        index: (B, S) int64, the row of the caller's sequence behind each slot; (B, Hkv, S) once heads differ.
        position: same shape, the coordinate in which causality and windows are measured (`index` less the rows
            removed before it, where survivors are renumbered).
        image: same shape, ordinal of the image within the sample, -1 on text.
        valid: same shape, bool; False on padding and on slots that only fill up a ragged batch.
        removed: (B,) int64, what later positions have to be reduced by.
        seen: how many rows the caller has fed so far.
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
    ):
        self.index, self.position, self.image, self.valid = index, position, image, valid
        self.removed, self.seen = removed, seen
        self.all_valid = bool(valid.all()) if all_valid is None else all_valid
        self._last: tuple[object, Layout] | None = None

    def __len__(self) -> int:
        return self.index.shape[-1]

    @property
    def per_head(self) -> bool:
        """Whether KV heads hold different rows."""
        return self.index.ndim == 3

    def _once(self, key: object, make: Callable[[], Layout]) -> Layout:
        if self._last is not None:
            last, made = self._last
            if last is key or (isinstance(key, tuple) and last == key):
                return made
        made = make()
        self._last = (key, made)
        return made

    def _map(self, slots: Callable[[Tensor], Tensor], rows: Callable[[Tensor], Tensor], seen: int) -> Layout:
        index, position, image, valid = (slots(t) for t in self.slots)
        return Layout(index, position, image, valid, rows(self.removed), seen, self.all_valid or None)

    def append(self, new: Layout) -> Layout:
        """These slots followed by `new` ones."""

        def make() -> Layout:
            def cat(a: Tensor, b: Tensor) -> Tensor:
                return torch.cat([a, b if a.ndim == b.ndim else b[:, None].expand(-1, a.shape[1], -1)], -1)

            index, position, image, valid = (cat(a, b) for a, b in zip(self.slots, new.slots))
            return Layout(index, position, image, valid, new.removed, new.seen, self.all_valid and new.all_valid)

        return self._once(new, make)

    @property
    def slots(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four per-slot tensors."""
        return self.index, self.position, self.image, self.valid

    def gather(self, at: Tensor, valid: Tensor | None = None) -> Layout:
        """The slots `at`: (B, n), or (B, Hkv, n) for a choice per head; `valid` (same shape) hides some of them."""

        def pick(t: Tensor) -> Tensor:
            return (t if t.ndim == at.ndim else t[:, None].expand(-1, at.shape[1], -1)).gather(-1, at)

        index, position, image, old = (pick(t) for t in self.slots)
        keep_all = self.all_valid and valid is None
        return Layout(
            index, position, image, old if valid is None else old & valid, self.removed, self.seen, keep_all or None
        )

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

    def crop(self, rows: int) -> Layout:
        """Without the newest `rows` slots, which must be the newest rows of the caller."""

        def cut(t: Tensor) -> Tensor:
            return t[..., :-rows]

        return self._once(("crop", rows), lambda: self._map(cut, lambda t: t, self.seen - rows))

    def tail(self, slots: int) -> Layout:
        """The newest `slots` slots."""
        return self._once(("tail", slots), lambda: self._map(lambda t: t[..., -slots:], lambda t: t, self.seen))


def compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that remain, lined up at the right end of a ragged batch.

    Args:
        keep: (B, q) bool.

    Returns:
        rows (B, L) int64 in original order, L the largest count, and valid (B, L): the slots at the left that only
        fill up are rows that were removed.
    """
    counts = keep.sum(1)
    longest = int(counts.max())
    rows = keep.long().argsort(dim=1, stable=True)[:, keep.shape[1] - longest :]
    return rows, torch.arange(longest, device=keep.device)[None] >= (longest - counts)[:, None]


def take(x: Tensor, rows: Tensor) -> Tensor:
    """(B, S, D) gathered at rows (B, L)."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))
