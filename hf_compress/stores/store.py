"""Who packs the entries of a layer, when and how."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

from hf_compress import budget
from hf_compress.signals import CacheView
from hf_compress.stores.dense import HeldLayer


class Store:
    """When and how the entries of a layer are packed."""

    continues: ClassVar[bool] = False  # whether what is generated is packed too, under policy="grow"

    @property
    def bits(self) -> float:
        """Mean stored bits per number of keys and values, 16 if nothing is packed or nobody knows before the prompt."""
        return 16.0

    def entries(self, length: int, share: Fraction, sizes: tuple[int, int], index: int = 0, outside: int = 0) -> int:
        """How many of `length` entries of a head take no more than `share` of 16 bits per number, at least 1.

        Args:
            sizes: channels of a key and of a value.
            index: bytes beside every entry.
            outside: entries that stay whatever the share.
        """
        return budget.kept(length, 1 - share, floor=True)

    def settle(self, held: Sequence[HeldLayer], views: Sequence[CacheView] | None) -> None:
        """Pack what is to be packed, in the layers of a group.

        Called with their views at the end of the prompt, and without before each later forward.
        """
        raise NotImplementedError
