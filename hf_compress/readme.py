"""The tables of README.md and docs/, written from the registry, the adapters and the leaderboard.

python -m hf_compress.readme            # rewrite them in the current folder
python -m hf_compress.readme --check    # exit status 1 if one is stale
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import hf_compress
from hf_compress.docstrings import differs
from hf_compress.patches.base import Architecture
from hf_compress.patches.unsupported import UNSUPPORTED
from hf_compress.registry import KINDS, OWN, STAGES, Spec

METHOD_COLUMNS = ("name", "stage", "kind", "needs", "paper", "on a small model", "what it does")
ARCHITECTURE_COLUMNS = (
    "model_type", "stages", "compresses", "gives", "positions", "[CLS]", "crops", "any resolution", "attention row",
)  # fmt: skip

UNSUPPORTED_COLUMNS = ("model_type", "why not")
START_COLUMNS = ("your model or task", "start with", "right on the small model", "price")
PAPER_COLUMNS = ("method", "title", "paper", "paper, code, and what we do otherwise")
PAGES = {  # and the tables of each
    "README.md": ("start",),
    "docs/choosing.md": ("start",),
    "docs/methods.md": ("methods",),
    "docs/papers.md": ("papers",),
    "docs/architectures.md": ("architectures", "unsupported"),
}
BOARDS = "hf_compress/boards.json"  # what the command line knows of the leaderboard
KEY = ("model", "data", "protocol", "method", "ratio")  # of a row of the leaderboard


@dataclass(frozen=True)
class Start:
    """What to begin with.

    Attributes:
        where: for which models, or for what task.
        method, ratio: what to take.
        board: model, data and protocol of the rows of the leaderboard that say how it does.
        price: what it costs beside what it saves.
    """

    where: str
    method: str
    ratio: float
    board: tuple[str, str, str]
    price: str


LLAVA, QWEN, VIDEO, RECALL = "demo:llava", "demo:qwen", "demo:video", ("demo:recall", "demo:recall")
STARTS = (
    Start(
        "pictures, tower with a [CLS] token: LLaVA-1.5, LLaVA-NeXT, InternVL, Video-LLaVA",
        "fastervlm",
        0.75,
        (LLAVA, "demo:scenes", "one-turn"),
        "one attention row of the tower",
    ),
    Start(
        "pictures, tower without one: Qwen-VL, GLM-V, Gemma 3, PaliGemma, Idefics3, LLaVA-OneVision",
        "visionzip",
        0.75,
        (QWEN, "demo:scenes", "one-turn"),
        "the attention that every token receives, streamed",
    ),
    Start(
        "pictures at a tenth of their tokens, or several questions about one",
        "divprune",
        0.89,
        (LLAVA, "demo:scenes", "one-turn"),
        "a product of all tokens of an image; reads no attention",
    ),
    Start(
        "videos: Qwen-VL, LLaVA-OneVision, Video-LLaVA",
        "vidcom2",
        0.75,
        (VIDEO, "demo:clips", "one-turn"),
        "a comparison of every token with two means",
    ),
    Start(
        "a long prompt that ends in its question",
        "snapkv",
        0.75,
        (*RECALL, "one-turn"),
        "a few attention rows per layer; the prefill gets no shorter",
    ),
    Start(
        "a long context, questions later",
        "kvzip",
        0.75,
        (*RECALL, "two-turn"),
        "reads the context again: the prefill takes 2.3 to 3.3 times as long",
    ),
    Start(
        "a smaller cache, nothing forgotten",
        "kivi",
        0.75,
        (*RECALL, "two-turn"),
        "4 bits; steps are slower but on CUDA, where a kernel reads them",
    ),
)


def method_rows(specs: Iterable[Spec]) -> list[list[str]]:
    """One row per method, in the order given; `METHOD_COLUMNS`."""
    return [
        [s.name, s.stage, s.kind, ", ".join(sorted(s.needs)) or "-", s.paper, _call(s.example), s.summary]
        for s in specs
    ]


def grouped(specs: Iterable[Spec]) -> str:
    """The methods as Markdown, by stage and kind, each kind with the sentence that says when to take it."""
    specs, parts = list(specs), []
    for stage, kinds in KINDS.items():
        for kind, sentence in (kinds | {OWN: ""}).items():
            rows = method_rows(s for s in specs if (s.stage, s.kind) == (stage, kind))
            if rows:
                columns, rows = METHOD_COLUMNS[:1] + METHOD_COLUMNS[3:], [row[:1] + row[3:] for row in rows]
                parts += [f"## {stage}: {kind}", *filter(None, [sentence]), markdown(columns, rows)]
    return "\n\n".join(parts)


def _call(example: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in example.items())


def adapters(by_type: Mapping[str, Architecture]) -> list[Architecture]:
    """Each one once, however many model types it serves."""
    return list({type(a): a for a in by_type.values()}.values())


def architecture_rows(by_type: Mapping[str, Architecture]) -> list[list[str]]:
    """One row per adapter with all its model types; `ARCHITECTURE_COLUMNS`."""
    return [
        [
            ", ".join(a.model_types),
            ", ".join(s for s in STAGES if s in a.stages),
            ", ".join(a.modalities) or "text",
            ", ".join(sorted(a.gives)) or "-",
            {"renumber": "consecutive", "original": "original"}.get(a.positions, a.positions),
            "yes" if a.has_cls else "no",
            "yes" if a.crops else "no",
            "yes" if a.resizable else "no",
            a.tower_signals,
        ]
        for a in adapters(by_type)
    ]


def unsupported_rows(reasons: Mapping[str, str]) -> list[list[str]]:
    """One row per reason with all its model types; `UNSUPPORTED_COLUMNS`."""
    return [[", ".join(t for t in reasons if reasons[t] == why), why] for why in dict.fromkeys(reasons.values())]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], code: Sequence[int] = (0,)) -> str:
    """A Markdown table; the columns `code` are set as code, arXiv numbers become links."""

    def cell(i: int, text: str) -> str:
        if i in code:
            return ", ".join(f"`{t}`" for t in text.split(", "))
        text = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[\1](https://arxiv.org/abs/\1)", text)
        return text.replace("|", "\\|")

    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cell(i, t) for i, t in enumerate(row))} |" for row in rows]
    return "\n".join(lines)


def start_rows(board: Iterable[Mapping[str, str]]) -> list[list[str]]:
    """What to begin with, with its accuracy by the rows of a leaderboard; `START_COLUMNS`.

    Raises:
        ValueError: the leaderboard lacks one of them.
    """
    accuracy = {tuple(row[name] for name in KEY): row["accuracy"] for row in board}
    out = []
    for start in STARTS:
        keys = [(*start.board, *one) for one in ((start.method, f"{start.ratio:g}"), ("none", ""))]
        if missing := [key for key in keys if not accuracy.get(key)]:
            raise ValueError(f"benchmarks/leaderboard.csv has no accuracy of {missing[0]}; choose another start")
        found, full = (f"{100 * float(accuracy[key]):.1f} %" for key in keys)
        out.append(
            [start.where, f"`{start.method}`, ratio={start.ratio:g}", f"{found} (uncompressed {full})", start.price]
        )
    return out


def boards(board: Iterable[Mapping[str, str]]) -> str:
    """The accuracies of a leaderboard as JSON, {board: {method: {ratio: accuracy}}}, a line per method."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in board:
        if row["accuracy"]:
            where = f"{row['model']}, {row['protocol']}"
            found.setdefault(where, {}).setdefault(row["method"], {})[row["ratio"]] = round(float(row["accuracy"]), 4)
    parts = [
        f"{json.dumps(where)}: {{\n" + ",\n".join(f"{json.dumps(m)}: {json.dumps(of[m])}" for m in sorted(of)) + "\n}"
        for where, of in found.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def paper_rows(specs: Iterable[Spec]) -> list[list[str]]:
    """One row per method that follows a paper; `PAPER_COLUMNS`."""
    return [[s.name, s.title, s.paper, " ".join(differs(s.cls))] for s in specs if s.title]


def tables(folder: Path) -> dict[str, str]:
    """All tables by name, as Markdown; `folder` is that of the repository."""
    specs = hf_compress.methods().values()
    return {
        "start": markdown(START_COLUMNS, start_rows(_board(folder)), code=()),
        "methods": grouped(specs),
        "papers": markdown(PAPER_COLUMNS, paper_rows(specs)),
        "architectures": markdown(ARCHITECTURE_COLUMNS, architecture_rows(hf_compress.architectures())),
        "unsupported": markdown(UNSUPPORTED_COLUMNS, unsupported_rows(UNSUPPORTED)),
    }


def _board(folder: Path) -> list[dict[str, str]]:
    with (folder / "benchmarks" / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def render(text: str, given: Mapping[str, str]) -> str:
    """`text` with the tables `given` between its markers.

    Raises:
        ValueError: a pair of markers is missing or occurs twice.
    """
    for name, table in given.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"a page needs exactly one pair <!-- {name}:begin --> and <!-- {name}:end -->")
        text = pattern.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)  # type: ignore[misc]
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser("python -m hf_compress.readme", description="Write the tables of README and docs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a table is stale")
    parser.add_argument("--folder", type=Path, default=Path(), help="of the repository; default: the current one")
    chosen = parser.parse_args(arguments)
    if missing := [name for name in PAGES if not (chosen.folder / name).is_file()]:
        parser.error(f"{chosen.folder / missing[0]} does not exist; run this in the repository or pass --folder")
    made, stale = tables(chosen.folder), []
    for name in (*PAGES, BOARDS):
        page = chosen.folder / name
        old = page.read_text(encoding="utf-8") if page.is_file() else ""
        with_tables = name != BOARDS
        new = (
            render(old, {table: made[table] for table in PAGES[name]}) if with_tables else boards(_board(chosen.folder))
        )
        if new != old:
            stale.append(name)
            if not chosen.check:
                page.write_text(new, encoding="utf-8")
    if chosen.check and stale:
        print(f"{', '.join(stale)}: stale, run `python -m hf_compress.readme`", file=sys.stderr)
    return int(chosen.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
