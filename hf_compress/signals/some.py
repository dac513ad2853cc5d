"""Some of the tokens of every sequence, shown as if there were no others."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_compress.signals.answer import Assignment
from hf_compress.signals.tokens import Tokens


class SomeTokens:
    """The tokens at `at` (n, M) of sequences of N: what a method shows another one. They stand on no grid.

    Signals are those that they have among all tokens: attention is neither renormalised nor taken anew.
    """

    def __init__(self, tokens: Tokens, at: Tensor):
        self._tokens, self._at = tokens, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokens, name)  # of the whole sequence: content, question, depth, device, module, losses

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def count(self) -> int:
        return self._at.shape[1]

    @property
    def grids(self) -> list[tuple[int, int]]:
        raise ValueError("some tokens of an image stand on no grid: use a method that reads none")

    @property
    def grid(self) -> tuple[int, int]:
        (grid,) = self.grids
        return grid

    @property
    def place(self) -> Tensor:
        return self._pick(self._tokens.place)

    @property
    def image(self) -> Tensor:
        return self._pick(self._tokens.image)

    @property
    def embeddings(self) -> Tensor:
        return self._pick(self._tokens.embeddings)

    @property
    def features(self) -> Tensor:
        return self._pick(self._tokens.features)

    def attention(self, back: int = 0, **which: Any) -> Tensor:
        return self._pick(self._tokens.attention(back, **which).mT).mT

    def states(self, what: str, back: int = 0, *, heads: str = "mean") -> Tensor:
        return self._pick(self._tokens.states(what, back, heads=heads))

    def _pick(self, x: Tensor) -> Tensor:
        return Assignment(self._at).pick(x)

    def among_all(self, answer: Assignment) -> Assignment:
        """What a method answered for these tokens, as an answer for all: the others vanish."""
        n, N = len(self), self._tokens.count

        def spread(x: Tensor | None, other: float) -> Tensor | None:
            return None if x is None else x.new_full((n, N), other).scatter_(1, self._at, x)

        dense = answer.dense
        if dense is not None:
            dense = dense.new_zeros(n, dense.shape[1], N).scatter_(2, self._at[:, None].expand_as(dense), dense)
        return Assignment(
            self._at.gather(1, answer.kept),
            spread(answer.groups, -1),
            spread(answer.weight, 0),
            dense,
            answer.before_projector,
            answer.valid,
        )
