"""A method with its budget."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from hf_compress.config import Schedule


class Budgeted:
    """A method with its name and its budget: `ratio` removed, `keep` absolute, or a `schedule` of the layers.

    With none of them the method decides.
    """

    def __init__(
        self, name: str, method: Any, ratio: Fraction | None, keep: int | None, schedule: Schedule | None = None
    ):
        self.name, self.method, self.ratio, self.keep, self.schedule = name, method, ratio, keep, schedule

    @property
    def open(self) -> bool:
        """Whether the method decides how much stays."""
        return self.ratio is None and self.keep is None and self.schedule is None
