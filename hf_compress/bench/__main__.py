"""Command line of the timings: `python -m hf_compress.bench parity`."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from hf_compress import registry
from hf_compress.bench.models import SUBJECTS
from hf_compress.bench.parity import LIMITS, SCORING, Row, measure, table
from hf_compress.bench.timing import CLOCKS, record

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compressed runs against native runs of equal length, as ratios.",
)


@app.callback()
def main() -> None:
    """Compressed runs against native runs of equal length, as ratios."""


@app.command()
def parity(
    model: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(SUBJECTS)}.")] = "demo,mid",
    methods: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    ratios: Annotated[str, typer.Option(help="Fractions removed, comma-separated.")] = ".5,.75,.89",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; medians are taken over them.")] = 12,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; default: torch's own.")] = None,
    clock: Annotated[str, typer.Option(help="wall, or cpu: CPU time, for one thread on a shared machine.")] = "wall",
    decode: Annotated[bool, typer.Option(help="Time decode steps too.")] = True,
    path: Annotated[
        Path | None, typer.Option("--json", help="Add the run, with hardware and versions, to this file.")
    ] = None,
) -> None:
    """Prefill and decode step of every method over native ones of equal length; the vision tower is in neither."""
    if threads is not None:
        torch.set_num_threads(threads)
    if clock not in CLOCKS or (clock == "cpu" and torch.get_num_threads() > 1):
        raise typer.BadParameter(f"--clock {clock!r}: choose wall, or cpu together with --threads 1")
    about = record("cpu") | {"clock": clock}
    console = Console(width=200)
    console.print(", ".join(f"{k} {v}" for k, v in about.items()))
    console.print(f"limits: {LIMITS}, scoring and gathering {SCORING:.0%} of the full prefill; {rounds} rounds")
    wanted = [float(r) for r in ratios.split(",")]
    names = methods.split(",") if methods else list(registry.methods())
    everything: list[Row] = []
    earlier = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else []
    for kind in model.split(","):
        if kind not in SUBJECTS:
            raise typer.BadParameter(f"--model {kind!r}: choose of {', '.join(SUBJECTS)}")
        subject, rows = SUBJECTS[kind](), []
        for name in names:
            rows += measure(subject, name, wanted, rounds=rounds, decode=decode, clock=clock)
            if path is not None:
                _write(path, earlier, about, rounds, everything + rows)
        everything += rows
        console.print(table(rows, f"{kind}: {subject.ids.shape[1]} tokens"))


def _write(path: Path, earlier: list[Any], about: dict[str, Any], rounds: int, rows: list[Row]) -> None:
    """After every method, so that a run that is interrupted leaves what it has."""
    run = {
        "what": "parity",
        "date": datetime.date.today().isoformat(),
        "record": about,
        "rounds": rounds,
        "limits": LIMITS | {"scoring": SCORING},
        "rows": [row.as_dict() for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*earlier, run], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
