"""Free slots behind what is stored: most appends then copy nothing."""

from __future__ import annotations

import torch
from torch import Tensor

SPARE = 128  # one free slot per so many entries


class Rooms:
    """Of the keys and values of one layer, the tensors (B, Hkv, S + free, d) whose first slots are used."""

    def __init__(self) -> None:
        self._rooms: dict[str, tuple[Tensor, Tensor]] = {}  # by name: all slots, those used

    def __len__(self) -> int:
        """How many tensors have free slots."""
        return len(self._rooms)

    def append(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        """`old` with `new` (B, Hkv, q, d) behind, in free slots where there are enough of them."""
        if torch.is_grad_enabled() and (old.requires_grad or new.requires_grad):  # what was read must not change
            return torch.cat([old, new], 2)
        room, used = self._rooms.get(name, (old, None))
        stop = old.shape[2] + new.shape[2]
        if used is not old or room.shape[2] < stop:
            room = old.new_empty(*old.shape[:2], stop + stop // SPARE, old.shape[3])
            room[:, :, : old.shape[2]] = old
        room[:, :, old.shape[2] : stop] = new
        return self.use(name, room, stop)

    def use(self, name: str, room: Tensor, slots: int) -> Tensor:
        """The first `slots` of a tensor; the others are free."""
        used = room[:, :, :slots]
        self._rooms.pop(name, None)
        if slots < room.shape[2]:
            self._rooms[name] = room, used
        return used

    def whole(self, name: str, used: Tensor) -> Tensor:
        """What is used with the free slots behind it."""
        room, known = self._rooms.get(name, (None, None))
        return used if room is None or known is not used else room

    def clear(self) -> None:
        """Forget the free slots: what is used goes elsewhere, and nobody else would let go of them."""
        self._rooms.clear()
