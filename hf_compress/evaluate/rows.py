"""The rows of a leaderboard, and what several boards have to do with each other on one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_compress.saving import read_json

if TYPE_CHECKING:
    from typing_extensions import Self

Interval = tuple[float, float, float]  # mean, low, high
ENOUGH = 20  # images or texts from which on a method is marked: intervals of fewer do not hold in all cases
FALSE = 0.05  # share of false ones among the marks that are corrected for their number
ASKED = ("questions", "fingerprint", "skipped", "batch_size")  # settings that a sweep may differ in that takes times
OWN = ("accuracy", "spread", "length", "cut", "visual", "entries", "kv_bytes", "types")  # whatever stands beside a row


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
class Board:
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
        timed: what the times were taken with, where that was a sweep of its own: "machine", "clock", "questions".
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
    timed: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Model and data, the protocol unless it is the usual one, and the label."""
        protocol, label = self.settings["protocol"], self.label and f" ({self.label})"
        name = f"{self.settings['model']} on {self.settings['data']}" + f", {protocol}" * (protocol != "one-turn")
        return name + label

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What `Results.write` wrote.

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


def join(results: Sequence[Board]) -> list[Board]:
    """Boards of equal settings and metric as one: what was judged later stands beside what was judged before.

    A row of several boards counts once. It has to be the same in all of them, and there are some that all have: the
    uncompressed model and the controls, which show that methods of different boards may be compared, though they were
    judged on another processor. A row that was refused gives way to one that was answered.

    Raises:
        ValueError: boards of equal settings differ in a row.
    """
    out: list[Board] = []
    for one in results:
        same = next((n for n, other in enumerate(out) if _comparable(other, one)), None)
        if same is None:
            out.append(one)
        else:
            out[same] = _beside(out[same], one)
    return out


def _comparable(a: Board, b: Board) -> bool:
    return (a.settings, a.metric, a.clock) == (b.settings, b.metric, b.clock)


def _beside(first: Board, later: Board) -> Board:
    rows = {(row.method, row.ratio): row for row in first.rows}
    for row in later.rows:
        before = rows.setdefault((row.method, row.ratio), row)
        if before.accuracy is None and row.accuracy is not None:
            rows[row.method, row.ratio] = row
        elif row.accuracy is not None:
            differ = [k for k in ("knobs", "seeds", *OWN) if getattr(before, k) != getattr(row, k)]
            if differ:
                raise ValueError(
                    f"{first.title}: two folders of the same settings differ in {', '.join(differ)} of "
                    f"{row.method!r} at ratio {row.ratio}; judge both in one folder, by one state of the code"
                )
    judged = {row.method for row in rows.values()}
    left_out = {name: why for name, why in {**later.left_out, **first.left_out}.items() if name not in judged}
    ordered = sorted(rows.values(), key=lambda row: row.ratio or 0.0)
    return replace(first, rows=ordered, left_out=left_out, machine=_both(first.machine, later.machine))


def _both(first: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Hardware and versions, with both where they differ."""
    parts = {k: str(v).split(" and ") for k, v in first.items()}
    more = {k: later[k] for k, known in parts.items() if k in later and str(later[k]) not in known}
    return {k: f"{v} and {more[k]}" if k in more else v for k, v in first.items()}


def take_times(results: Sequence[Board], sweeps: Sequence[Board]) -> None:
    """Give the rows the times of `sweeps`: of few questions, taken while nothing else ran.

    Raises:
        ValueError: a sweep has no times, or no board is of its model, data and settings, or the board has times.
    """
    for one in sweeps:
        found = {(row.method, row.ratio, row.knobs): row for row in one.rows if row.prefill is not None}
        if not found:
            raise ValueError(f"times={one.title!r} holds no times; judge without --no-time")
        board = next((b for b in results if _but_asked(b) == _but_asked(one)), None)
        if board is None:
            raise ValueError(f"times={one.title!r}: no other folder is of this model, these data and settings")
        if any(row.prefill is not None for row in board.rows):
            raise ValueError(f"times={one.title!r}: {board.title} has times already; name one folder of times for each")
        for row in board.rows:
            if taken := found.get((row.method, row.ratio, row.knobs)):
                row.prefill, row.prefill_range = taken.prefill, taken.prefill_range
                row.decode, row.decode_range = taken.decode, taken.decode_range
        board.timed = {"machine": one.machine, "clock": one.clock, "questions": one.settings["questions"]}


def _but_asked(one: Board) -> dict[str, Any]:
    return {name: value for name, value in one.settings.items() if name not in ASKED}


def tell_apart(results: Sequence[Board]) -> None:
    """Label those of one title by the settings in which they differ: other weights are not the same model."""
    alike: dict[str, list[Board]] = {}
    for one in results:
        alike.setdefault(one.title, []).append(one)
    for group in alike.values():
        names = list(dict.fromkeys(name for one in group for name in one.settings))
        differ = [n for n in names if any(one.settings.get(n) != group[0].settings.get(n) for one in group)]
        for one in group:
            one.label = ", ".join(f"{name} {one.settings.get(name)}" for name in differ)


def correct(results: Sequence[Board]) -> None:
    """Set what is `corrected` of every row, for the number of comparisons with random in all these results together.

    The false discovery rate is controlled (Benjamini & Hochberg 1995): of the methods that are marked then, no more
    than `FALSE` are expected to be no better than random.
    """
    from scipy.stats import false_discovery_control

    rows = [row for one in results for row in one.rows if row.compared]
    if rows:
        for row, value in zip(rows, false_discovery_control([row.chance for row in rows])):
            row.corrected = float(value)
