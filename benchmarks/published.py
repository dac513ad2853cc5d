"""The page of what the vision boards predict: scores that papers publish of 7B models, how far boards agree with them.

python benchmarks/published.py     # benchmarks/published.md, from published.json and boards/
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import hf_compress
from hf_compress.evaluate.agreement import LEAST, Column, accuracies, agreement, in_common, side_by_side
from hf_compress.screen import Table

HERE = Path(__file__).parent
READING = ("reading a digit", "reading all digits")
KINDS = {  # benchmark -> the kinds of our questions that ask for the like
    "TextVQA": READING,
    "OCRBench": READING,
    "POPE": ("presence",),
    "GQA": ("colour", "comparison", "place", "shape", "object"),
}
BENCHMARKS = (*KINDS, "VQAv2", "MME", "MMB", "SQA")
COPIED = 0.5  # of the single scores in common: from so many equal ones on two papers count as one
CLEAR = 2.0  # points, from which a difference on a board is more than a few answers
BUDGETS = (0.778, 0.889)  # of LLaVA, at which most papers can be held against each other
Pairs = set[tuple[str, str]]  # (the better method, the worse one)


@cache
def _accuracies(folders: tuple[str, ...], ratio: float, kinds: tuple[str, ...]) -> dict[str, float]:
    return accuracies([HERE / "boards" / name for name in folders], ratio, kinds)


@dataclass(frozen=True)
class Board:
    """One of ours: its title, its folders in `boards`, the ratios that it was judged at."""

    title: str
    folders: tuple[str, ...]
    ratios: tuple[float, ...] = (0.5, 0.75, 0.89, 0.94)

    def column(self, ratio: float, kinds: tuple[str, ...] = ()) -> dict[str, float]:
        """Percent right per method, of questions of some kinds or of all."""
        return _accuracies(self.folders, ratio, kinds)

    def nearest(self, removed: float) -> float:
        """The ratio that is nearest to a published budget."""
        return min(self.ratios, key=lambda ratio: abs(ratio - removed))


BOARDS = {
    "llava": Board("LLaVA", ("llava", "llava-added", "llava-explainability")),
    "qwen": Board("Qwen2.5-VL", ("qwen", "qwen-added")),
    "video": Board("videos", ("video", "video-added"), (0.5, 0.75, 0.9, 0.95)),
}
Published = list[dict[str, Any]]


def read() -> Published:
    """The published columns, in the order of the file."""
    return json.loads((HERE / "published.json").read_text(encoding="utf-8"))


def paper(one: Mapping[str, Any]) -> str:
    """Who has published it: its name up to the budget."""
    return one["name"].split(", ")[0]


def shared(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Which part of the single scores that both give is the same number, as where one has copied the other."""
    both = [
        one["parts"][part][name] == other["parts"][part][name]
        for part in one["parts"]
        if part in other["parts"]
        for name in in_common(one["parts"][part], other["parts"][part])
    ]
    return sum(both) / len(both) if both else 0.0


def voices(columns: Published) -> dict[str, str]:
    """Paper -> the first one whose numbers it repeats, itself where it repeats none."""
    found = {paper(one): paper(one) for one in columns}
    for one, other in combinations(columns, 2):
        if paper(one) != paper(other) and one["removed"] == other["removed"] and shared(one, other) >= COPIED:
            found[paper(other)] = found[paper(one)]
    return found


def agreed(columns: Published, part: str = "") -> tuple[Pairs, int]:
    """Pairs of methods that two papers or more give the same order, at all their budgets, and none another one.

    Args:
        part: of single benchmarks; "" for the mean of each paper.

    Returns:
        The pairs, and how many there are that two papers or more have judged.
    """
    whose, said = voices(columns), dict[tuple[str, str], list[tuple[str, float]]]()
    for one in columns:
        scores = one["parts"].get(part, {}) if part else one["scores"]
        for a, b in combinations(sorted(in_common(scores, scores)), 2):
            said.setdefault((a, b), []).append((whose[paper(one)], scores[a] - scores[b]))
    pairs, judged = set(), 0
    for (a, b), votes in said.items():
        if len({voice for voice, _ in votes}) < 2:
            continue
        judged += 1
        if all(d >= 0 for _, d in votes) != all(d <= 0 for _, d in votes):  # not both: some differ
            pairs.add((a, b) if all(d >= 0 for _, d in votes) else (b, a))
    return pairs, judged


def verdict(pairs: Pairs, column: Column) -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[tuple[str, str]]]:
    """The pairs that the column orders alike, not at all, and the other way; those that it has not judged in none."""
    known = sorted((a, b) for a, b in pairs if a in column and b in column)
    return (
        [(a, b) for a, b in known if column[a] > column[b]],
        [(a, b) for a, b in known if column[a] == column[b]],
        [(a, b) for a, b in known if column[a] < column[b]],
    )


def _of(columns: Published, board: str) -> Published:
    return [one for one in columns if one["board"] == board]


def _tau(one: Column, other: Column) -> str:
    tau, chance, n = agreement(one, other)
    return f"{tau:.2f} (n={n}, p={chance:.2f})" if n >= LEAST else "–"


def _with_boards(columns: Published) -> list[str]:
    """Per board: tau of every published mean with every ratio."""
    parts = []
    for name, board in BOARDS.items():
        ours = {ratio: board.column(ratio) for ratio in board.ratios}
        rows = []
        for one in _of(columns, name):
            nearest = board.nearest(one["removed"])
            cells = [_tau(one["scores"], column) for column in ours.values()]
            bold = [f"**{cell}**" if ratio == nearest and cell != "–" else cell for ratio, cell in zip(ours, cells)]
            if any(cell != "–" for cell in cells):
                rows.append([f"{one['name']} ({one['removed']:.0%})", *bold])
        heads = (f"{board.title}, {ratio:.0%}" for ratio in board.ratios)
        parts.append(Table(["published, and removed there", *heads], rows).markdown())
    return parts


def _among_papers(columns: Published) -> list[str]:
    """A table per budget of LLaVA; below, the median of pairs that do not repeat each other, and that of the board."""
    parts: list[str] = []
    papers: list[float] = []
    board: list[float] = []
    for removed in BUDGETS:
        there = [one for one in _of(columns, "llava") if one["removed"] == removed]
        rows = [[paper(one), *(_paper_cell(one, other) for other in there)] for one in there]
        parts += [f"{removed:.0%} removed:", Table(["", *map(paper, there)], rows).markdown()]
        pairs = [(one, other) for one, other in combinations(there, 2) if shared(one, other) < COPIED]
        found = [agreement(one["scores"], other["scores"]) for one, other in pairs]
        papers += [tau for tau, _, n in found if n >= LEAST]
        board += [agreement(one["scores"], BOARDS["llava"].column(0.75))[0] for one in there]
    spread = [f"median {median(taus):.2f}, {min(taus):.2f} to {max(taus):.2f}" for taus in (papers, board)]
    return [
        *parts,
        f"Tau of two papers, where neither repeats the other: {spread[0]} ({len(papers)} pairs of columns). Of the "
        f"LLaVA board at 75 % removed with these columns: {spread[1]} ({len(board)} columns).",
    ]


def _paper_cell(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    tau, _, n = agreement(one["scores"], other["scores"])
    if one is other or n < LEAST:
        return "" if one is other else "–"
    cell = f"{tau:.2f} ({n})"
    return f"*{cell}*" if shared(one, other) >= COPIED else cell


def _counts(pairs: Pairs, column: Column) -> list[str]:
    alike, tied, otherwise = verdict(pairs, column)
    clear = [sum(abs(column[a] - column[b]) >= CLEAR for a, b in part) for part in (alike, otherwise)]
    return [*(str(len(part)) for part in (alike, tied, otherwise)), " : ".join(map(str, clear))]


def _pairs(columns: Published) -> list[str]:
    """How many of the pairs that papers agree on each board orders alike, and which it does not."""
    stages = {name: spec.stage for name, spec in hf_compress.methods().items()}
    rows, wrong = [], []
    for name, board in BOARDS.items():
        pairs, judged = agreed(_of(columns, name))
        early = {(a, b) for a, b in pairs if stages[a] == stages[b] == "vision"}
        wrong.append(f"{board.title}: papers agree on {len(pairs)} of the {judged} pairs that two of them have judged.")
        for ratio in board.ratios[1:]:
            column = board.column(ratio)
            for part, title in ((early, "both before the language model"), (pairs - early, "one or both inside it")):
                if any(verdict(part, column)):
                    rows.append([f"{board.title}, {ratio:.0%}", title, *_counts(part, column)])
        other = verdict(pairs, board.column(0.75))[2]
        if other:
            listed = ", ".join(f"`{a}` over `{b}`" for a, b in other)
            wrong.append(f"In papers, and the other way on the board at 75 %: {listed}.")
    heads = ["board", "pairs of methods", "alike", "tied", "other way", f"{CLEAR:g} points apart, alike : other way"]
    return [Table(heads, rows, left=2).markdown(), *wrong]


def _benchmarks(columns: Published) -> str:
    """The same of single benchmarks of LLaVA: against all our questions, and against those of the same kind."""
    board, rows = BOARDS["llava"], []
    for part in BENCHMARKS:
        pairs, judged = agreed(_of(columns, "llava"), part)
        views = [board.column(0.75)] + ([board.column(0.75, KINDS[part])] if part in KINDS else [])
        counts = [" / ".join(_counts(pairs, view)[:3]) for view in views]
        kinds = ", ".join(KINDS.get(part, ()))
        rows.append([part, kinds or "–", f"{len(pairs)} of {judged}", *counts, *["–"] * (2 - len(counts))])
    heads = ["benchmark", "our kinds of questions", "papers agree", "all our questions", "those of the kind"]
    return Table(heads, rows, left=2).markdown()


def _random(columns: Published) -> str:
    """What is left with tokens drawn at random, in percent of the whole: in papers, and on the boards."""
    rows = []
    for one in columns:
        if "random" in one["scores"]:
            board = BOARDS[one["board"]]
            ratio = board.nearest(one["removed"])
            views = [one["scores"], *(one["parts"].get(part, {}) for part in ("POPE", "OCRBench")), board.column(ratio)]
            left = [f"{view['random'] / view['none']:.0%}" if view else "–" for view in views]
            rows.append([f"{one['name']} ({one['removed']:.0%})", *left[:3], f"{board.title}, {ratio:.0%}", left[3]])
    return Table(["published, and removed there", "mean", "POPE", "OCRBench", "board", "on the board"], rows).markdown()


def _sources(columns: Published) -> list[str]:
    """Per board the scores, and where they stand: a line per table that was read."""
    parts = []
    for name, board in BOARDS.items():
        there, notes = _of(columns, name), dict[str, list[str]]()
        for i, one in enumerate(there):
            whole = f"{one['model']}; {one['benchmark']}; read: {one['read']}. [{one['source']}]({one['address']})"
            notes.setdefault(whole, []).append(f"[{i + 1}] {one['removed']:.1%} removed")
        lines = [f"- {', '.join(budgets)}: {whole}" for whole, budgets in notes.items()]
        parts += [f"### {board.title}", side_by_side([one["scores"] for one in there]), "\n".join(lines)]
    return parts


def page() -> str:
    """All of it, as Markdown."""
    columns = read()
    lines = [
        "# What papers publish, and what the vision boards say",
        "`python benchmarks/published.py` writes this page from [published.json](published.json), tables of papers and "
        "libraries, each a column of its own, and [boards/](boards). "
        "[What follows from it](README.md#what-the-vision-boards-predict-and-what-not).",
        "## Boards and papers",
        "Kendall's tau over the methods that both have judged (n); 1: the same order, 0: none, -1: the other way. p: "
        "how often chance alone comes as far. Controls are left out. Bold: the ratio of the board that is nearest to "
        "the paper's. Methods inside the language model reach 75 % on the boards at most: at 89 % and more the others "
        "are compared.",
        *_with_boards(columns),
        "## Papers among themselves",
        "LLaVA-1.5-7B, the same; tau and n. *Italic*: half of the single scores or more are the same numbers, so that "
        "one repeats the other.",
        *_among_papers(columns),
        "## Pairs on which papers agree",
        "Pairs of methods that two papers or more, which do not repeat each other, have judged, with the same order in "
        "all of them at all budgets; what the boards say of these pairs.",
        *_pairs(columns),
        "Single benchmarks of LLaVA-1.5-7B, and the LLaVA board at 75 % removed: alike / tied / the other way.",
        _benchmarks(columns),
        "## Tokens drawn at random",
        "What they leave, in percent of the uncompressed model.",
        _random(columns),
        "## Published scores",
        *_sources(columns),
    ]
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    (HERE / "published.md").write_text(page(), encoding="utf-8")
