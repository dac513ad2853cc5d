"""Whether the knobs of a method are what they must be."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import NamedTuple


def check_choice(name: str, value: object, options: tuple[object, ...]) -> None:
    """Raises ValueError unless `value` is one of `options`, and of its type: True is not 1, and 2.0 not 2."""
    for option in options:
        if isinstance(value, type(option)) and isinstance(value, bool) == isinstance(option, bool) and value == option:
            return
    raise ValueError(f"{name}={value!r} must be one of {options}")


def check_count(name: str, value: object, least: int = 1, most: int = 2**31 - 1) -> None:
    """Raises ValueError unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
    if value > most:
        raise ValueError(f"{name}={value!r} must be an integer of at most {most}")


def check_counts(name: str, values: object, least: int = 1) -> None:
    """Raises ValueError unless `values` is a list (or tuple) of integers of at least `least`."""
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name}={values!r} must be a list of integers of at least {least}")
    for value in values:
        check_count(name, value, least)


def check_layers(name: str, values: object) -> None:
    """Raises ValueError unless `values` are ascending numbers of layers, 0 excluded."""
    check_counts(name, values)
    assert isinstance(values, (list, tuple))
    if not values or any(a >= b for a, b in pairwise(values)):
        raise ValueError(f"{name}={tuple(values)!r} must be ascending layer numbers, the first at least 1")


def check_number(
    name: str, value: object, least: float, most: float = math.inf, *, above: bool = False, below: bool = False
) -> None:
    """Raises ValueError unless `value` is a finite number from `least` (or `above` it) to `most` (or `below` it)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    ends = [least] * above + [most] * below + [math.inf]
    if not number or not least <= value <= most or value in ends:  # type: ignore[operator]
        bound = "" if most == math.inf else f" and {'below' if below else 'at most'} {most:g}"
        raise ValueError(f"{name}={value!r} must be a number {'above' if above else 'of at least'} {least:g}{bound}")


class Step(NamedTuple):
    """How visual tokens lie: `share` of them at one position, and positions of theirs `apart`."""

    apart: float
    share: int

    def __str__(self) -> str:
        return f"{self.apart:g}" if self.share == 1 else f"'shared:{self.share}'"


def step_of(positions: object) -> Step | None:
    """What a number, or "shared:4", says of visual tokens; None of all else."""
    if isinstance(positions, (int, float)) and not isinstance(positions, bool) and 0 < positions <= 1:
        return Step(float(positions), 1)
    found = re.fullmatch(r"shared:([1-9]\d*)", positions) if isinstance(positions, str) else None
    return Step(1.0, int(found[1])) if found else None


def check_positions(value: object) -> None:
    """Raises ValueError unless `value` is "auto", "renumber", "original", or what `step_of` reads."""
    names = ("auto", "renumber", "original")
    if value not in names and step_of(value) is None:
        raise ValueError(
            f"positions={value!r} must be one of {names}, or a number above 0 and at most 1, or 'shared:G', G visual "
            "tokens at one position"
        )


def check_file(name: str, value: object) -> None:
    """Raises ValueError unless `value` is the path of a file as text, or None. Whether it exists is seen later."""
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"{name}={value!r} must be the path of a file, or None")
