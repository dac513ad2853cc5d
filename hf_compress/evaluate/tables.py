"""Board as tables: CSV with everything, Markdown that shows at a glance which methods beat their controls."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_compress import registry
from hf_compress.evaluate.intervals import CONFIDENCE
from hf_compress.evaluate.plan import BARE
from hf_compress.evaluate.rows import ENOUGH, FALSE, Board, Row
from hf_compress.screen import Table

GROUPS = {
    "vision": "Fewer visual tokens",
    "cache": "A smaller KV cache",
    "both": "Fewer visual tokens and a smaller KV cache",
}
RIVALS = {
    "vision": "keep as many visual tokens",
    "cache": "keep as many bytes of the cache",
    "both": "have the same budgets",
}
LEGEND = f"""
**Bold with ✓**: beats all its controls: the 95 % interval of the paired difference to random (same questions, variance
between images or texts) lies above 0, and no other control is more accurate; **✓✓**: so it does after the correction
for the number of comparisons on the page (false discovery rate {100 * FALSE:g} %). Below {ENOUGH} images or texts
nothing is marked. Else the letters say which controls it
does not beat: **r** the interval of the difference to random includes 0, **R** it lies below 0, **u** uniform, **d**
downsample, **s** streaming is more accurate; of videos **t** strided, **f** frames. A dash: the method cannot do it,
see the reasons at the end. Controls are in italics.
"""


def markdown(results: Sequence[Board], pictures: Sequence[str] = ()) -> str:
    """The page: accuracy of every method at every ratio, then costs, question types and reasons."""
    parts = ["# Leaderboard", LEGEND.strip(), by_chance(results)]
    parts += [f"![]({name})" for name in pictures[:1]]
    parts += [overview(one) for one in results]
    parts += [f"![]({name})" for name in pictures[1:]]
    parts += [_details(one) for one in results]
    return "\n\n".join(part for part in parts if part) + "\n"


def by_chance(results: Sequence[Board]) -> str:
    """How many marks a page would have if no method were better than random."""
    rows = [row for one in results for row in one.rows if row.compared]
    if not rows:
        return (
            f"Nothing is marked: that takes a random control, {ENOUGH} images or texts, and an uncompressed model "
            "above the floor."
        )
    above = [row for row in rows if row.over["random"][1] > 0]
    stay = [row for row in above if row.corrected is not None and row.corrected <= FALSE]
    lucky = len(rows) * (1 - CONFIDENCE) / 2
    return (
        f"{len(rows)} comparison{'s' * (len(rows) > 1)} with random: if no method were better or worse, chance alone "
        f"would put about {lucky:.1f} of the intervals above 0. {len(above)} are, {len(stay)} of them also after the "
        "correction."
    )


def overview(one: Board) -> str:
    """Accuracy of every method at every ratio, as Markdown."""
    parts = [f"## {one.title}", head_of(one)]
    for title, rivals, pivot in _groups(one):
        parts += [f"### {title}", rivals, pivot.markdown()]
    return "\n\n".join(parts)


def show(one: Board, console: Any = None) -> None:
    """The same for a terminal or a pipe, whatever its width and encoding."""
    from rich.console import Console

    console = console or Console()

    def say(text: str) -> None:
        console.print(re.sub(r"\*\*|`", "", text), markup=False, highlight=False)

    say(f"{one.title}\n{head_of(one)}")
    for title, rivals, pivot in _groups(one):
        say(f"\n{title}\n{rivals}")
        pivot.print(console)
    say("\n" + LEGEND.strip().replace("\n", " "))
    say(by_chance([one]))


def head_of(one: Board) -> str:
    """What was asked, and how the uncompressed model did, in a few sentences of Markdown."""
    full, s = one.rows[0], one.settings
    head = (
        f"{s['questions']} questions, {one.metric.replace('_', ' ')}, {s['dtype']}. Uncompressed: "
        f"{_percent(full.accuracy)} [{_interval(full.accuracy)}], {_number(full.visual)} visual tokens, "
        f"{_number(full.entries)} KV entries per head. Answers have {s['max_new_tokens']} tokens at most; "
        f"{_percent(full.cut)} of the uncompressed ones were cut there."
    )
    if left_out := s["skipped"]:
        head += f" {left_out} {'row' if left_out == 1 else 'rows'} of the data left out."
    if not full.marked:
        head += (
            f" **The uncompressed model answers at the floor**: {one.constant!r} to every question scores "
            f"{_percent(one.floor)}. Nothing is marked, as no difference means anything here. Does the model talk (try "
            "`--metric contains`), is it cut (`--max-new-tokens`), or can it not do the task?"
        )
    return head


def _groups(one: Board) -> Iterator[tuple[str, str, Table]]:
    """Title, what the controls are, and the table of each group of methods that there is."""
    for group in GROUPS:
        rows = [r for r in one.rows if r.method != BARE and r.group == group]
        if rows:
            yield heading(one, group), _rivals(rows, group), _pivot(rows)


def heading(one: Board, group: str) -> str:
    """What the methods of a group make fewer: of a text, which has no visual tokens, those of the prompt."""
    what = "tokens of the prompt" if one.rows[0].visual == 0 else "visual tokens"
    return GROUPS[group].replace("visual tokens", what)


def _rivals(rows: list[Row], group: str) -> str:
    """The controls by name, and from how many seeds they are drawn."""
    found = {r.method: f"`{r.method}`" + f" ({r.seeds} seeds)" * (r.seeds > 1) for r in rows if r.control}
    if not found:
        return "There is no control with the same budget."
    *first, last = found.values()
    return f"The controls {', '.join(first) + ' and ' * bool(first)}{last} {RIVALS[group]}."


def _pivot(rows: list[Row]) -> Table:
    """Methods by ratios, the most accurate of a kind first, controls last; times at the ratio in the middle."""
    ratios = sorted({r.ratio for r in rows if r.ratio is not None})
    cells = {(r.method, r.ratio): r for r in rows}
    columns = [f"{ratio:.4g}" for ratio in ratios]
    heads, lines = ["method", "kind", *(f"ratio {c}" for c in columns)], []
    middle = ratios[(len(ratios) - 1) // 2]
    timed = any(r.prefill is not None for r in rows)
    if timed:
        heads += [f"prefill at {middle:.4g}", f"decode at {middle:.4g}"]
    order = {name: place for place, name in enumerate(ranked(rows))}
    kinds = {name: kind_of(name) for name in order}
    first = {kind: min(order[n] for n in order if kinds[n] == kind) for kind in kinds.values()}
    controls = {r.method for r in rows if r.control}
    for name in sorted(order, key=lambda n: (n in controls, first[kinds[n]], order[n])):
        found = [cells.get((name, ratio)) for ratio in ratios]
        line = [f"*{name}*" if name in controls else name, kinds[name], *(cell(r) for r in found)]
        if timed:
            at = cells.get((name, middle))
            line += ["–" if at is None or x is None else f"{x:.2f}" for x in ((at and at.prefill), (at and at.decode))]
        lines.append(line)
    return Table(heads, lines, left=2)


def kind_of(method: str) -> str:
    """What a method stands beside in tables (`registry.KINDS`); "" of one that is not known, and of compositions."""
    spec = registry.methods().get(method.split(":")[0])
    return "" if spec is None else spec.kind


def ranked(rows: Iterable[Row]) -> list[str]:
    """Names of methods by their mean accuracy over the ratios, controls at the end; a ratio out of reach counts 0."""
    found: dict[str, list[float]] = {}
    controls = set()
    for row in rows:
        found.setdefault(row.method, []).append(row.accuracy[0] if row.accuracy else 0.0)
        if row.control:
            controls.add(row.method)
    return sorted(found, key=lambda name: (name in controls, -sum(found[name])))


def cell(row: Row | None) -> str:
    """Accuracy in percent, and what it does not beat."""
    if row is None or row.accuracy is None:
        return "–"
    number = f"{100 * row.accuracy[0]:.1f}"
    if row.control or not row.over or not row.marked:
        return number
    return f"**{number} {mark(row)}**" if row.beats else f"{number} {mark(row)}".rstrip()


def mark(row: Row) -> str:
    """✓✓ or ✓, or the letters of the controls that a method does not beat; "" for controls and too few images."""
    if not row.compared:
        return ""
    return "✓✓" if row.sure else "✓" if row.beats else letters(row)


def letters(row: Row) -> str:
    """The controls that it does not beat."""
    return "".join("R" if name == "random" and row.over[name][2] < 0 else name[0] for name in row.lost)


def _details(one: Board) -> str:
    ratios = sorted({r.ratio for r in one.rows if r.ratio is not None})
    parts = [f"## Details: {one.title}", _measured(one)]
    for ratio in ratios:
        rows = [one.rows[0], *(r for r in one.rows if r.ratio == ratio and r.accuracy is not None)]
        names = ranked(rows[1:])
        rows[1:] = sorted(rows[1:], key=lambda r: names.index(r.method))
        parts += [_fold(f"Ratio {ratio:.4g}: differences and costs", _costs(rows))]
        if one.types:
            parts += [_fold(f"Ratio {ratio:.4g}: accuracy per question type", _types(one, rows))]
    reasons = [[r.method, f"{r.ratio:.4g}", r.note] for r in one.rows if r.note and r.ratio is not None]
    if reasons:
        parts += [
            _fold("What could not be done, and why", Table(["method", "ratio", "reason"], reasons, left=3).markdown())
        ]
    if one.left_out:
        parts += ["Not for this model: " + "; ".join(f"{k} (needs {v})" for k, v in one.left_out.items()) + "."]
    return "\n\n".join(parts)


def _measured(one: Board) -> str:
    m, s, clock = one.machine, one.settings, one.timed.get("clock", one.clock)
    knobs = sorted({f"{r.method} {r.knobs}" for r in one.rows if r.knobs != "{}" and r.seeds == 1})
    text = (
        f"Measured on {m['cpu']} ({m['device']}, {m['threads']} threads), torch {m['torch']}, transformers "
        f"{m['transformers']}, hf-compress {m['hf_compress']}; batch {s['batch_size']}, data {s['fingerprint']}. "
        f"Times are ratios to the uncompressed model in turns ({clock} time): prefill up to the first token, "
        "vision tower included; decode per further token; medians, with the lowest and highest round."
    )
    if one.timed:
        t = one.timed["machine"]
        text += (
            f" They were taken in a run of their own, of {one.timed['questions']} questions, on {t['cpu']} "
            f"({t['device']}, {t['threads']} threads; load {t['load']} at its end)."
        )
    return text + (f" Knobs other than the defaults: {'; '.join(knobs)}." if knobs else "")


def _costs(rows: list[Row]) -> str:
    heads = ["method", "accuracy", "95 %", "seeds from–to", "over random", "over full", "agrees"]
    heads += ["answer", "cut", "visual", "KV entries", "KV bytes", "prefill", "decode", "does not beat"]
    lines = []
    for r in rows:
        spread = f"{100 * r.spread[0]:.1f}–{100 * r.spread[1]:.1f}" if r.spread else ""
        over = [r.over.get("random"), r.over_full]
        line = [r.method, _percent(r.accuracy), _interval(r.accuracy), spread]
        line += [f"{100 * x[0]:+.1f} [{_interval(x, '+')}]" if x else "" for x in over]
        line += [
            _percent(r.agreement),
            _number(r.length),
            _percent(r.cut),
            _number(r.visual),
            _number(r.entries),
            _percent(r.kv_share),
        ]
        line += [_time(r.prefill, r.prefill_range), _time(r.decode, r.decode_range)]
        lines.append([*line, "" if r.control else ", ".join(r.lost)])
    return Table(heads, lines).markdown()


def _time(ratio: float | None, rounds: Sequence[float] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if rounds is None else f"{ratio:.2f} ({rounds[0]:.2f}–{rounds[1]:.2f})"


def _types(one: Board, rows: list[Row]) -> str:
    heads = ["method", *(f"{kind} ({count})" for kind, count in one.types.items())]
    lines = [[r.method, *(_percent(r.types[kind]) for kind in one.types)] for r in rows]
    return Table(heads, lines).markdown()


def write_csv(results: Sequence[Board], path: Path) -> None:
    """Every row with every number; intervals as three columns, question types one column each."""
    kinds = list(dict.fromkeys(kind for one in results for kind in one.types))
    rivals = list(dict.fromkeys(name for one in results for row in one.rows for name in row.over))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer: Any = None
        for one in results:
            for row in one.rows:
                flat = _flat(one, row, kinds, rivals)
                if writer is None:
                    writer = csv.DictWriter(file, list(flat))
                    writer.writeheader()
                writer.writerow(flat)


def _flat(one: Board, row: Row, kinds: list[str], rivals: list[str]) -> dict[str, Any]:
    def three(name: str, value: Any) -> dict[str, Any]:
        return {name: None, f"{name}_low": None, f"{name}_high": None} | (
            dict(zip((name, f"{name}_low", f"{name}_high"), value)) if value else {}
        )

    flat = {"model": one.settings["model"], "data": one.settings["data"], "protocol": one.settings["protocol"]}
    flat |= {"label": one.label, "metric": one.metric, "questions": one.settings["questions"]}
    flat |= {k: getattr(row, k) for k in ("method", "stage", "ratio", "knobs", "seeds", "control")}
    flat |= three("accuracy", row.accuracy)
    flat |= dict(zip(("seeds_low", "seeds_high"), row.spread or (None, None)))
    for name in rivals:
        flat |= three(f"over_{name}", row.over.get(name))
    flat |= three("over_full", row.over_full)
    flat |= {"groups": row.groups, "p_random": row.chance, "p_random_corrected": row.corrected}
    flat |= {"beats": row.beats, "beats_corrected": row.sure, "not_better_than": " ".join(row.lost)}
    flat |= {k: getattr(row, k) for k in ("agreement", "length", "cut", "visual", "entries", "kv_bytes", "kv_share")}
    for name in ("prefill", "decode"):
        flat |= {name: getattr(row, name)}
        flat |= dict(zip((f"{name}_low", f"{name}_high"), getattr(row, f"{name}_range") or (None, None)))
    return flat | {f"accuracy: {kind}": row.types.get(kind) for kind in kinds} | {"note": row.note}


def _fold(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def _percent(value: Any) -> str:
    value = value[0] if isinstance(value, (tuple, list)) else value
    return "" if value is None else f"{100 * value:.1f} %"


def _interval(value: Any, sign: str = "") -> str:
    return "" if value is None else f"{100 * value[1]:{sign}.1f}, {100 * value[2]:{sign}.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}".removesuffix(".0")
