"""Means of scores with intervals that hold for few images, with several questions about each.

Questions about one image are answered alike, so that images are what is independent. The variance of a mean is taken
between images (CR2, Bell & McCaffrey 2002), with the degrees of freedom that images of different weight leave, and the
interval is Wilson's, of as many independent answers as that variance is worth (as in Korn & Graubard 1998). How often
it holds: `python benchmarks/coverage.py`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
SHARES = (0.0, 1.0)  # what a score can be
DIFFERENCES = (-1.0, 1.0)  # what the difference of two scores can be


@dataclass(frozen=True)
class Mean:
    """A mean over questions.

    Attributes:
        value: the mean.
        variance: of it; 0 where all groups have the same mean.
        freedom: degrees of freedom of the variance.
        groups: how many images (or texts) the questions are about.
        bounds: what a value can be.
    """

    value: float
    variance: float
    freedom: float
    groups: int
    bounds: tuple[float, float] = SHARES

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Its ends, within the bounds.

        Where all groups agree, others could still differ: so many of them that a sample shows none but by chance
        (Clopper & Pearson 1934), each as far as the bounds allow. It never has width zero.

        Raises:
            ValueError: `confidence` is not in 0..1.
        """
        from scipy.stats import t

        if not 0 < confidence < 1:
            raise ValueError(f"confidence={confidence!r} must lie between 0 and 1, such as 0.95")
        (low, high), tail = self.bounds, (1 - confidence) / 2
        if not self.variance:
            unseen = 1 - tail ** (1 / self.groups)
            return self.value - unseen * (self.value - low), self.value + unseen * (high - self.value)
        share, spread, q = self._share, self._spread, float(t.isf(tail, self.freedom))
        worth = q * q * spread**2 / (share * (1 - share))  # q^2 over the number of independent answers
        middle = (share + worth / 2) / (1 + worth)
        half = (q * q * spread**2 + worth**2 / 4) ** 0.5 / (1 + worth)
        scale = high - low
        return max(low, low + scale * (middle - half)), min(high, low + scale * (middle + half))

    def p_value(self) -> float:
        """How often a mean of zero would come out as far off, on either side: at most 1 - c where `interval(c)` leaves
        zero out."""
        from scipy.stats import t

        if not self.variance:  # the sign test of the groups, where they differ by 1
            return float(min(1.0, 2 * (1 + abs(self.value) / self.bounds[1]) ** -self.groups))
        share = self._share
        off = abs(share - (0 - self.bounds[0]) / (self.bounds[1] - self.bounds[0]))
        return float(2 * t.sf(off * (share * (1 - share)) ** 0.5 / (0.5 * self._spread), self.freedom))

    @property
    def _share(self) -> float:
        return (self.value - self.bounds[0]) / (self.bounds[1] - self.bounds[0])

    @property
    def _spread(self) -> float:
        """Standard error of `_share`."""
        return self.variance**0.5 / (self.bounds[1] - self.bounds[0])


def mean_of(
    values: Sequence[float], groups: Sequence[Hashable] | None = None, bounds: tuple[float, float] = SHARES
) -> Mean:
    """Mean of one value per question.

    Args:
        values: such as scores, or differences of scores.
        groups: what belongs together, such as the image of each question; each question on its own if None.
        bounds: what a value can be.

    Raises:
        ValueError: there are no values, one is out of bounds, or the counts differ.
    """
    if not len(values) or (groups is not None and len(groups) != len(values)):
        count = len(values) if groups is None else len(groups)
        raise ValueError(f"{len(values)} values in {count} groups: pass at least one value, and a group for each")
    wrong = [v for v in values if not bounds[0] <= v <= bounds[1]]
    if wrong:
        raise ValueError(f"values={wrong[:3]}: a value must lie between {bounds[0]:g} and {bounds[1]:g}")
    parts: dict[Hashable, list[float]] = {}
    for name, value in zip(range(len(values)) if groups is None else groups, values):
        parts.setdefault(name, []).append(value)
    sums, sizes = np.array([sum(p) for p in parts.values()]), np.array([float(len(p)) for p in parts.values()])
    mean = float(sums.sum() / sizes.sum())
    if np.ptp(sums / sizes) < 1e-9:
        return Mean(mean, 0.0, len(sums) - 1.0, len(sums), bounds)
    share = sizes / sizes.sum()
    off = (sums - mean * sizes) / sizes.sum()
    return Mean(mean, float((off**2 / (1 - share)).sum()), _freedom(share), len(sums), bounds)


def interval(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
    bounds: tuple[float, float] = SHARES,
) -> tuple[float, float, float]:
    """(mean, low, high) of what `mean_of` takes; of differences with `bounds` (-1, 1)."""
    found = mean_of(values, groups, bounds)
    return found.value, *found.interval(confidence)


def _freedom(share: np.ndarray) -> float:
    """Satterthwaite degrees of freedom of CR2, for groups whose answers go together; G - 1 where shares are equal."""
    # tr(S)^2 / tr(S^2) of S = (D - h h') W (D - h h'), where h are the shares, D = diag(h), W = diag(1 / (1 - h))
    u = share**2 / (1 - share)
    s, p, q, r = u.sum(), u @ u, share @ share, u @ share
    diagonal = -2 * u * share + s * share**2
    square = p + 2 * (u @ diagonal) + 2 * p * q + 2 * r**2 + (s * q) ** 2 - 4 * s * r * q
    return float((s + diagonal.sum()) ** 2 / square)
