"""What a run leaves: a list of runs in one JSON file, and the tables that are read from it, on screen and in Markdown.

A file of results is a list of runs; a run has `what` (the measurement), `date`, `record` (hardware, versions, clock),
`subject`, `limits` and `rows`. Tables are made from these dicts alone, so that a file prints as the run did.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_compress.saving import write_json
from hf_compress.screen import Table

Cell = Callable[[dict[str, Any]], str]


def _number(key: str, digits: int = 2) -> Cell:
    return lambda row: "" if row.get(key) is None else f"{row[key]:.{digits}f}"


def _percent(key: str) -> Cell:
    return lambda row: "" if row.get(key) is None else f"{100 * row[key]:.2f}%"


def spread(ratio: dict[str, Any] | None) -> str:
    """Median and quartiles of a `Ratio` in JSON."""
    if not ratio:
        return ""
    pairs = ratio["pairs"]
    return f"{pairs['median']:.3f} [{pairs['low']:.3f}, {pairs['high']:.3f}]"


def _ratio(key: str) -> Cell:
    return lambda row: spread(row.get(key))


def _step(batch: str) -> Cell:
    return lambda row: spread(row["steps"].get(batch))


def _mib(key: str) -> Cell:
    return lambda row: "" if not row.get(key) else f"{row[key] / 2**20:.1f}"


def _last(key: str, scale: float = 1.0) -> Cell:
    return lambda row: f"{row[key][-1] / scale:.1f}" if row[key] else ""


NAMES: list[tuple[str, Cell]] = [
    ("method", lambda row: row["method"]),
    ("stage", lambda row: row.get("stage", "cache")),
    ("ratio", lambda row: f"{row['ratio']:g}"),
]
PARITY = [
    ("rows", _number("tokens", 1)),
    ("full ms", _number("full_ms")),
    ("native ms", _number("native_ms")),
    ("ours ms", _number("ours_ms")),
    ("ours/native", _ratio("prefill")),
    ("without scoring", _number("short", 3)),
    ("scoring", _percent("scoring")),
    ("hooks", _percent("hooks")),
    ("excess", _percent("excess")),
    ("slope", _ratio("slope")),
    ("decode step", _ratio("decode")),
]
CACHE = [
    ("store", lambda row: row["store"]),
    ("entries", _number("entries", 0)),
    ("full ms", _number("full_ms", 0)),
    ("scoring", _percent("scoring")),
    ("prefill", _ratio("prefill")),
    ("bytes", _number("bytes", 3)),
]
PEAK = [
    ("full MiB", _mib("full")),
    ("native MiB", _mib("native")),
    ("ours MiB", _mib("ours")),
    ("ours/full", _number("over_full", 3)),
    ("ours/native", _number("over_native", 3)),
    ("over native, states", _number("states")),
]
BATCH = [
    ("batch", lambda row: str(row["batch"])),
    ("same sets", _percent("same")),
    ("logits", lambda row: "" if row["logits"] is None else f"{row['logits']:.1e}"),
    ("batch/single", _ratio("time")),
    ("bare batch/single", _ratio("bare")),
]
TRAIN = [
    ("full ms", _number("full_ms", 0)),
    ("native ms", _number("native_ms", 0)),
    ("ours ms", _number("ours_ms", 0)),
    ("ours/native", _ratio("step")),
    ("peak MiB", _mib("peak")),
    ("over full", _number("over_full", 3)),
    ("loss", _number("loss", 5)),
    ("native loss", _number("native_loss", 5)),
]
GROWTH = [
    ("up to", _last("tokens")),
    ("ms there", _last("ms")),
    ("MiB there", _last("bytes", 2**20)),
    ("time ~ n^", _number("time_exponent")),
    ("memory ~ n^", _number("memory_exponent")),
]
COLUMNS = {"parity": PARITY, "cache": CACHE, "peak": PEAK, "batch": BATCH, "train": TRAIN, "growth": GROWTH}


def table(what: str, rows: Sequence[dict[str, Any]], title: str = "") -> Table:
    """Rows of one measurement, as `as_dict` gives them.

    Raises:
        ValueError: no such measurement.
    """
    if what not in COLUMNS:
        raise ValueError(f"what={what!r} is not a measurement; these are: {', '.join(COLUMNS)}")
    columns = NAMES + COLUMNS[what]
    if what == "cache":
        batches = sorted({b for row in rows for b in row["steps"]}, key=int)
        columns = columns + [(f"step, batch {b}", _step(b)) for b in batches]
    out = Table([name for name, _ in columns] + ["limits"], title=title or what, left=2)
    for row in rows:
        if row["note"]:
            cells = [cell(row) for _, cell in NAMES] + [""] * (len(columns) - len(NAMES))
            out.rows.append([*cells, "not measured"])
        else:
            verdict = "missed: " + ", ".join(row["failures"]) if row["failures"] else "met"
            out.rows.append([cell(row) for _, cell in columns] + [verdict])
    return out


class File:
    """A file of results that one run after the other is added to.

    Args:
        path: None: nothing is written.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.runs: list[Any] = read(path) if path is not None and path.exists() else []

    def begin(self, what: str, record: dict[str, Any], **about: Any) -> dict[str, Any]:
        """A new run; its `rows` are written with every `save`."""
        run = {"what": what, "date": datetime.date.today().isoformat(), "record": record, **about, "rows": []}
        self.runs.append(run)
        return run

    def save(self) -> None:
        """After every method, so that a run that is interrupted leaves what it has."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.runs)


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file.

    Raises:
        ValueError: it is not there, or holds something else.
    """
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a file of results: {error}") from error
    if not isinstance(runs, list) or not all(isinstance(run, dict) and "rows" in run for run in runs):
        raise ValueError(f"{path} is not a file of results: it must hold a list of runs, each with rows")
    return runs


def title(run: dict[str, Any]) -> str:
    """Measurement, model and machine of a run in one line."""
    record, subject = run["record"], run.get("subject") or {}
    sizes = ", ".join(f"{k} {v}" for k, v in subject.items() if k not in ("name", "type"))
    model = subject.get("name") or ", ".join(sorted({row["model"] for row in run["rows"]}))
    where = record["cpu"] if record["device"] == "cpu" else record["device"]
    machine = f"{where}, {record['threads']} threads, {record['clock']} clock, torch {record['torch']}"
    return f"{run['what']}: {model}{f' ({sizes})' if sizes else ''}; {run['date']}, {machine}"


def tables(runs: Sequence[dict[str, Any]]) -> list[Table]:
    """One table per run; of parity runs of files from before, which name several models, one per model."""
    out = []
    for run in runs:
        if run.get("subject"):
            out.append(table(run["what"], run["rows"], title(run)))
            continue
        for model in dict.fromkeys(row["model"] for row in run["rows"]):
            rows = [row for row in run["rows"] if row["model"] == model]
            out.append(table(run["what"], rows, title({**run, "rows": rows})))
    return out


def newest(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every measurement of every model the last run."""
    last = {(run["what"], (run.get("subject") or {}).get("name"), run["record"]["device"]): run for run in runs}
    return list(last.values())


def page(runs: Sequence[dict[str, Any]], command: str) -> str:
    """A Markdown page of the newest runs, with what misses its limit on top."""
    some = newest(runs)
    rows = [(run["what"], row) for run in some for row in run["rows"]]
    measured = [(what, row) for what, row in rows if not row["note"]]
    missed = [(what, row) for what, row in measured if row["failures"]]
    lines = ["# Results", "", f"Made by `{command}`. {len(measured)} measurements, {len(missed)} miss a limit.", ""]
    lines += [f"- {w}, {r['model']}: {r['method']} at {r['ratio']:g}: {', '.join(r['failures'])}" for w, r in missed]
    notes = sorted({(w, r["model"], r["method"], f"{r['ratio']:g}", r["note"]) for w, r in rows if r["note"]})
    if notes:
        lines += ["", "Not measured:", ""]
        lines += [f"- {w}, {model}: {method} at {ratio}: {note}" for w, model, method, ratio, note in notes]
    limits = {run["what"]: run["limits"] for run in some if run.get("limits")}
    lines += ["", "Limits: " + "; ".join(f"{what} {value}" for what, value in limits.items()), ""]
    return "\n".join([*lines, "\n\n".join(f"**{t.title}**\n\n{t.markdown()}" for t in tables(some)), ""])
