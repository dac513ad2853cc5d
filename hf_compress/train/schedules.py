"""How much is removed at which step of a training: pure functions of the step, so that ranks and resumed runs agree."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hf_compress import budget


class RatioSchedule:
    """A ratio (fraction removed) per optimiser step, for `CompressionCallback`."""

    def at(self, step: int, steps: int) -> float:
        """The ratio of optimiser step `step` of `steps`, counted from 0; the same whenever and wherever it is asked."""
        raise NotImplementedError

    def within(self, step: int, steps: int, micro: int) -> float:
        """The ratio of micro batch `micro` of that step, counted from 0; by default the same in all of them."""
        return self.at(step, steps)

    @property
    def bounds(self) -> tuple[float, ...]:
        """Ratios between which, or at which, all others lie: these are checked before the training begins."""
        raise NotImplementedError

    @property
    def parts(self) -> int:
        """Micro batches that belong together: a step must have a multiple of them."""
        return 1


def _check(*ratios: Any) -> None:
    for ratio in ratios:
        budget.check_ratio(ratio)


def _check_several(ratios: Any) -> tuple[float, ...]:
    if not isinstance(ratios, (list, tuple)) or not ratios:
        raise ValueError(f"ratios={ratios!r} must be a list of one ratio or more")
    _check(*ratios)
    return tuple(ratios)


@dataclass(frozen=True)
class Fixed(RatioSchedule):
    """The same ratio at every step."""

    ratio: float

    def __post_init__(self) -> None:
        _check(self.ratio)

    def at(self, step: int, steps: int) -> float:
        return self.ratio

    @property
    def bounds(self) -> tuple[float, ...]:
        return (self.ratio,)


@dataclass(frozen=True)
class Linear(RatioSchedule):
    """From `start` at the first step to `end` at the last, in a line."""

    start: float
    end: float

    def __post_init__(self) -> None:
        _check(self.start, self.end)

    def at(self, step: int, steps: int) -> float:
        done = min(1.0, step / max(1, steps - 1))
        return self.start + (self.end - self.start) * done

    @property
    def bounds(self) -> tuple[float, ...]:
        return (self.start, self.end)


@dataclass(frozen=True)
class Stages(RatioSchedule):
    """One ratio after the other.

    Args:
        ratios: one per stage.
        starts: the step at which each stage begins, ascending from 0. Default: stages of ceil(steps / stages) steps.
    """

    ratios: Sequence[float]
    starts: Sequence[int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", _check_several(self.ratios))
        if (starts := self.starts) is None:
            return
        if len(starts) != len(self.ratios) or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(f"starts={starts} must be one step per ratio of {self.ratios}, ascending from 0")

    def at(self, step: int, steps: int) -> float:
        if self.starts is not None:
            return self.ratios[sum(start <= step for start in self.starts) - 1]
        length = max(1, math.ceil(steps / len(self.ratios)))
        return self.ratios[min(step // length, len(self.ratios) - 1)]

    @property
    def bounds(self) -> tuple[float, ...]:
        return tuple(self.ratios)


@dataclass(frozen=True)
class Sampled(RatioSchedule):
    """One of `ratios`, drawn anew at every step, so that the trained model serves all of them.

    The draw follows from `seed` and the step alone: no generator is kept, moved or saved.
    """

    ratios: Sequence[float]
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", _check_several(self.ratios))

    def at(self, step: int, steps: int) -> float:
        return random.Random(f"{self.seed} {step}").choice(list(self.ratios))  # of a text: equal on all machines

    @property
    def bounds(self) -> tuple[float, ...]:
        return tuple(self.ratios)


@dataclass(frozen=True)
class Every(RatioSchedule):
    """All of `ratios` at every step, one in each of its micro batches (`gradient_accumulation_steps`).

    The loss of a step is then the mean of all ratios: that of M3 (arXiv:2405.17430), but for the samples, which there
    are the same at all ratios and here are those of the micro batch. A last step of an epoch that has fewer micro
    batches has the first ratios.
    """

    ratios: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", _check_several(self.ratios))

    def at(self, step: int, steps: int) -> float:
        return self.ratios[0]

    def within(self, step: int, steps: int, micro: int) -> float:
        return self.ratios[micro % len(self.ratios)]

    @property
    def bounds(self) -> tuple[float, ...]:
        return tuple(self.ratios)

    @property
    def parts(self) -> int:
        return len(self.ratios)


# Its code pools by a stride of S from decoder layer K of 32 on: (8, 2), (2, 2), (2, 16), and nothing in the last
# quarter. The ratio is what that removes of all visual rows of all layers, (32 - K) / 32 * (1 - 1 / S).
NAMED = {"llavolta": Stages((30 / 32 * 7 / 8, 30 / 32 / 2, 16 / 32 / 2, 0.0))}


def schedule_of(value: RatioSchedule | float | str) -> RatioSchedule:
    """A schedule as it is, the fixed one of a ratio, or one by its name.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, RatioSchedule):
        return value
    if isinstance(value, str):
        if value in NAMED:
            return NAMED[value]
        raise ValueError(f"schedule={value!r} must be one of {sorted(NAMED)}, a ratio, or a schedule of its own")
    return Fixed(value)
