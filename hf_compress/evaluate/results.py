"""What the answers say: accuracy with intervals, paired differences, and whether a method beats its controls."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_compress.bench.timing import record
from hf_compress.evaluate import figures, tables
from hf_compress.evaluate.intervals import DIFFERENCES, interval, mean_of
from hf_compress.evaluate.metrics import score_answers
from hf_compress.evaluate.plan import BARE, Run, controls, controls_of, labels
from hf_compress.evaluate.rows import Board, Row, correct
from hf_compress.evaluate.store import Records
from hf_compress.evaluate.tasks import Task
from hf_compress.evaluate.times import clock_of
from hf_compress.saving import replaced, write_json

CONSTANTS = 10  # most frequent references, one of which is the best constant answer


class Results(Board):
    """The rows of one sweep, which can be written, read again and shown."""

    def write(self, folder: Path) -> None:
        """results.json, leaderboard.csv, leaderboard.md and, where a method could be done, pareto.png."""
        write_json(folder / "results.json", asdict(self))
        with replaced(folder / "leaderboard.csv") as path:
            tables.write_csv([self], path)
        picture = folder / "pareto.png"
        picture.unlink(missing_ok=True)
        if any(row.accuracy and row.method != BARE for row in self.rows):
            with replaced(picture) as path:
                figures.pareto([self], path)
        with replaced(folder / "leaderboard.md") as path:
            path.write_text(tables.markdown([self], [picture.name] * picture.exists()), encoding="utf-8")

    def overview(self) -> str:
        """Accuracy of every method at every ratio, as Markdown."""
        return f"{tables.overview(self)}\n{tables.LEGEND}\n{tables.by_chance([self])}\n"

    def __str__(self) -> str:
        return self.overview()

    def _repr_markdown_(self) -> str:
        """The same for notebooks."""
        return self.overview()


@dataclass
class _Scored:
    """Answers to all questions, the seeds of a method together."""

    runs: list[Run]
    seeds: list[list[float]]  # per seed and question
    records: list[list[dict[str, Any]]]

    @property
    def scores(self) -> list[float]:
        return [fmean(s) for s in zip(*self.seeds)]


def collect(
    task: Task,
    runs: Sequence[Run],
    records: Records,
    metric: str,
    settings: dict[str, Any],
    left_out: dict[str, str],
    device: Any,
) -> Results:
    """The leaderboard of the runs, and of whatever else has been answered in full or refused in the same folder."""
    answers, times, rows = records.answers, records.times, range(len(task))
    done = [key for key in answers.found if not answers.lacking(key, rows)]
    refused = {key: reason for key, reason in records.refused.items() if key not in done}
    earlier = [Run.from_key(key) for key in [*done, *refused]]
    members = list(dict.fromkeys([*runs, *earlier]))
    names = labels(members)
    together: dict[tuple[str, float | None], list[Run]] = {}
    for run in members:
        together.setdefault((names[run], run.ratio), []).append(run)
    scored: dict[tuple[str, float | None], _Scored] = {}
    for key, members in together.items():
        if not any(run.key in refused for run in members):
            said = [[answers.found[run.key][row] for row in rows] for run in members]
            seeds = [score_answers(metric, [r["answer"] for r in one], task.answers) for one in said]
            scored[key] = _Scored(members, seeds, said)
            # rivals are looked up by method; of several settings of a control the one of this call counts
            scored.setdefault((members[0].method, members[0].ratio), scored[key])
    rivals = controls()
    rivals |= {n for run in names if run.method != BARE for n in controls_of(names[run], task.modality).values()}
    out = []
    for key in sorted(together, key=lambda k: (k[1] is not None, k[1] or 0.0)):
        members = together[key]
        first = members[0]
        row = Row(key[0], first.stage, first.ratio, _knobs(first), len(members))
        row.control = bool({key[0], first.method} & rivals)
        if key in scored:
            _measure(row, scored, task)
            took = next((t[0] for run in members if (t := times.found.get(run.key))), {})
            row.prefill, row.decode, row.note = took.get("prefill"), took.get("decode"), took.get("note", "")
            row.prefill_range, row.decode_range = took.get("prefill_range"), took.get("decode_range")
        else:
            row.note = next(refused[run.key] for run in members if run.key in refused)
        out.append(row)
    kinds = {kind: task.types.count(kind) for kind in dict.fromkeys(task.types) if kind}
    clock = clock_of(device)
    constant, floor = best_constant(metric, task.answers)
    for row in out:
        row.marked = (out[0].accuracy or (0.0,))[0] > floor
    found = Results(settings, metric, record(device), clock, kinds, left_out, constant, floor, out)
    correct([found])
    return found


def best_constant(metric: str, answers: Sequence[Sequence[str]]) -> tuple[str, float]:
    """(answer, score) that scores best where it is given to every question, of the most frequent references."""
    spelled: dict[str, str] = {}  # the first spelling of each: case may count
    counts: Counter[str] = Counter()
    for given in answers:
        same = {" ".join(reference.lower().split()): reference for reference in reversed(given)}
        for text, reference in same.items():
            spelled.setdefault(text, reference)
        counts.update(same.keys())
    tried = [spelled[text] for text, _ in counts.most_common(CONSTANTS)]
    scores = score_answers(metric, [text for text in tried for _ in answers], [*answers] * len(tried))
    means = [fmean(scores[i * len(answers) : (i + 1) * len(answers)]) for i in range(len(tried))]
    return tried[means.index(max(means))], max(means)


def _knobs(run: Run) -> str:
    """JSON of the knobs that are not the defaults, without the seed that it draws by."""
    own = {part: {k: v for k, v in o.items() if k in run.setting[part]} for part, o in run.changed.items()}
    return json.dumps({part: o for part, o in own.items() if o}, sort_keys=True)


def _measure(row: Row, scored: Mapping[tuple[str, float | None], _Scored], task: Task) -> None:
    """Fill in a row from its answers and those of its rivals."""
    mine, full = scored[row.method, row.ratio], scored[BARE, None]
    scores = mine.scores
    flat = [record for records in mine.records for record in records]
    row.accuracy, row.groups = interval(scores, task.groups), len(set(task.groups))
    if len(mine.seeds) > 1:
        each = [fmean(s) for s in mine.seeds]
        row.spread = min(each), max(each)
    for name in ("length", "cut", "visual", "entries"):
        setattr(row, name, fmean(r[name] for r in flat))
    row.kv_bytes = fmean(r["bytes"] for r in flat)
    row.kv_share = row.kv_bytes / fmean(r["full_bytes"] for r in flat)
    row.types = _by_type(scores, task.types)
    if row.method == BARE:
        return
    row.over_full = interval(_minus(scores, full.scores), task.groups, bounds=DIFFERENCES)
    said = [record["answer"].lower().split() for record in full.records[0]]
    row.agreement = fmean(r["answer"].lower().split() == s for records in mine.records for r, s in zip(records, said))
    for control, name in controls_of(row.method, task.modality).items():
        if (rival := scored.get((name, row.ratio))) is None:
            continue
        delta = _minus(scores, rival.scores)
        row.over[control] = interval(delta, task.groups, bounds=DIFFERENCES)
        if control == "random":
            row.types_over_random = _by_type(delta, task.types)
            row.chance = mean_of(delta, task.groups, DIFFERENCES).p_value()
        mean, low, _ = row.over[control]
        if low <= 0 if control == "random" else mean < 0:
            row.lost.append(control)


def _minus(a: Iterable[float], b: Iterable[float]) -> list[float]:
    return [x - y for x, y in zip(a, b)]


def _by_type(values: Sequence[float], types: Sequence[str]) -> dict[str, float]:
    parts: dict[str, list[float]] = {}
    for value, kind in zip(values, types):
        parts.setdefault(kind, []).append(value)
    return {kind: fmean(part) for kind, part in parts.items() if kind}
