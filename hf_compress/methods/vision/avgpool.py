"""Average pooling of the visual tokens (LLaVolta's visual context compressor)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from hf_compress.methods.base import VisionMethod, check_choice
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.merge import pool1d, pool_cells
from hf_compress.tensors.select import identity

__all__ = ["AvgPool"]


@register("avgpool", stage="vision", kind="merging", paper="arXiv:2406.20092", needs={"visual"})
@dataclass
class AvgPool(VisionMethod):
    """Means of K consecutive windows of the raster sequence.

    Token i falls into window `i * K // N`; every window becomes the mean of its projected tokens and takes
    the slot of its middle token (rounded down). Cost O(N * D), no attention.

    Source: "Efficient Large Multi-modal Models via Visual Context Compression" (LLaVolta), arXiv:2406.20092,
    the compressor in front of the language model. Its code pools with window = stride = s over one block of
    576 tokens: the same when K divides N; every other K (unequal windows) is our extension, as is `grid`.
    Windows of the sequence join the end of one row with the start of the next.

    The paper trains the model with its compressor. Without that it loses to tokens drawn at random, as a mean of unlike
    tokens is like none of them (built-in LLaVA, 400 questions: 79.0 % at ratio 0.5, random 91.2 %).

    Args:
        grid: pool rectangles of the (h, w) grid instead: a * b = K cells, the factorisation nearest to the
            shape of the grid.

    Raises:
        ValueError: `grid` or `positions` is not one of its values.
    """

    grid: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("grid", self.grid, (True, False))

    def check(self, grid: tuple[int, int], keep: int) -> None:
        """Refuses a count that does not factorise near the shape of the grid."""
        if self.grid and keep < grid[0] * grid[1]:
            cells(*grid, keep)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Groups (n, N) with plain means, kept (n, K) the middle token of each window.

        Raises:
            ValueError: `grid` is on and `keep` has no factorisation near the shape of the grid.
        """
        n, (h, w) = len(tokens), tokens.grid
        if keep == tokens.count:
            return Assignment(identity(n, keep, tokens.device))
        if self.grid:
            groups, centres = pool_cells(h, w, *cells(h, w, keep), tokens.device)
        else:
            groups, centres = pool1d(tokens.count, keep, tokens.device)
        return Assignment(centres.repeat(n, 1), groups.repeat(n, 1))


def cells(h: int, w: int, keep: int) -> tuple[int, int]:
    """The factors (a, b) of `keep`, a <= h and b <= w, whose aspect is nearest to that of the grid.

    Raises:
        ValueError: none is within a factor of two of the nearest aspect that `keep` cells could have.
    """
    found = factors(h, w, keep)
    if found is None:
        less = next(k for k in range(keep - 1, 0, -1) if factors(h, w, k))
        more = next(k for k in range(keep + 1, h * w + 1) if factors(h, w, k))
        raise ValueError(
            f"keep={keep} does not factorise into cells shaped like a {h} x {w} grid, which grid=True needs; the "
            f"nearest that do are {less} and {more} (of 1 to {h * w}), and grid=False reaches them all"
        )
    return found


def factors(h: int, w: int, keep: int) -> tuple[int, int] | None:
    """What `cells` gives, None where there is nothing."""
    low, high = max(Fraction(1), Fraction(keep, w)), min(h, keep)
    wish = min(max(Fraction(keep * h, w), low**2), Fraction(high**2))  # a * a of the ideal cells
    fits = [(a, keep // a) for a in range(1, high + 1) if keep % a == 0 and keep // a <= w]
    bend = [max(a * a / wish, wish / (a * a)) for a, _ in fits]
    return fits[bend.index(min(bend))] if fits and min(bend) <= 2 else None
