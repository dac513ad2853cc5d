"""The main job: the embedded trained model, compressed by many methods, asked about held-out images.

    from hf_compress.demo.main_job import Settings, run

    result = run(Settings(out="."))

It prints a table (budgets asked for and met, accuracy with its interval, prefill time against the uncompressed model
and against a natively short prompt), writes a picture of what each method kept and a JSON file of all numbers, and
says which methods do not beat what is drawn at random at the same budgets. Everything but the times is the same in
every run.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import hf_compress
from hf_compress import budget, registry
from hf_compress.bench.models import Subject
from hf_compress.bench.timing import Candidate, Ratio, Spread, interleave, record
from hf_compress.demo.dataset import grey_image, load_scenes
from hf_compress.evaluate.intervals import CONFIDENCE
from hf_compress.evaluate.models import DEMO_KNOBS
from hf_compress.evaluate.plan import controls_of
from hf_compress.evaluate.rows import ENOUGH
from hf_compress.evaluate.scoring import Score, answer, difference, encode, exact_match, score
from hf_compress.saving import prepare, write_json
from hf_compress.screen import Stages, Table
from hf_compress.show import compare

METHODS = ("random", "uniform", "downsample", "fastervlm", "visionzip", "divprune", "tome", "kvrandom", "snapkv")
RATIOS = (0.89,)
FULL_METHODS = (*METHODS[:7], "fastv", "pyramiddrop", *METHODS[7:], "random+kvrandom", "divprune+snapkv")
FULL_RATIOS = (0.5, 0.75, 0.89)
FULL_IMAGES = 40
SHOWN = 4  # images in the picture
SPEED = 15  # questions a second on one core, timing included
ROUNDS = 5  # timed rounds per budget
HEADS = ("visual\ntokens", "KV\nentries", "right\n%", "95 %\nrange", "time %\n/full", "time %\n/short")


@dataclass
class Settings:
    """What the job does.

    Args:
        images: held-out scenes.
        questions: questions per scene, 1 to 20.
        batch_size: questions per call of `generate`.
        methods: names of `hf_compress.methods()`; a plus sign composes, as in "divprune+snapkv".
        ratios: fractions removed, each with 0 <= ratio < 1.
        out: folder for the picture and the numbers; made if it does not exist.
    """

    images: int = 20
    questions: int = 4
    batch_size: int = 16
    methods: Sequence[str] = METHODS
    ratios: Sequence[float] = RATIOS
    out: str | Path = "."

    @classmethod
    def full(cls, **changes: Any) -> Settings:
        """All stages at three ratios, twice as many images; `changes` are attributes of other values."""
        return cls(**{"images": FULL_IMAGES, "methods": FULL_METHODS, "ratios": FULL_RATIOS, **changes})

    @property
    def asked(self) -> int:
        """Questions that are answered in all: by the bare model, about grey images, and by every method."""
        budgets = len(set(self.methods)) * len(set(self.ratios))
        return (2 + budgets) * self.images * self.questions

    def check(self) -> None:
        """Raises ValueError where a value makes no sense."""
        for name, most in (("images", None), ("questions", 20), ("batch_size", None)):
            value = getattr(self, name)
            if value < 1 or (most and value > most):
                raise ValueError(f"{name}={value}: choose 1 {'or more' if most is None else f'to {most}'}")
        if not self.methods or not self.ratios:
            raise ValueError(f"methods={list(self.methods)}, ratios={list(self.ratios)}: name at least one of each")
        for name in self.methods:
            registry.check_stages(registry.get(part) for part in name.split("+"))
        for ratio in self.ratios:
            budget.check_ratio(ratio)


@dataclass
class Row:
    """One line of the table; counts are means over the samples and decoder layers of the probe batch.

    Attributes:
        method: "divprune+snapkv" is a composition; "none" and "grey image" are the bare model.
        stage: of its parts, joined likewise.
        ratio: fraction removed that was asked for; None for the bare model.
        visual: visual tokens per image in a decoder layer.
        entries: KV entries per head after the prompt.
        score: exact match; None if the budget is out of reach.
        correct: right or wrong, per question.
        against_full: prefill time over that of the bare model on the whole prompt, pair by pair.
        against_native: prefill time over that of the bare model on a prompt that is this short by nature, likewise.
        note: why there are no numbers.
    """

    method: str
    stage: str
    ratio: float | None
    visual: float = 0.0
    entries: float = 0.0
    score: Score | None = None
    correct: list[bool] = field(default_factory=list)
    against_full: Spread | None = None
    against_native: Spread | None = None
    note: str = ""


@dataclass
class Result:
    """What `run` found: the rows of the table, the closing sentences, and the files written."""

    rows: list[Row]
    sentences: list[str]
    files: list[Path]


@dataclass
class Job:
    """The model, the questions, and a small probe batch on which tokens are counted and drawn."""

    settings: Settings
    model: Any
    processor: Any
    data: Any
    advance: Callable[[int], None]

    def __post_init__(self) -> None:
        starts = range(0, len(self.data), self.settings.questions)
        rows = [self.data[i] for i in list(starts)[:SHOWN]]
        self.images, self.asked = [r["image"] for r in rows], [r["question"] for r in rows]
        self.probe = encode(self.processor, self.images, self.asked)
        self.placeholder = self.model.config.image_token_id
        self.tokens = int((self.probe["input_ids"][0] == self.placeholder).sum())
        side = round(self.tokens**0.5)
        self.grid = (side, side)
        self.references = [r["answer"] for r in self.data.select_columns(["answer"])]
        self.groups = [i // self.settings.questions for i in range(len(self.data))]
        one = encode(self.processor, self.images[:1], self.asked[:1])
        vision = {"pixel_values": one["pixel_values"]}
        self.subject = Subject("demo", self.model, one["input_ids"], vision, self.placeholder)
        self.kept: dict[str, list[list[int]]] = {}
        self.owners: dict[str, list[list[int]]] = {}
        self.shown: dict[str, Row] = {}

    def ask(self, model: Any, data: Any = None) -> list[bool]:
        """Right or wrong, per question."""
        data = self.data if data is None else data
        said = answer(model, self.processor, data, self.settings.batch_size, self.advance)
        return exact_match(said, self.references)

    def bare(self) -> list[Row]:
        """The uncompressed model, with the images and with grey ones (what can be guessed)."""
        prompt = float(self.probe["attention_mask"].sum(1).float().mean())
        rows = []
        grey = grey_image()
        blind = [{"image": grey, "question": r["question"]} for r in self.data.select_columns(["question"])]
        for name, data in (("none", None), ("grey image", blind)):
            correct = self.ask(self.model, data)
            rows.append(Row(name, "", None, self.tokens, prompt, score(correct, groups=self.groups), correct))
        return rows

    def measure(self, name: str, ratio: float) -> Row:
        """One method at one ratio."""
        parts = name.split("+")
        row = Row(name, "+".join(registry.get(p).stage for p in parts), ratio)
        model = self.subject.twin()
        knobs = {k: v for part in parts for k, v in DEMO_KNOBS.get(part, {}).items()}
        try:
            model.compress(parts, ratio=ratio, **knobs)
        except ValueError as error:
            row.note = str(error)
            self.advance(len(self.data))
            return row
        row.correct = self.ask(model)
        row.score = score(row.correct, groups=self.groups)
        with torch.inference_mode():
            model(**self.probe, logits_to_keep=1)
            self._count(row, model.compression.last)
            self._time(row, model)
        return row

    def _count(self, row: Row, last: Any) -> None:
        """Realised tokens, and which visual ones reach the last layer."""
        ids = self.probe["input_ids"]
        layers = torch.tensor(last.layer_tokens, dtype=torch.float64)
        text = torch.tensor(last.prompt_tokens, dtype=torch.float64) - self.tokens
        row.visual = float((layers - text).mean())
        row.entries = float(torch.tensor(last.cache_tokens, dtype=torch.float64).mean())
        if "cache" in row.stage:
            return
        first = (ids == self.placeholder).long().argmax(1).tolist()
        alive = [[i - f for i in rows if 0 <= i - f < self.tokens] for f, rows in zip(first, last.layer_index[-1])]
        self.kept[row.method], self.shown[row.method] = alive, row
        self.owners[row.method] = [
            [owner if owner in stay else -1 for owner in sample[0]]
            for sample, stay in zip(last.visual_owners, map(set, alive))
        ]

    def _time(self, row: Row, model: Any) -> None:
        """Prefill of the language model, batch 1, the tower run beforehand: whole, compressed and natively short."""
        subject = self.subject
        gone = round(self.tokens - row.visual)
        visual = (subject.ids[0] == self.placeholder).nonzero().flatten().tolist()
        dropped = set(visual[len(visual) - gone :])
        short = [i for i in range(subject.ids.shape[1]) if i not in dropped]
        plain = subject.model
        whole, brief = subject.prompt(plain), subject.prompt(plain, short)
        ours: dict[str, Any] = {}  # encoded anew in every round: a compression decides once per encoding
        seconds = interleave(
            {
                "full": Candidate(lambda: plain(**whole)),
                "ours": Candidate(lambda: model(**ours), before=lambda: ours.update(subject.prompt(model))),
                "native": Candidate(lambda: plain(**brief)),
            },
            rounds=ROUNDS,
        )
        row.against_full = Ratio.of(seconds["ours"], seconds["full"]).pairs
        row.against_native = Ratio.of(seconds["ours"], seconds["native"]).pairs

    def draw(self, path: Path) -> Path | None:
        """The picture: what every method kept at the largest ratio that it reached."""
        if not self.kept:
            return None
        n = self.settings.questions
        kept, notes, owners = {}, {}, {}
        for name, row in self.shown.items():
            title = f"{name}\nratio {row.ratio:g}" + (", last layer" if "decoder" in row.stage else "")
            kept[title], owners[title] = self.kept[name], self.owners[name]
            notes[title] = [f"{sum(row.correct[i * n : (i + 1) * n])} of {n} right" for i in range(len(self.images))]
        titles = [textwrap.fill(question.replace(" ?", "\u00a0?"), 24) for question in self.asked]  # no "?" on its own
        return compare(self.images, kept, self.grid, titles, path, notes=notes, owners=owners)


def run(settings: Settings | None = None, console: Console | None = None) -> Result:
    """The whole job. Prints to `console`, writes `hf-compress-demo.png` and `.json` into `settings.out`.

    Raises:
        ValueError: a setting makes no sense, or nothing can be written into `out`; nothing has been done then.
    """
    settings, console = settings or Settings(), console or Console()
    settings.check()
    out = Path(settings.out)
    prepare(out)
    torch.manual_seed(0)
    plan = [(name, ratio) for ratio in sorted(set(settings.ratios)) for name in dict.fromkeys(settings.methods)]
    console.print(duration(settings), highlight=False)
    with Stages(console, settings.asked, "questions") as stages:
        stages.begin("load the model")
        model, processor = hf_compress.load_demo("llava")
        data = load_scenes("test", settings.images, settings.questions)
        job = Job(settings, model, processor, data, stages.advance)
        stages.begin("uncompressed")
        rows = job.bare()
        for name, ratio in plan:
            stages.begin(f"{name} {ratio:g}")
            rows.append(job.measure(name, ratio))
    table(rows, settings).print(console)
    console.print(CAPTION, style="italic", highlight=False, markup=False)
    files = [path for path in (job.draw(out / "hf-compress-demo.png"),) if path]
    files.append(_write(out / "hf-compress-demo.json", rows, settings))
    for path in files:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    sentences = conclusions(rows, job.groups)
    for sentence in sentences:
        console.print(sentence, highlight=False, markup=False)
    return Result(rows, sentences, files)


def duration(settings: Settings) -> str:
    """What will be asked, and about how long that takes."""
    seconds = max(10, round(settings.asked / SPEED, -1))
    time = f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"
    return f"{settings.asked} questions, about {time} on one core of a laptop. Nothing is downloaded."


CAPTION = (
    "visual tokens: mean per image over the decoder layers. KV entries: per head, after the prompt. Right: exact "
    "match, interval over the images (those of docs/evidence.md are about 100). Time: prefill of the language "
    "model, batch 1, over that of the bare model on the full prompt and on a natively short one of as many tokens; "
    "median of paired rounds ± half of what lies between their quartiles."
)


def table(rows: Sequence[Row], settings: Settings) -> Table:
    """The rows as a table, one section per ratio; `CAPTION` explains it."""
    total = settings.images * settings.questions
    title = f"Embedded LLaVA on {settings.images} held-out images, {total} questions"
    rules = [i for i in range(1, len(rows)) if rows[i].ratio != rows[i - 1].ratio]
    out = Table(("method", "stage", "ratio", *HEADS), title=title, left=2, rules=rules)
    full = rows[0]
    for row in rows:
        names = [row.method, row.stage, "" if row.ratio is None else f"{row.ratio:g}"]
        if row.score is None:
            out.rows.append([*names, *["-"] * len(HEADS)])
            continue
        visual, entries = f"{row.visual:.0f}", f"{row.entries:.0f}"
        if row.ratio is not None:
            visual, entries = f"{full.visual:.0f}→{visual}", f"{full.entries:.0f}→{entries}"
        times = [_percent(t) for t in (row.against_full, row.against_native)]
        s = row.score
        interval = f"{100 * s.low:.0f}–{100 * s.high:.0f}"
        out.rows.append([*names, visual, entries, f"{100 * s.accuracy:.1f}", interval, *times])
    return out


def _percent(ratio: Spread | None) -> str:
    return "" if ratio is None else f"{100 * ratio.median:.0f}±{50 * (ratio.high - ratio.low):.0f}"


def conclusions(rows: Sequence[Row], images: Sequence[int]) -> list[str]:
    """What the numbers allow to say at the largest ratio, paired with what is drawn at random at the same budgets.

    Vision and decoder methods have random tokens beside them, cache methods random entries, compositions both.

    Args:
        images: the image of every question.
    """
    ratio = max((row.ratio for row in rows if row.ratio is not None), default=None)
    hardest = {row.method: row for row in rows if row.ratio == ratio}
    sentences = [f"Out of reach: {row.method} at {row.note}." for row in hardest.values() if row.score is None]
    rivals: dict[str, list[Row]] = {}
    for row in hardest.values():
        control = controls_of(row.method).get("random")
        if row.score and control is not None:
            rivals.setdefault(control, []).append(row)
    count = len(set(images))
    if count < ENOUGH:
        return [*sentences, f"Of {count} images no method is called better or worse; ask about {ENOUGH} or more."]
    compared = 0
    for control, mine in rivals.items():
        base = hardest.get(control)
        if base is None or base.score is None:
            names = ", ".join(row.method for row in mine)
            sentences.append(f"No comparison of {names}: {control!r}, the control, is not among the methods.")
            continue
        compared += len(mine)
        sentences.append(f"Against {control} at ratio {ratio:g}: {_verdicts(mine, base, images)}.")
    if compared:
        sentences.append(
            f"Paired differences, {CONFIDENCE:.0%} intervals over {count} images, each method on its own: of "
            f"{compared} comparisons chance alone would call about {compared * (1 - CONFIDENCE):.1f} different."
        )
    return sentences


def _verdicts(rows: Sequence[Row], base: Row, images: Sequence[int]) -> str:
    found: dict[str, list[str]] = {"more accurate": [], "not distinguishable": [], "less accurate": []}
    for row in rows:
        mean, low, high = difference(row.correct, base.correct, images)
        verdict = "more accurate" if low > 0 else "less accurate" if high < 0 else "not distinguishable"
        found[verdict].append(f"{row.method} ({mean:+.1%} [{low:+.1%}, {high:+.1%}])")
    return "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in found.items() if names)


def _write(path: Path, rows: Sequence[Row], settings: Settings) -> Path:
    """All numbers with hardware and versions."""
    data = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items() if k != "out"},
        "machine": record("cpu"),
        "rows": [asdict(row) for row in rows],
    }
    write_json(path, data)
    return path
