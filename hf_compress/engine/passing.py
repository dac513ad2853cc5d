"""Visual tokens that go through the language model for what stays of their image alone (`VisionMethod.passes`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hf_compress.engine.seams import take_out
from hf_compress.engine.state import Forward
from hf_compress.methods.reader import Reader
from hf_compress.signals import Slots
from hf_compress.stores import held_layers


@dataclass(frozen=True)
class Passing(Reader):
    """The rows of one forward that pass: seen by rows of their own sequence, and gone from the cache behind it.

    Args:
        number: (B, q) int64, of every row the number of the sequence of visual tokens that it belongs to, from 1; 0 on
            text.
        goes: (B, q) bool, the rows that pass.
        past: rows that the caller fed before.
    """

    number: Tensor
    goes: Tensor
    past: int

    def sight(self, keys: Slots, queries: Slots) -> Tensor:
        """(B, 1, q, S) bool."""
        of, hidden = self._at(self.number, keys), self._at(self.goes, keys)
        alike = self._at(self.number, queries)[..., None] == of[:, None]
        return (alike | ~hidden[:, None])[:, None]

    def _at(self, what: Tensor, slots: Slots) -> Tensor:
        """(B, S): of rows that were not fed now 0, or False."""
        place = slots.index - self.past
        other = (place < 0) | (place >= what.shape[1])
        padded = F.pad(what, (0, 1)).to(place.device)
        return padded.gather(1, place.masked_fill(other, what.shape[1]))

    def leave(self, now: Forward) -> None:
        """Take them out of the cache, from which nobody reads them any more."""
        hidden = F.pad(self.goes, (self.past, 1))
        take_out(held_layers(now.given.cache), hidden, "passed")


def passing(number: Tensor, stays: Tensor, past: int) -> Passing | None:
    """Of visual rows that do not stay, (B, q) both; None: there are none."""
    goes = (number > 0) & ~stays
    return Passing(number, goes, past) if bool(goes.any()) else None
