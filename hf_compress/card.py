"""What a model card says of a compression: method, budget, and what it was measured to lose."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_compress import registry
from hf_compress.config import CompressionConfig, MethodConfig

if TYPE_CHECKING:
    from hf_compress.evaluate.rows import Board, Row

BEGIN, END = "<!-- hf-compress:begin -->", "<!-- hf-compress:end -->"


def judged(config: CompressionConfig, results: Board | str | PathLike[str]) -> Board:
    """The board of a sweep, or of the folder of one, that has judged a compression.

    Raises:
        ValueError: it has not, or the folder holds no results.
    """
    if isinstance(results, (str, PathLike)):
        from hf_compress.evaluate.rows import Board

        results = Board.read(Path(results))
    row_of(config, results)
    return results


def section(config: CompressionConfig, board: Board | None = None) -> str:
    """The section of a model card, as Markdown between its marks.

    Args:
        config: of the compression.
        board: of a sweep that has judged it; None: nothing was measured, and the section says so.

    Raises:
        ValueError: the sweep has not judged this compression.
    """
    lines = [BEGIN, "## Compression", ""]
    lines += [
        f"This checkpoint compresses its tokens by `{config.summary()}`. With [hf-compress]({_home()}) installed, "
        "`import hf_compress` before `from_pretrained` restores that; `compression_config=False` loads the model bare. "
        "Without the package it is the uncompressed model.",
        "",
        "| method | stage | removed | paper |",
        "|---|---|---|---|",
        *(_line(entry) for entry in config.methods),
        "",
        _measured(config, board),
        END,
    ]
    return "\n".join(lines)


def _home() -> str:
    return "https://github.com/hf-compress/hf-compress"


def _line(entry: MethodConfig) -> str:
    spec = registry.get(entry.method)
    budget = next(
        f"{name}={value}"
        for name, value in (("ratio", entry.ratio), ("keep", entry.keep), ("", "its default"))
        if value
    ).lstrip("=")
    schedule = "" if entry.schedule is None else f"layer by layer, {entry.schedule}"
    paper = re.sub(r"arXiv:([\d.]+)", r"[\1](https://arxiv.org/abs/\1)", spec.paper)
    return f"| `{spec.name}`: {spec.summary} | {spec.stage} | {schedule or budget} | {spec.title} {paper} |"


def _measured(config: CompressionConfig, board: Board | None) -> str:
    if board is None:
        return "Its loss was not measured. `hf-compress eval` measures it against random tokens at the same budget."
    row, full, s = row_of(config, board), board.rows[0], board.settings
    assert row.accuracy and row.over_full and full.accuracy
    loss, low, high = (100 * x for x in row.over_full)
    text = (
        f"Measured on {s['questions']} questions of `{s['data']}` ({board.metric.replace('_', ' ')}, {s['dtype']}, "
        f"{s['protocol']}): "
        f"{100 * row.accuracy[0]:.1f} % right, the uncompressed model {100 * full.accuracy[0]:.1f} %; difference "
        f"{loss:+.1f} points, 95 % interval [{low:+.1f}, {high:+.1f}]"
    )
    if over := row.over.get("random"):
        text += f"; over random at the same budget {100 * over[0]:+.1f} [{100 * over[1]:+.1f}, {100 * over[2]:+.1f}]"
    command = f"hf-compress eval --model {s['model']} --data {s['data']} --methods {row.method} --ratios {row.ratio:g}"
    knobs = [f" --knob {m}.{k}={v}" for m, own in json.loads(row.knobs).items() for k, v in own.items()]
    asked = {"protocol": s["protocol"], "metric": board.metric, "dtype": s["dtype"], "limit": s["questions"]}
    asked |= {"max-new-tokens": s["max_new_tokens"], "out": "results"}
    options = [f" --{name} {value}" for name, value in asked.items()]
    return f"{text}.\n\n```sh\n{command}{''.join(knobs + options)}\n```"


def row_of(config: CompressionConfig, board: Board) -> Row:
    """The row of a sweep that judged the same methods at the same budgets and knobs.

    Raises:
        ValueError: there is none.
    """
    wanted = {entry.method: _changed(entry.method, entry.knobs) for entry in config.methods}
    for row in board.rows:
        if row.ratio is None or row.accuracy is None or row.over_full is None:
            continue
        names = [part.split(":")[0] for part in row.method.split("+")]
        knobs = json.loads(row.knobs)
        same = {name: knobs.get(name, {}) for name in names} == wanted
        if same and all((e.ratio, e.keep, e.schedule) == (row.ratio, None, None) for e in config.methods):
            return row
    judged = list(dict.fromkeys(f"{row.method} at {row.ratio:g}" for row in board.rows if row.ratio is not None))
    raise ValueError(f"results: {config.summary()} is not among what was judged there: {', '.join(judged)}")


def _changed(method: str, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs that are not the defaults, as a file holds them."""
    usual = MethodConfig(method, knobs=registry.get(method).knobs).knobs
    return {k: v for k, v in knobs.items() if k not in usual or usual[k] != v}


def write(folder: str | Path, text: str) -> None:
    """Put the section into the README.md of a folder, in place of an older one, else at its end."""
    path = Path(folder) / "README.md"
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    pattern = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    after, found = pattern.subn(lambda _: text, before)
    path.write_text(after if found else f"{before.rstrip()}\n\n{text}\n".lstrip(), encoding="utf-8")
