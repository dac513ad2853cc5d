"""A method with its budget."""

from __future__ import annotations

from fractions import Fraction
from typing import Any


class Budgeted:
    """A method with its name and its budget: `ratio` removed, or `keep` absolute; neither: the method decides."""

    def __init__(self, name: str, method: Any, ratio: Fraction | None, keep: int | None):
        self.name, self.method, self.ratio, self.keep = name, method, ratio, keep

    @property
    def open(self) -> bool:
        """Whether the method decides how much stays."""
        return self.ratio is None and self.keep is None
