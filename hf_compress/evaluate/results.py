"""What the answers say: accuracy with intervals, paired differences, and whether a method beats its controls."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_compress.bench.timing import record
from hf_compress.evaluate.intervals import DIFFERENCES, interval, mean_of
from hf_compress.evaluate.metrics import score_answers
from hf_compress.evaluate.plan import BARE, CONTROLS, Run, controls_of, labels
from hf_compress.evaluate.store import Records
from hf_compress.evaluate.tasks import Task
from hf_compress.evaluate.times import clock_of
from hf_compress.saving import read_json, replaced, write_json

CONSTANTS = 10  # most frequent references, one of which is the best constant answer
Interval = tuple[float, float, float]  # mean, low, high
ENOUGH = 20  # images or texts from which on a method is marked: intervals of fewer do not hold in all cases
FALSE = 0.05  # share of false ones among the marks that are corrected for their number


@dataclass
class Row:
    """A method at a ratio and a setting of its knobs; of what draws, the mean over its seeds.

    Attributes:
        method: as it was named; where a folder holds several settings of its knobs, with those that differ. "none" is
            the uncompressed model.
        stage: of its parts, joined by plus signs.
        ratio: fraction removed; None for the uncompressed model.
        knobs: JSON of the knobs of its parts that are not the defaults.
        seeds: how many draws.
        control: it is there to be beaten.
        note: why there are no numbers, else "".
        marked: False where the uncompressed model answers at the floor, so that nothing can be told from a difference.
        groups: how many images or texts the questions are about.
        accuracy: mean score with its 95 % interval over them.
        spread: lowest and highest accuracy of the seeds, where there are several.
        over: control -> paired difference to it at the same ratio.
        lost: the controls that it does not beat: "random" if the interval of the paired difference includes 0 or lies
            below, another one if its accuracy is higher.
        chance: p-value of the difference to random, two-sided.
        corrected: the same, corrected for all the comparisons of a page (`correct`).
        over_full: paired difference to the uncompressed model.
        agreement: share of answers that are the ones of the uncompressed model, leaving aside case and white space.
        length: mean tokens of an answer.
        cut: share of answers that were stopped by their length.
        visual: visual tokens per question in a decoder layer, the mean over layers.
        entries: KV entries per head after the prompt.
        kv_bytes: bytes of the KV cache per question after the prompt.
        kv_share: of what an uncompressed cache takes.
        prefill, decode: time over that of the uncompressed model; None where it was not measured.
        prefill_range, decode_range: lowest and highest of the rounds.
        types: question type -> accuracy.
        types_over_random: question type -> accuracy minus that of random.
    """

    method: str
    stage: str
    ratio: float | None
    knobs: str = "{}"
    seeds: int = 1
    control: bool = False
    note: str = ""
    marked: bool = True
    groups: int = 0
    accuracy: Interval | None = None
    spread: tuple[float, float] | None = None
    over: dict[str, Interval] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    chance: float | None = None
    corrected: float | None = None
    over_full: Interval | None = None
    agreement: float | None = None
    length: float | None = None
    cut: float | None = None
    visual: float | None = None
    entries: float | None = None
    kv_bytes: float | None = None
    kv_share: float | None = None
    prefill: float | None = None
    decode: float | None = None
    prefill_range: tuple[float, float] | None = None
    decode_range: tuple[float, float] | None = None
    types: dict[str, float] = field(default_factory=dict)
    types_over_random: dict[str, float] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """Which controls it has: "vision", "cache" or "both"."""
        stages = set(self.stage.split("+"))
        visual = bool({"vision", "decoder"} & stages)
        return "both" if visual and "cache" in stages else "vision" if visual else "cache"

    @property
    def beats(self) -> bool:
        """The interval of the difference to random lies above 0, and no other control is better; `ENOUGH` images."""
        return self.compared and not self.lost

    @property
    def sure(self) -> bool:
        """It beats its controls, and random even after the correction for all the comparisons of the page."""
        return self.beats and self.corrected is not None and self.corrected <= FALSE

    @property
    def compared(self) -> bool:
        """Whether it could be marked: it is no control, has a random one beside it, and `ENOUGH` images."""
        return self.marked and not self.control and self.chance is not None and self.groups >= ENOUGH


@dataclass
class Results:
    """The rows of one sweep, and what they were measured with.

    Attributes:
        settings: model, data, protocol, number of questions and so on.
        metric: name of the score.
        machine: hardware and versions.
        clock: of the times.
        types: question type -> number of questions.
        left_out: methods that "all" leaves out, with the reason.
        constant: the answer that scores best where the same one is given to every question.
        floor: its score.
        rows: the uncompressed model first.
        label: on a page with others of this title, the settings in which they differ.
    """

    settings: dict[str, Any]
    metric: str
    machine: dict[str, Any]
    clock: str
    types: dict[str, int]
    left_out: dict[str, str]
    constant: str
    floor: float
    rows: list[Row]
    label: str = ""

    def write(self, folder: Path) -> None:
        """results.json, leaderboard.csv, leaderboard.md and, where a method could be done, pareto.png."""
        from hf_compress.evaluate import figures, tables

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

    @classmethod
    def read(cls, folder: Path) -> Results:
        """What `write` wrote.

        Raises:
            ValueError: there are no results in the folder, or they cannot be read.
        """
        path = folder / "results.json"
        if not path.exists():
            raise ValueError(f"{str(folder)!r} holds no results.json; run `hf-compress eval --out {folder}` first")
        remedy = f"run `hf-compress eval --out {folder}` again: it keeps the answers and writes the results anew"
        data = read_json(path, remedy)
        try:
            return cls(**{**data, "rows": [Row(**row) for row in data["rows"]]})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{str(path)!r} is of another version ({error}); {remedy}") from error

    @property
    def title(self) -> str:
        """Model and data, the protocol unless it is the usual one, and the label."""
        protocol, label = self.settings["protocol"], self.label and f" ({self.label})"
        name = f"{self.settings['model']} on {self.settings['data']}" + f", {protocol}" * (protocol != "one-turn")
        return name + label

    def overview(self) -> str:
        """Accuracy of every method at every ratio, as Markdown."""
        from hf_compress.evaluate import tables

        return f"{tables.overview(self)}\n{tables.LEGEND}\n{tables.by_chance([self])}\n"

    def __str__(self) -> str:
        return self.overview()


def tell_apart(results: Sequence[Results]) -> None:
    """Label those of one title by the settings in which they differ: other weights are not the same model."""
    alike: dict[str, list[Results]] = {}
    for one in results:
        alike.setdefault(one.title, []).append(one)
    for group in alike.values():
        names = list(dict.fromkeys(name for one in group for name in one.settings))
        differ = [n for n in names if any(one.settings.get(n) != group[0].settings.get(n) for one in group)]
        for one in group:
            one.label = ", ".join(f"{name} {one.settings.get(name)}" for name in differ)


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
    controls = {name for group in CONTROLS.values() for name in group.values()}
    controls |= {name for run in names if run.method != BARE for name in controls_of(names[run]).values()}
    out = []
    for key in sorted(together, key=lambda k: (k[1] is not None, k[1] or 0.0)):
        members = together[key]
        first = members[0]
        row = Row(key[0], first.stage, first.ratio, _knobs(first), len(members))
        row.control = bool({key[0], first.method} & controls)
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
    for control, name in controls_of(row.method).items():
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


def correct(results: Sequence[Results]) -> None:
    """Set what is `corrected` of every row, for the number of comparisons with random in all these results together.

    The false discovery rate is controlled (Benjamini & Hochberg 1995): of the methods that are marked then, no more
    than `FALSE` are expected to be no better than random.
    """
    from scipy.stats import false_discovery_control

    rows = [row for one in results for row in one.rows if row.compared]
    if rows:
        for row, value in zip(rows, false_discovery_control([row.chance for row in rows])):
            row.corrected = float(value)


def _minus(a: Iterable[float], b: Iterable[float]) -> list[float]:
    return [x - y for x, y in zip(a, b)]


def _by_type(values: Sequence[float], types: Sequence[str]) -> dict[str, float]:
    parts: dict[str, list[float]] = {}
    for value, kind in zip(values, types):
        parts.setdefault(kind, []).append(value)
    return {kind: fmean(part) for kind, part in parts.items() if kind}
