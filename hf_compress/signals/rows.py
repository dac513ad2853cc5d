"""What methods see between the layers of the language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn


class DecoderView(Protocol):
    """The rows that enter one decoder layer; samples that are packed into one row of the batch are B of their own."""

    layer: int
    layers: int
    hidden: Tensor  # (B, S, D)
    valid: Tensor  # (B, S) bool, False on padding
    visual: Tensor  # (B, S) bool, True on visual tokens
    image: Tensor  # (B, S) int64, ordinal of the image in its sample, -1 on text
    memory: dict[str, Tensor]
    """(B, S) or (B, S, ...) by name: lives through the forward, moves with the rows; anything where `valid` is not."""
    module: nn.Module | None  # what the method trains (`Method.module`), as it is now; for `gate`, never to be held
    losses: list[Tensor]  # scalars appended here, by `gate`, are added to the loss of this forward

    @property
    def budget(self) -> list[int]:
        """Of each sample, how many of the rows that came in and may go are to go through all layers together."""

    @property
    def kv_heads(self) -> int:
        """How many heads of keys and values a layer has."""

    @property
    def prompt(self) -> Tensor:
        """(B, S) bool: rows of the prompt, neither padding nor generated nor answers to train on."""

    @property
    def first(self) -> Tensor:
        """(B, S) int64: how many rows of its sample came into the language model before each row.

        Of earlier turns all that the caller fed are counted, padding not.
        """

    @property
    def last(self) -> Tensor:
        """(B, S) int64: how many rows of the prompt came into the language model behind each row."""

    @property
    def removable(self) -> Tensor:
        """(B, S) bool: rows that may go, as `DecoderMethod.removable` says."""

    @property
    def speaks(self) -> Tensor:
        """(B, S) bool: rows that the answers are predicted from."""

    @property
    def final(self) -> Tensor:
        """(B, S, D): `hidden` behind the final norm of the language model."""

    def keys(self, *, source: str) -> Tensor:
        """(B, S, Hkv * d): the rotated keys of the rows, heads side by side, with the sources of `attention`."""

    def attention(
        self,
        *,
        source: str,
        voters: Tensor | None = None,
        of: Callable[[Tensor], Tensor] | None = None,
        over: str = "mean",
        softmax: bool = True,
        back: int = 0,
    ) -> Tensor:
        """(B, S) fp32: what the voting rows attend to, mean over heads and voters (softmax over all visible keys).

        The voters are the last prompt row of each sample; in training every row that precedes an answer; or those that
        are True in `voters` (B, S). `source="own"` reads the layer just run, `source="next"` the queries and keys of
        the layer about to run. Samples are told apart. The layer just run has looked at earlier turns too, whose share
        is not returned; of the layer about to run only the rows of this forward are read. Rows are read in blocks,
        never all with all: `of` turns those (B, H, r, S) of some voters into (B, ..., r, S), whose mean over all voters
        (B, ..., S) is returned; None: into the mean over heads. `over="max"` returns the largest of all voters. Without
        `softmax` these are the scaled products of queries and keys, 0 where a voter does not see. `back=1` reads the
        layer before the one just run, if no row has left since and the method says so (`DecoderMethod.back`).
        """

    @property
    def changes(self) -> list[tuple[Tensor, Tensor]]:
        """How the attention and the MLP of layers that have been run change rows, before they are added to them.

        Of the two parts of every layer that was declared (`Read("layer", i, "changes")`), since rows last left, in
        order: how long (B, S) fp32 what comes out is, over what goes in (behind the norm), and their cosine (B, S).
        """

    def received(self, weight: Tensor, *, source: str, sharpness: float = 1.0) -> Tensor:
        """(B, H, S) fp32: the attention that each row receives from all rows, summed with `weight` (B, 1 or H, S).

        One product of the rows with each other, in blocks, never S x S. Logits are multiplied by `sharpness` first.
        Sources and earlier turns are as of `attention`.
        """
