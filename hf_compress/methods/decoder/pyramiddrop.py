"""PyramidDrop: geometric shrinkage at three depths (arXiv:2410.17247)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from hf_compress import budget
from hf_compress.methods.base import DecoderMethod, check_layers
from hf_compress.registry import register


@register("pyramiddrop", stage="decoder", kind="dropping", paper="arXiv:2410.17247", needs={"visual"})
@dataclass
class PyramidDrop(DecoderMethod):
    """Geometric shrinkage at T/4, T/2 and 3T/4, ranked by the queries and keys of the next layer.

    At the s-th boundary floor(V * shrink**s) of the V visual tokens remain: those to which the last instruction token
    (in training: every token that precedes an answer) attends most, read from the normed input, queries and keys of
    the layer about to run. `shrink` follows from `ratio`. Positions are kept. The release numbers what is left anew at
    every boundary, so that distances shrink and later boundaries rank other tokens than here; a cache would then need
    positions of its own per layer, which is not offered.

    On clips of the built-in video model it loses: 73 and 60 % right with 50 and 75 % removed, `random` 81 and 67 (200
    questions). Of the tokens that the last cut leaves at 50 % 6 % show an object, where 20 % of all do: what these
    layers look at at the end of the prompt are not the tokens that hold the answer.

    Source: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", CVPR
    2025, arXiv:2410.17247. Cost: per boundary one row, and norm, projection and rotation of the keys of all rows.

    Args:
        layers: boundaries, ascending; default T/4, T/2, 3T/4 of T decoder layers.
    """

    layers: Sequence[int] | None = None

    source = "next"
    least: ClassVar[int] = 1  # rows that stay, whatever the ratio
    example = {"ratio": 0.4}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            check_layers("layers", self.layers)
            self.layers = tuple(self.layers)

    def boundaries(self, layers: int) -> Sequence[int]:
        """The boundaries in a decoder of so many layers."""
        at = self.layers or (layers // 4, layers // 2, 3 * layers // 4)
        if at[-1] >= layers or at[0] < 1 or len(set(at)) < len(at):
            raise ValueError(f"layers={self.layers!r} does not fit a decoder of {layers} layers; name other boundaries")
        return at

    def plan(self, layers: int, tokens: int, ratio: Fraction) -> dict[int, int]:
        at = self.boundaries(layers)

        def counts(shrink: Fraction) -> list[int]:
            return [max(self.least, (tokens * shrink ** (s + 1)).__floor__()) for s in range(len(at))]

        return budget.cuts(at, layers, tokens, ratio, counts)
