"""The tables of README.md, written from the registry and the adapters.

python -m hf_compress.readme            # rewrite README.md in the current folder
python -m hf_compress.readme --check    # exit status 1 if it is stale
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import hf_compress
from hf_compress.patches.base import Architecture
from hf_compress.patches.unsupported import UNSUPPORTED
from hf_compress.registry import KINDS, OWN, STAGES, Spec

METHOD_COLUMNS = ("name", "stage", "kind", "needs", "paper", "on a small model", "what it does")
ARCHITECTURE_COLUMNS = (
    "model_type", "stages", "compresses", "gives", "positions", "[CLS]", "crops", "any resolution", "attention row",
)  # fmt: skip

UNSUPPORTED_COLUMNS = ("model_type", "why not")


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
                parts.append(f"**{stage}: {kind}.** {sentence}\n\n{markdown(columns, rows)}")
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


def render(text: str) -> str:
    """`text` with the tables between its markers replaced.

    Raises:
        ValueError: a pair of markers is missing or occurs twice.
    """
    tables = {
        "methods": grouped(hf_compress.methods().values()),
        "architectures": markdown(ARCHITECTURE_COLUMNS, architecture_rows(hf_compress.architectures())),
        "unsupported": markdown(UNSUPPORTED_COLUMNS, unsupported_rows(UNSUPPORTED)),
    }
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"README needs exactly one pair <!-- {name}:begin --> and <!-- {name}:end -->")
        text = pattern.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)  # type: ignore[misc]
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser("python -m hf_compress.readme", description="Regenerate the tables of the README.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the tables are stale")
    parser.add_argument("--path", type=Path, default=Path("README.md"), help="default: README.md")
    chosen = parser.parse_args(arguments)
    if not chosen.path.is_file():
        parser.error(f"{chosen.path} does not exist; run this in the repository or pass --path")
    old = chosen.path.read_text(encoding="utf-8")
    new = render(old)
    if chosen.check:
        if new != old:
            print(f"{chosen.path} is stale: run `python -m hf_compress.readme`", file=sys.stderr)
        return int(new != old)
    chosen.path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
