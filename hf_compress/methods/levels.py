"""Vision methods whose module reads several levels of the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_compress.methods.base import check_counts
from hf_compress.methods.cells import CellMethod
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.cells import cells

__all__ = ["LevelMethod"]

PUBLISHED, OF = (11, 7, 1, 0), 23  # hidden states 12, 16, 22 and 23 of a tower whose 23rd the projector reads


@dataclass
class LevelMethod(CellMethod):
    """A `CellMethod` whose module is also called with hidden states of the tower, (n, N, levels * C) side by side.

    They carry no gradient. The module is the method's `tower_reader`.

    Args:
        levels: blocks of the tower before the one whose features the projector reads, over blocks that see the whole
            image. Default: hidden states 12, 16, 22 and 23 of 23, or the blocks that are there in their place.
    """

    levels: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels is not None:
            check_counts("levels", self.levels, least=0)
            if not self.levels or len(set(self.levels)) < len(self.levels):
                raise ValueError(f"levels={self.levels!r} must be one block or more, each once")

    def backs(self, depth: int) -> list[int]:
        """The levels of a tower of so many blocks, the deepest last."""
        if self.levels is not None:
            return sorted(self.levels, reverse=True)
        return sorted({round(depth * back / OF) for back in PUBLISHED}, reverse=True)

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", back, "hidden") for back in self.backs(depth)}

    def module(self, model: nn.Module) -> nn.Module | None:
        """What it trains has the width of the tower: see `tower_reader`."""
        return None

    def seen(self, tokens: Tokens) -> Tensor:
        """(n, N, levels * C)."""
        return torch.cat([tokens.states("hidden", back) for back in self.backs(tokens.depth)], -1)

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        assert tokens.module is not None
        layout = cells(*tokens.grid, assignment.kept.shape[1], tokens.device)
        out: Tensor = tokens.module(tokens.embeddings, self.seen(tokens), layout)
        return out
