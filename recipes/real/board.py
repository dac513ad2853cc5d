"""The page of runs on a real model, and how far other boards give the same order: small models, published ones.

python recipes/real/board.py recipes/real/results-*.json --out recipes/real/board.md
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import typer

from hf_compress.evaluate.agreement import LEAST, Column, accuracies, side_by_side, tau
from hf_compress.evaluate.intervals import mean_of
from hf_compress.screen import Table

SMALL = Path(__file__).resolve().parents[2] / "benchmarks" / "boards"
BOARDS = {
    "recall model, one turn": "recall",
    "recall model, two turns": "recall-two-turn",
    "facts model, one turn": "facts",
    "facts model, two turns": "facts-two-turn",
}
PUBLISHED = Path(__file__).with_name("published.json")
DIGITS = 4  # of a code
TURNS = {"within": "one turn", "later": "two turns"}


class Judged:
    """What `run.py` found in one run."""

    def __init__(self, file: Path):
        read = json.loads(file.read_text(encoding="utf-8"))
        self.settings, self.refused = read["settings"], read["refused"]
        self.turns = {part: title for part, title in TURNS.items() if part == "later" or self.settings["within"]}
        self.rows = {k: row for k, row in read["rows"].items() if self.turns.keys() <= row.keys()}

    def perplexity(self, label: str) -> float:
        """Of what follows a compressed context; nan of a method that is not asked for it."""
        values = self.rows[label].get("likelihood")
        return math.exp(-sum(values) / len(values)) if values else math.nan

    def right(self, label: str, part: str) -> tuple[float, float, float]:
        """Percent of the codes that were told in full, with the ends of its interval; contexts are what is drawn."""
        groups = [(i, told == DIGITS) for i, context in enumerate(self.rows[label][part]) for told in context]
        mean = mean_of([float(hit) for _, hit in groups], [i for i, _ in groups])
        low, high = mean.interval()
        return 100 * mean.value, 100 * low, 100 * high

    def half(self, label: str, part: str) -> float:
        """Percent of the codes of which two digits or more were told."""
        told = [digits for context in self.rows[label][part] for digits in context]
        return 100 * sum(digits >= DIGITS // 2 for digits in told) / len(told)

    def columns(self) -> dict[str, Column]:
        """What is compared with other boards."""
        told = {f"facts, {title}": {k: self.right(k, part)[0] for k in self.rows} for part, title in self.turns.items()}
        return {"perplexity": {k: -self.perplexity(k) for k, row in self.rows.items() if "likelihood" in row}} | told

    def page(self) -> list[str]:
        """Its section: how it was made, and all methods by perplexity."""
        how, rows = self.settings, []
        worst_last = {
            label: (math.isnan(value), value) for label, value in zip(self.rows, map(self.perplexity, self.rows))
        }
        for label in sorted(self.rows, key=worst_last.__getitem__):
            told = ([_cell(*self.right(label, part)), f"{self.half(label, part):.0f}"] for part in self.turns)
            perplexity = f"{self.perplexity(label):.2f}".replace("nan", "–")
            rows.append([label, perplexity, *(cell for pair in told for cell in pair)])
        names = (name for title in self.turns.values() for name in (f"{title}, %", "two digits, %"))
        return [
            f"## {how['model']}, {how['tokens']} tokens, {how['ratio']:.0%} removed",
            f"Perplexity of {how['after']} tokens behind a context ({how['texts']} texts), of cache methods; facts per "
            f"context: {how['facts']}, contexts: {how['contexts']}, questions in the prompt (one turn): "
            f"{how['contexts'] * how['within']}, in a second turn: {how['contexts'] * how['facts']}; with 95 % "
            f"intervals over contexts, and beside them of how many codes two of four digits or more are told. "
            f"Weights and cache in {how['dtype']}; Python {how['python']} (its documentation is the text), torch "
            f"{how['torch']}, transformers {how['transformers']}, seed {how['seed']}; "
            f"{sum(row['minutes'] for row in self.rows.values()):.0f} minutes of CPU.",
            Table(["method", "perplexity", *names], rows).markdown(),
            *(f"`{label}` is refused: {why}" for label, why in self.refused.items()),
        ]


def _cell(value: float, low: float, high: float) -> str:
    return f"{value:.0f} ({low:.0f}–{high:.0f})"


def write_board(runs: list[Path], page: Path, ratio: float | None = None) -> None:
    """A section per run; above, how far all columns, the small boards and the published ones agree.

    Args:
        runs: what `run.py` wrote.
        page: the file to write.
        ratio: of the small boards; None: that of the first run.
    """
    judged = [Judged(file) for file in runs]
    ratio = judged[0].settings["ratio"] if ratio is None else ratio
    views: dict[str, Column] = {}
    for one in judged:
        ending = f", {one.settings['tokens']}" if len(judged) > 1 else ""
        views |= {f"{title}{ending}": column for title, column in one.columns().items()}
    small = {title: accuracies([SMALL / folder], ratio) for title, folder in BOARDS.items()}
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    outside = {one["name"]: one["scores"] for one in published if len(one["scores"]) > LEAST}
    lines = [
        "# Cache methods on a real chat model",
        "How far two columns agree (Kendall's tau; 1: the same order, 0: none), over the methods that both have judged "
        "(n). Columns: this model. Rows: the small models, and published scores of models of 7 and 8 billion weights.",
        _agreements(views | small | outside, views | small),
        *(line for one in judged for line in one.page()),
        *_shares(outside, small | views),
        "## Published scores",
        *_sources(published),
    ]
    page.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def _agreements(rows: dict[str, Column], columns: dict[str, Column]) -> str:
    """Tau of every row with every column; those that nothing can be compared with are left out."""
    shown = {title: one for title, one in columns.items() if any(tau(view, one).strip("–") for view in rows.values())}
    cells = [[title, *(tau(view, one) for one in shown.values())] for title, view in rows.items()]
    return Table(["Kendall's tau", *shown], [line for line in cells if any(c.strip("–") for c in line[1:])]).markdown()


def _shares(outside: dict[str, Column], columns: dict[str, Column]) -> list[str]:
    """How much is left of what the bare model answers, beside what the widest published column says of that."""
    widest = max(outside, key=lambda title: len(outside[title]))
    columns = {title: one for title, one in columns.items() if "perplexity" not in title and one}
    left = {title: {k: 100 * v / one["none"] for k, v in one.items()} for title, one in columns.items()}
    said = {k: 100 * v / outside[widest]["none"] for k, v in outside[widest].items() if k != "none"}
    if not (judged := [name for name in said if all(name in one for one in left.values())]):
        return []
    rows = [[name, f"{said[name]:.0f}", *(f"{one[name]:.0f}" for one in left.values())] for name in judged]
    apart = [[abs(one[name] - said[name]) for name in judged] for one in left.values()]
    rows.append(["mean (median) difference", "", *(f"{mean(gaps):.0f} ({median(gaps):.0f})" for gaps in apart)])
    return [
        "## How much is left",
        f"Percent of what the uncompressed model answers, beside {widest}.",
        Table(["method", widest, *left], rows).markdown(),
    ]


def _sources(published: list[dict[str, Any]]) -> list[str]:
    notes = [
        f"- [{i + 1}] {one['name']}: {one['benchmark']}; {one['model']}; question {one['question']}; "
        f"{_budget(one)}; read {one['read']}. [{one['source']}]({one['address']})"
        for i, one in enumerate(published)
    ]
    return [side_by_side([one["scores"] for one in published]), "\n".join(notes)]


def _budget(one: dict[str, Any]) -> str:
    return f"{one['kept']} entries kept" if one["removed"] is None else f"{one['removed']:.0%} removed"


def main(
    runs: Annotated[list[Path], typer.Argument(help="What run.py wrote: results.json, under any name.")],
    out: Annotated[Path, typer.Option(help="The page.")],
    ratio: Annotated[float | None, typer.Option(help="Of the small boards; by default that of the first run.")] = None,
) -> None:
    write_board(runs, out, ratio)


if __name__ == "__main__":
    typer.run(main)
