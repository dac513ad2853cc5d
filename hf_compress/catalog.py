"""The registry as a person looks for a method: lists, a search, and all that is known of one. No heavy import."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_compress import docstrings, registry
from hf_compress.registry import KINDS, NEEDS, OWN, Spec
from hf_compress.screen import Table

if TYPE_CHECKING:
    from rich.console import Console


def find(words: Sequence[str], specs: Iterable[Spec]) -> list[Spec]:
    """The methods whose name, stage, kind, needs, paper, cost, summary or "when to take it" hold all of the words.

    Raises:
        ValueError: there is none; the message names what is near.
    """
    specs = list(specs)
    found = [spec for spec in specs if all(word.lower() in _text(spec) for word in words)]
    if not found:
        near = [n for word in words for n in difflib.get_close_matches(word, [s.name for s in specs], n=2, cutoff=0.5)]
        used = {spec.kind for spec in specs}
        kinds = ", ".join(dict.fromkeys(kind for of in KINDS.values() for kind in of if kind in used))
        hint = f"did you mean {' or '.join(near)}?" if near else f"try a kind ({kinds}) or a word of a summary"
        raise ValueError(f"no method matches {' '.join(words)!r}; {hint}")
    return found


def _text(spec: Spec) -> str:
    needs = [f"{need} {NEEDS[need]}" for need in sorted(spec.needs)]
    parts = [spec.name, spec.stage, spec.kind, *needs, spec.paper, spec.title, spec.cost, spec.summary, spec.when]
    return " ".join(parts).lower()


def facts(spec: Spec) -> dict[str, Any]:
    """All that is known of a method, as plain data; defaults that are made anew for every call are None."""
    names = ("name", "stage", "kind", "summary", "when", "paper", "title", "cost", "example", "meanings")
    out = {name: getattr(spec, name) for name in names}
    knobs = {k: _plain(v) for k, v in spec.knobs.items()}
    return out | {"needs": sorted(spec.needs), "knobs": knobs, "boards": boards(spec.name)}


def _plain(default: object) -> object:
    return None if default is MISSING else default


def boards(name: str) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracies on the embedded models, {board: {method: {ratio: accuracy}}}, of the boards that have judged a method.

    Beside it what is drawn at random at the same budget, and the uncompressed model ("none", at ratio "").
    """
    found = json.loads(Path(__file__).with_name("boards.json").read_text(encoding="utf-8"))
    spec = registry.methods().get(name)
    control = "kvrandom" if spec is not None and spec.stage == "cache" else "random"
    wanted = dict.fromkeys((name, control, "none"))
    return {where: {m: of[m] for m in wanted if m in of} for where, of in found.items() if name in of}


def _boards(spec: Spec, console: Console) -> None:
    for where, of in boards(spec.name).items():
        ratios = sorted({ratio for mine in of.values() for ratio in mine if ratio}, key=float)
        rows = [
            ["uncompressed" if m == "none" else m, *(_percent(mine, ratio, m == "none") for ratio in ratios)]
            for m, mine in of.items()
        ]
        console.print()
        Table((f"right on {where}, %", *(f"ratio {ratio}" for ratio in ratios)), rows).print(console)


def _percent(accuracies: dict[str, float], ratio: str, bare: bool) -> str:
    value = accuracies.get("" if bare else ratio)
    return "-" if value is None else f"{100 * value:.1f}"


def listing(specs: Iterable[Spec], console: Console) -> None:
    """A table per kind, under the sentence that says when to take one."""
    specs = list(specs)
    for stage, kinds in KINDS.items():
        for kind, sentence in (kinds | {OWN: ""}).items():
            rows = [[s.name, _needs(s), s.paper, s.summary] for s in specs if (s.stage, s.kind) == (stage, kind)]
            if rows:
                console.print(f"{stage} ({kind}). {sentence}", style="bold", markup=False, highlight=False)
                Table(("name", "needs", "paper", "what it does"), rows, left=4).print(console)
                console.print()


def blocks(specs: Iterable[Spec], console: Console) -> None:
    """What decides between methods: a block each."""
    columns = ("name", "what it does", "stage, kind", "when", "needs", "cost", "paper")
    rows = [
        [s.name, s.summary, f"{s.stage}, {s.kind}", s.when, _needs(s), s.cost, f"{s.paper} {s.title}".strip()]
        for s in specs
    ]
    Table(columns, rows, left=len(columns)).blocks(console)


def _needs(spec: Spec) -> str:
    return ", ".join(sorted(spec.needs)) or "-"


def detail(spec: Spec, console: Console) -> None:
    """One method with its knobs."""
    blocks([spec], console)
    console.print(f"\n{call(spec)}", markup=False, highlight=False, soft_wrap=True)
    _arguments(spec, console)


def call(spec: Spec) -> str:
    """How it is called, with budget and knobs for a small model."""
    knobs = "".join(f", {name}={value!r}" for name, value in spec.example.items())
    return f'model.compress("{spec.name}"{knobs})'


def _arguments(spec: Spec, console: Console) -> None:
    """The knobs of a method; those that come from what it is derived from stand behind its own."""
    if not spec.knobs:
        return console.print("It has no knobs.")
    own = docstrings.entries(docstrings.sections(spec.cls).get("Args", ""))
    names = sorted(spec.knobs, key=lambda name: name not in own)
    rows = [[name, repr(_plain(spec.knobs[name])), spec.meanings[name]] for name in names]
    console.print()
    Table(("knob", "default", "what it means"), rows, left=3).print(console)


def explain(spec: Spec, console: Console) -> None:
    """The same, and the whole text of its docstring."""
    blocks([spec], console)
    for paragraph in docstrings.sections(spec.cls)[""].split("\n\n")[1:]:
        console.print("\n" + " ".join(paragraph.split()), markup=False, highlight=False)
    needs = [[need, NEEDS[need]] for need in sorted(spec.needs)]
    if needs:
        console.print()
        Table(("needs", "which is"), needs, left=2).print(console)
    console.print(f"\n{call(spec)}", markup=False, highlight=False, soft_wrap=True)
    _arguments(spec, console)
    _boards(spec, console)
    errors = docstrings.sections(spec.cls).get("Raises", "")
    for line in filter(None, [" ".join(errors.split())]):
        console.print(f"\nRefused: {line.removeprefix('ValueError: ')}", markup=False, highlight=False)


def chosen(words: Sequence[str], stage: str = "") -> tuple[list[Spec], bool]:
    """The methods of some names or words, and whether every word is the name of one.

    Raises:
        ValueError: nothing matches.
    """
    known = registry.methods(stage or None)
    if words and all(word in known for word in words):
        return [known[word] for word in words], True
    return (find(words, known.values()) if words else list(known.values())), False
