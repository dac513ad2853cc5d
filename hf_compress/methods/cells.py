"""Vision methods whose outputs stand for cells of the grid, filled by a module of their own."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hf_compress.methods.base import VisionMethod
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.cells import cells

__all__ = ["CellMethod", "check_queries"]


class CellMethod(VisionMethod):
    """K outputs in the slots of the middle tokens of K cells (`tensors.cells`), each what its module makes for a cell.

    The module, from `Method.module`, is called with the projected tokens (n, N, D) and the cells, and gives (n, K, D).
    As the tower is not touched, this works on every model, and only the language model saves.
    """

    needs_weights: ClassVar[bool] = True

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """The middle tokens of the cells, (n, K)."""
        return Assignment(cells(*tokens.grid, keep, tokens.device).centres.repeat(len(tokens), 1))

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        """(n, K, D), what the module gives."""
        assert tokens.module is not None
        layout = cells(*tokens.grid, assignment.kept.shape[1], tokens.device)
        out: Tensor = tokens.module(tokens.embeddings, layout)
        return out


def check_queries(queries: int, grid: tuple[int, int], keep: int, name: str = "queries") -> None:
    """Raises ValueError where `keep` tokens of an (h, w) grid shall be made by fewer trained queries (or `name`)."""
    if queries < keep < grid[0] * grid[1]:
        raise ValueError(
            f"{name}={queries} give at most {queries} tokens, and {keep} of {grid[0]} x {grid[1]} shall stay; remove "
            f"more, or set {name}= (and train them)"
        )
