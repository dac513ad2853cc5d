"""How far two boards give methods the same order: judged ones, published ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from scipy.stats import kendalltau

from hf_compress import registry
from hf_compress.evaluate.plan import BARE
from hf_compress.evaluate.results import Results
from hf_compress.screen import Table

Column = Mapping[str, float]  # method -> how good it is, more is better
LEAST = 4  # methods in common, below which two columns are not compared


def accuracies(folders: Iterable[Path], ratio: float, kinds: Sequence[str] = ()) -> dict[str, float]:
    """Percent right per method, at the ratio; of methods without one, as they are; of the bare model as "none".

    Args:
        folders: what `Results.write` wrote, of the same questions.
        ratio: fraction removed.
        kinds: kinds of questions that count; none: all of them.

    Raises:
        ValueError: a folder holds no results.
    """
    found = {}
    for board in map(Results.read, folders):
        asked = {kind: board.types[kind] for kind in kinds}
        for row in board.rows:
            if row.accuracy is not None and row.ratio in (ratio, None):
                right = sum(row.types[kind] * n for kind, n in asked.items()) / sum(asked.values()) if kinds else None
                found[row.method] = 100 * (row.accuracy[0] if right is None else right)
    return found


def in_common(one: Column, other: Column) -> list[str]:
    """The methods that both have judged, in the order of the first; the bare model and controls left out."""
    left_out = {name for name, spec in registry.methods().items() if spec.kind == "control"} | {BARE}
    return [name for name in one if name in other and name not in left_out]


def agreement(one: Column, other: Column) -> tuple[float, float, int]:
    """(Kendall's tau-b, its p-value, n) over the n methods in common; nan where they are fewer than two."""
    both = in_common(one, other)
    if len(both) < 2:
        return math.nan, math.nan, len(both)
    found = kendalltau([one[name] for name in both], [other[name] for name in both])
    return float(found.statistic), float(found.pvalue), len(both)


def tau(one: Column, other: Column) -> str:
    """The cell of a table: tau and n, a dash below `LEAST` methods in common, nothing for a column beside itself."""
    value, _, n = agreement(one, other)
    return "" if one is other else f"{value:.2f} (n={n})" if n >= LEAST else "–"


def side_by_side(columns: Sequence[Column]) -> str:
    """Markdown: a row per method, a numbered column each."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(f"{column[name]:g}" if name in column else "–" for column in columns)] for name in names]
    return Table(["method", *(f"[{i + 1}]" for i in range(len(columns)))], rows).markdown()
