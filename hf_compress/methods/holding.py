"""What keeps a cache at its budget while decoding: a score that runs on, or the order of the entries."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.signals import CacheView, Order, Rivals


class Holding:
    """What a method that ranks entries also is, if the cache can be held at its budget (policy="hold").

    As it stands every step asks for the ranking anew and drops the lowest entry. A method that defines `begin` keeps a
    running score, which `CacheView.scores` shows to its ranking; one that goes by the order of the entries says so by
    `keeps`, and by `rivals` how to find the one that goes without a look at the others.

    Attributes:
        decay: what the running score is multiplied by at every row (0: the newest row alone).
        relative: keys take the rotation of their place in the cache.
        any_order: the entry that goes is found by content and by which are the newest. Slots are then in any order;
            `order` and `lengths` count entries that have gone too, `lengths` and `budget` may be numbers.
    """

    decay: float = 1.0
    relative: bool = False
    any_order: bool = False

    def holding(self) -> Holding:
        """See `CacheMethod.holding`."""
        return self

    @property
    def running(self) -> bool:
        """Whether it keeps a running score."""
        return type(self).begin is not Holding.begin

    @property
    def stepwise(self) -> bool:
        """Whether tokens fed together find another cache than one by one, so that candidates cannot be checked."""
        return self.relative or type(self).keeps is Holding.keeps

    # -- a running score ----------------------------------------------------------------------------------------------
    def begin(self, view: CacheView) -> Tensor:
        """(B, Hkv, S): the running score at the end of the prompt; or of the newest entries alone."""
        raise NotImplementedError

    def votes(self, view: CacheView) -> Tensor | None:
        """(B, Hkv, S) int64: how many rows `begin` summed, to be counted on; None: nobody asks."""
        return None

    def advance(self, score: Tensor, new: Tensor) -> Tensor:
        """The running score (B, Hkv, S), decayed already, after rows that gave each entry `new` attention.

        `new` is a group mean; of rows that arrived together each counts with the decay since.
        """
        return score + new

    def voting_rows(self, tail: int, rows: int) -> list[bool]:
        """Which of the newest `rows` rows count in a running score; with them `tail` entries are not packed."""
        return [True] * rows

    # -- who goes -----------------------------------------------------------------------------------------------------
    def fit(self, view: CacheView, room: Tensor, have: Tensor) -> Tensor:
        """How many of `have` entries stay where there is `room`, both (B,) or (B, Hkv)."""
        return torch.minimum(room, have)

    def keeps(self, view: Order) -> Tensor | None:
        """Bool over slots: what stays, if it depends on nothing but the order of the entries; None: on more.

        Of several tokens fed together each then sees what it would have seen had they come one by one.
        """
        return None

    def cursor(self, view: CacheView) -> Tensor | None:
        """(B, 1, 1) int64: where a method that goes round the slots goes on after this choice; None: it does not."""
        return None

    def rivals(self, budget: int, cursor: int | None, depth: int, depths: int) -> Rivals | None:
        """Who is to go when a token comes to a cache that holds its budget, if their ranks say so; None: if not.

        Numbers are those of `Order`. Of two rivals `older_goes` then tells; slots need not be in order.
        """
        return None

    def older_goes(self, scores: Tensor, votes: Tensor | None) -> Tensor:
        """(B, Hkv, 1) bool: which of two rivals goes, from their running scores and votes (B, Hkv, 2)."""
        raise NotImplementedError
