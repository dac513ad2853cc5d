"""What methods see of the KV cache, and what readers see of an attention over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor, nn


class Order(Protocol):
    """The entries of one layer by nothing but their order, as one row finds them (or several, each in its own way).

    Tensors over slots are (B, 1, S), or (B, Hkv, S) once heads hold different entries; of several rows (B, 1 or Hkv,
    q, S), and what is (B, 1, 1) below is (B, 1, 1 or q, 1). A number stands for the same one in all rows and heads.
    """

    depth: int  # how many of the layers that the method acts on come before this one
    depths: int  # how many layers the method acts on
    valid: Tensor  # (B, 1 or Hkv, S) bool
    order: Tensor  # (B, 1 or Hkv, S) int64, rank of each valid entry among the valid entries of its row
    lengths: Tensor  # (B, 1 or Hkv, 1) int64, number of valid entries
    budget: Tensor  # (B, 1, 1) int64, entries each head may keep, incoming ones included
    incoming: int  # entries that arrive next and are kept anyway: 0 at the end of the prompt, 1 while decoding
    cursor: Tensor | int | None  # (B, 1, 1) int64, what `Holding.cursor` said last; None before


class Rivals(NamedTuple):
    """The entries of which one goes when a token comes to a full cache: one, or two neighbours by age."""

    first: int  # rank of the older one
    pair: bool = False
    cursor: int | None = None  # where the method goes on then


class CacheView(Order, Protocol):
    """The entries of one layer: keys and values, their order, and attention rows of the prompt on request.

    Tensors over slots are (B, 1, S), or (B, Hkv, S) once heads hold different entries.
    """

    layer: int
    layers: int
    shape: tuple[int, int, int]  # (B, Hkv, S)
    scores: Tensor | None  # (B, Hkv, S) fp32 running score, of methods that keep one
    votes: Tensor | None  # (B, Hkv, S) int64, how many rows it sums, of methods that count them

    @property
    def module(self) -> nn.Module | None:
        """What the method trains (`Method.module`), as it is now: looked up at every call, never to be held."""

    def once(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, computed once for this layer and prompt: `score` and `merge` may share it."""

    @property
    def keys(self) -> Tensor:
        """(B, Hkv, S, d), as stored (rotated); while decoding asking may cost a copy."""

    @property
    def values(self) -> Tensor:
        """(B, Hkv, S, d), likewise."""

    @property
    def visual(self) -> Tensor:
        """(B, 1 or Hkv, S) bool, True on visual entries."""

    @property
    def content(self) -> Tensor:
        """(B,) int64, for methods that read it: a number for the ids of each prompt and the pixels of its images.

        Neither the rest of the batch nor padding changes it. Only at the end of the prompt.
        """

    @property
    def position(self) -> Tensor:
        """(B, 1 or Hkv, S) int64, where each entry stands in the caller's sequence, less what was removed before."""

    @property
    def queries(self) -> Tensor:
        """(B, Hq, S, d) rotated queries of the prompt. Only at the end of the prompt."""

    @property
    def scaling(self) -> float:
        """What the products of queries and keys are multiplied by. Only at the end of the prompt."""

    def unrotate(self, x: Tensor) -> Tensor:
        """(B, H, S, d) queries or keys of the prompt before their rotation. Only at the end of the prompt."""

    def rotate(self, x: Tensor) -> Tensor:
        """The reverse of `unrotate`."""

    @property
    def rotation(self) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """cos and sin (B or 1, S, d') of the prompt, and what turns (B, H, S, d) by them. Only at its end."""

    def future_rotation(self, count: int) -> Tensor:
        """(B or 1, d, d) fp32: mean rotation of the next `count` positions of text, `x @ it` turns vectors (..., d).

        Only at the end of the prompt.
        """

    def window_rows(self, rows: Tensor) -> Tensor:
        """(B, Hq, R, S) fp32 attention of the newest rows[b] rows of the prompt of sample b, zero where b has fewer."""

    def window_attention(self, rows: Tensor) -> Tensor:
        """(B, Hkv, S) fp32: attention that each entry receives from the newest rows[b] rows of the prompt of sample b.

        Summed over the rows, mean over the query heads of a group. Only at the end of the prompt.
        """

    def column_sums(self, *, normalize: bool = False, weight: Tensor | None = None) -> Tensor:
        """(B, Hkv, S) fp32: attention that each entry receives from all rows of the prompt, mean over a group.

        Rows count with `weight` (B, S), 1 by default. Divided by the weight of the rows that see the entry if
        `normalize`. Streamed in blocks of rows, never S x S. A method that reads `COLUMNS` gets those of all rows
        from the attention itself on a CPU; else it is a second pass over the attention of the prompt, which takes
        about as long as the first (half its products, all its exponentials). Rows without weight cost nothing. Only
        at the end of the prompt.
        """


class Slots(Protocol):
    """Rows of the caller, as a layer holds them; tensors are (B, S), or (B, Hkv, S) where heads hold different ones."""

    @property
    def index(self) -> Tensor:
        """int64, the caller's row behind each slot, earlier turns counted."""

    @property
    def image(self) -> Tensor:
        """int64, ordinal of the image in its sample, -1 on text."""

    @property
    def valid(self) -> Tensor:
        """bool, False on padding and on slots that only fill up."""


class Reading(Protocol):
    """One attention call of one layer, the rows that are fed among its entries (the newest)."""

    layer: int
    layers: int
    depth: int  # how many of the layers that the method acts on come before this one
    depths: int  # how many layers the method acts on
    queries: Tensor  # (B, Hq, q, d) rotated
    keys: Tensor  # (B, Hkv, S, d) rotated
    values: Tensor  # (B, Hkv, S, d')
    scaling: float
    memory: dict[str, Tensor]  # of this forward, from layer to layer
    side: dict[str, Tensor]  # of this layer: (B, Hkv, S) by name, which moves with the entries; new ones have zeros

    @property
    def module(self) -> nn.Module | None:
        """As of `CacheView`."""

    @property
    def rows(self) -> Slots:
        """The rows that are fed."""

    @property
    def entries(self) -> Slots:
        """All that is stored, these rows among it."""

    @property
    def owner(self) -> Tensor | None:
        """(B, R) int64, of each row of the caller so far the one whose entry stands for it: itself, or the one that it
        was merged into; -1 for one that is gone, or that came in an earlier call. None: nothing was merged."""

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """(B, H, S, d) rotated queries or keys as they would be `by` (B, S) positions on, see `Reader.turns`."""

    @property
    def visible(self) -> Tensor:
        """(B, 1 or Hkv, q, S) bool: what each row may see."""
