"""Exact integer budgets. Every count in the package comes from here; nothing computes `int(n * (1 - ratio))`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_compress.config import Schedule


def check_ratio(ratio: object, name: str = "ratio") -> Fraction:
    """`ratio` as an exact fraction: 8/9 typed as a float becomes 8/9 again.

    Raises:
        ValueError: not a number in [0, 1).
    """
    return check_share(ratio, name, "the fraction removed")


def check_share(share: object, name: str, what: str = "the share") -> Fraction:
    """`share`, the knob `name` of a method, as an exact fraction; `what` is said of it where it is none.

    Raises:
        ValueError: not a number in [0, 1).
    """
    if isinstance(share, bool) or not isinstance(share, (int, float, Fraction)) or not 0 <= share < 1:
        raise ValueError(f"{name}={share!r}: {what} must be a number with 0 <= {name} < 1")
    return _exact(float(share))


@lru_cache(maxsize=256)
def _exact(ratio: float) -> Fraction:
    exact = Fraction(ratio).limit_denominator(10**6)
    return exact if exact < 1 else Fraction(ratio)


def check_keep(keep: object, name: str = "keep") -> int:
    """`keep` as an int.

    Raises:
        ValueError: not an integer of at least 1.
    """
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"{name}={keep!r}: the number kept must be an integer of at least 1")
    return keep


@lru_cache(maxsize=1024)
def kept(n: int, ratio: Fraction | float, *, floor: bool = False) -> int:
    """How many of `n` remain when the fraction `ratio` is removed: at least 1, half to even (or rounded down).

    Vision budgets round half to even, cache budgets round down (the cards of the methods).
    """
    if n == 0:
        return 0
    exact = n * (1 - check_ratio(ratio))
    return max(1, exact.__floor__() if floor else round(exact))


def shares(total: int, weights: Sequence[float | Fraction], capacity: Sequence[int] | None = None) -> list[int]:
    """Integers that sum to `total`, in proportion to `weights`, by largest remainders, none above its `capacity`.

    What one cannot hold goes to the others in proportion; of equal remainders the earlier one is rounded up.

    Raises:
        ValueError: the capacities cannot hold `total`.
    """
    room = list(capacity) if capacity is not None else [total] * len(weights)
    if len(room) == 1 and total <= room[0]:
        return [total]
    if sum(room) < total:
        raise ValueError(f"cannot share {total} over capacities {room}: they hold {sum(room)}")
    out, left, open_ = [0] * len(room), total, [i for i, n in enumerate(room) if n]
    while open_:
        mass = sum(Fraction(weights[i]) for i in open_)
        part = {i: left * (Fraction(weights[i]) / mass if mass else Fraction(1, len(open_))) for i in open_}
        full = [i for i in open_ if part[i] >= room[i]]
        if not full:
            break
        for i in full:  # what these cannot hold goes to the others
            out[i] = room[i]
            left -= room[i]
        open_ = [i for i in open_ if i not in full]
    for i in open_:
        out[i] = int(part[i])
    rest = left - sum(out[i] for i in open_)
    for i in sorted(open_, key=lambda i: (out[i] - part[i], i))[:rest]:
        out[i] += 1
    return out


def cost(schedule: Schedule, most: int | None = None) -> Fraction:
    """The mean level of a schedule: rows per layer, or entries per head of a layer; of what `most` are there, if given.

    Levels of 0, of layers with a sliding window, do not count.
    """
    levels = [level if most is None else min(level, most) for level in schedule.levels if level]
    return Fraction(sum(levels), max(1, len(levels)))


def solve(
    count: Callable[[Fraction], int], target: Fraction, lo: Fraction, hi: Fraction, *, steps: int = 40
) -> Fraction:
    """The knob in [lo, hi] whose integer `count` is nearest to `target`; `count` must not fall as the knob rises."""
    for _ in range(steps):
        mid = (lo + hi) / 2
        if count(mid) < target:
            lo = mid
        else:
            hi = mid
    return min((lo, hi), key=lambda knob: abs(count(knob) - target))


def cuts(
    at: Sequence[int],
    layers: int,
    tokens: int,
    ratio: Fraction,
    counts: Callable[[Fraction], Sequence[int]],
    most: int = 1,
) -> dict[int, int]:
    """Visual rows behind each cut, so that their mean over all layers is nearest to `tokens` (1 - `ratio`).

    Args:
        at: the first short layer of each cut, ascending.
        counts: knob in [0, `most`] -> rows behind each cut, which must not fall as the knob rises.

    Raises:
        ValueError: the knob 0 still keeps more.
    """
    spans = [b - a for a, b in pairwise((*at, layers))]

    def total(knob: Fraction) -> int:
        return at[0] * tokens + sum(n * span for n, span in zip(counts(knob), spans))

    target, least = layers * tokens * (1 - ratio), total(Fraction(0))
    if target < least:
        raise ValueError(
            f"ratio={float(ratio):.4g} cannot be reached with cuts before layers {tuple(at)} of {layers}: of {tokens} "
            f"visual tokens reachable is 0 <= ratio <= {float(1 - Fraction(least, layers * tokens)):.4g}; cut earlier, "
            "or remove less"
        )
    return dict(zip(at, counts(solve(total, target, Fraction(0), Fraction(most)))))


@lru_cache(maxsize=256)
def pyramid(mean: int, length: int, layers: int, window: int = 0, beta: int = 20) -> tuple[int, ...]:
    """Entries of each layer, falling linearly with depth, `mean` on average (PyramidKV, arXiv:2406.02069).

    Beyond `window` entries, which every layer keeps, the last layer gets 1 / beta of the mean and the first as much
    more than the mean; no layer more than the `length` of the prompt. Sums to layers * mean exactly.
    """
    if mean >= length or layers == 1:
        return (mean,) * layers
    window = min(window, mean - 1)
    rest = Fraction(mean - window)
    low = rest / beta
    high = 2 * rest - low
    if high > length - window:
        high = Fraction(length - window)
        low = 2 * rest - high
    exact = [high - i * (high - low) / (layers - 1) for i in range(layers)]
    spare = layers * (mean - window - 1)
    parts = shares(spare, [max(e - 1, Fraction(0)) for e in exact], [length - window - 1] * layers)
    return tuple(window + 1 + p for p in parts)
