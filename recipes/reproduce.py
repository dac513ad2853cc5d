"""Runs what the figures of docs/evidence.md come from again, and compares them with the values beside them.

    python recipes/reproduce.py                  # all of them, in full
    python recipes/reproduce.py llava recall     # two of them
    python recipes/reproduce.py --small          # all of them on few questions, as CI does: minutes
    python recipes/reproduce.py --readme         # write the table of docs/evidence.md from recipes/figures/

Every file of `figures/` holds one run and the values that are expected of it; `figures/README.md` says how to read and
write one. The exit status is 1 if a value lies outside of its tolerance.
"""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from hf_compress.screen import Table

HERE = Path(__file__).resolve().parent
FIGURES = HERE / "figures"
PAGE = HERE.parent / "docs" / "evidence.md"
PLACE = "https://github.com/hf-compress/hf-compress/blob/main/recipes/figures"
MARKS = ("<!-- figures:begin -->", "<!-- figures:end -->")
COMMANDS = {"eval": "hf-compress eval", "cache": "hf-compress bench cache", "parity": "hf-compress bench parity"}


@dataclass
class Expected:
    """One value of a run.

    Attributes:
        row: method.
        column: an attribute of the row: "accuracy", "over_random", "kv_share", "visual", "step" ...
        value: what the full run gave; None: it is judged in small runs only.
        tolerance: largest difference to it that is no surprise.
        small, small_tolerance: the same of the small run; None: a small run cannot tell.
        ratio: of the row; None: the uncompressed model.
        says: what the page says about it, with {value} where the number stands; "" if nothing.
    """

    row: str
    column: str
    value: float | None = None
    tolerance: float = 0.0
    small: float | None = None
    small_tolerance: float = 0.0
    ratio: float | None = None
    says: str = ""

    def verdict(self, found: float, small: bool) -> tuple[float | None, float, bool]:
        """(expected, tolerance, whether `found` agrees); what is not judged agrees."""
        value, tolerance = (self.small, self.small_tolerance) if small else (self.value, self.tolerance)
        return value, tolerance, value is None or abs(found - value) <= tolerance


@dataclass
class Figure:
    """One file of `figures/`: a run, and what is expected of it."""

    name: str
    title: str
    kind: str
    run: dict[str, Any]
    small: dict[str, Any]
    machine: str
    expect: list[Expected]

    @classmethod
    def read(cls, path: Path) -> Figure:
        """From YAML.

        Raises:
            ValueError: a key is missing or unknown.
        """
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        kinds = [kind for kind in COMMANDS if kind in data]
        known = {"title", "machine", "small", "expect", *kinds}
        if len(kinds) != 1 or set(data) != known:
            raise ValueError(
                f"{path.name}: {sorted(data)} must be title, machine, small, expect and one of {[*COMMANDS]}"
            )
        expect = [Expected(**e) for e in data["expect"]]
        return cls(path.stem, data["title"], kinds[0], data[kinds[0]], data["small"], data["machine"], expect)

    @property
    def command(self) -> str:
        """The command line of the full run."""
        return " ".join([COMMANDS[self.kind], *(f"--{k.replace('_', '-')} {_word(v)}" for k, v in self.run.items())])

    def rows(self, small: bool, out: Path) -> dict[tuple[str, float | None], Any]:
        """Do the run; its rows by method and ratio."""
        options = {**self.run, **self.small} if small else dict(self.run)
        return {(r.method, r.ratio): r for r in RUNNERS[self.kind](options, out)}


def _word(value: Any) -> str:
    return ",".join(f"{v}" for v in value) if isinstance(value, list) else str(value)


def _eval(options: dict[str, Any], out: Path) -> Iterable[Any]:
    from hf_compress.evaluate import sweep

    return sweep(options.pop("model"), options.pop("data"), out=out, timed=False, **options).rows


def _parity(options: dict[str, Any], out: Path) -> Iterable[Any]:
    from hf_compress.bench.models import load
    from hf_compress.bench.parity import measure

    subject, ratios = load(options.pop("model")), options.pop("ratios")
    for method in options.pop("methods"):
        yield from measure(subject, method, ratios, **options)


def _cache(options: dict[str, Any], out: Path) -> Iterable[Any]:
    from hf_compress.bench.cache import measure
    from hf_compress.bench.models import load

    subject = load(options.pop("model"), length=options.pop("length"))
    pairs = list(itertools.product(options.pop("methods"), options.pop("ratios")))
    for rows in measure(subject, pairs, **options):
        yield from rows


RUNNERS = {"eval": _eval, "parity": _parity, "cache": _cache}


def read_value(row: Any, column: str) -> float:
    """A number of a row: the mean of an interval, the median of a ratio, "over_random", "type:NAME", "step:BATCH"."""
    name, _, part = column.partition(":")
    if column.startswith("over_") and column != "over_full":
        return float(row.over[column.removeprefix("over_")][0])
    value = getattr(row, {"type": "types", "step": "steps"}.get(name, name))
    if part:
        value = value[int(part) if part.isdigit() else part]
    value = getattr(value, "pairs", value)
    value = getattr(value, "median", value)
    return float(value[0] if isinstance(value, tuple) else value)


def check(figure: Figure, small: bool, console: Console) -> int:
    """Run one figure, print its table, and return how many values are off."""
    with tempfile.TemporaryDirectory() as folder:
        rows = figure.rows(small, Path(folder))
    heads = ("method", "ratio", "column", "found", "expected", "verdict")
    out = Table(heads, title=f"{figure.name}: {figure.title}", left=len(heads))
    off = 0
    for e in figure.expect:
        found = read_value(rows[e.row, e.ratio], e.column)
        value, tolerance, fine = e.verdict(found, small)
        off += not fine
        told = "not judged" if value is None else f"{value:g} ± {tolerance:g}"
        verdict = "as expected" if fine else "OFF"
        out.rows.append([e.row, f"{e.ratio or 0:g}", e.column, f"{found:.4g}", told, verdict])
    console.print(figure.command, soft_wrap=True)
    out.print(console)
    return off


def readme_table(figures: Iterable[Figure]) -> str:
    """The figures that the page states, as a Markdown table."""
    lines = ["| what | machine | recipe |", "|---|---|---|"]
    for figure in figures:
        for e in figure.expect:
            if e.says and e.value is not None:
                says = re.sub(r"(\d)%", r"\1 %", e.says.format(value=e.value))
                lines.append(f"| {says} | {figure.machine} | [`{figure.name}`]({PLACE}/{figure.name}.yaml) |")
    return "\n".join(lines)


def render(text: str, figures: Iterable[Figure]) -> str:
    """The page with its table of figures replaced.

    Raises:
        ValueError: the marks are missing or occur twice.
    """
    pattern = re.compile(rf"({MARKS[0]}\n).*?({MARKS[1]})", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the page needs exactly one pair {MARKS[0]} and {MARKS[1]}")
    return pattern.sub(lambda found: f"{found[1]}{readme_table(figures)}\n{found[2]}", text)


def load(names: Iterable[str] = ()) -> list[Figure]:
    """The named figures, or all of them.

    Raises:
        ValueError: there is no such figure.
    """
    paths = {path.stem: path for path in sorted(FIGURES.glob("*.yaml"))}
    for name in names:
        if name not in paths:
            raise ValueError(f"{name!r} is no figure; there are: {', '.join(paths)}")
    return [Figure.read(paths[name]) for name in names or paths]


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Files of figures/ without .yaml; default: all.")] = None,
    small: Annotated[bool, typer.Option("--small", help="Few questions, as CI does.")] = False,
    readme: Annotated[bool, typer.Option("--readme", help="Only write the table of docs/evidence.md.")] = False,
) -> None:
    """Run the figures of docs/evidence.md again and compare them with what is expected."""
    try:
        figures = load(names or ())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if readme:
        PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), load()), encoding="utf-8")
        return
    console = Console()
    off = sum(check(figure, small, console) for figure in figures)
    console.print(f"{off} values are off" if off else "all values are as expected")
    sys.exit(bool(off))


if __name__ == "__main__":
    typer.run(main)
