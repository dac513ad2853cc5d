"""Parity: a compressed prefill against the bare model on a prompt that was as short from the start.

Both sides get the features of the vision tower ready-made, so the tower is in neither time. The tower runs before every
timed run, because the decision of the vision stage is remembered per run of the tower: it falls into the timed part.

What "native" is, per stage:

- vision: the bare model on the kept rows of the prompt; all layers are equally short.
- decoder: layers hold different numbers of rows, which no bare model does. Native is then the mean over the layers of
  the time of a whole bare prefill of as many rows as the layer held: a layer-weighted sum of bare prefills, in which
  embeddings, head and Python count once, as they do in ours.
- cache: the prompt is not shorter, so native is the full prefill, and the ratio less one is the cost of scoring and
  evicting. The gain is in the steps after it.

Two limits, on two parts of the same time: what is left of the prefill once scoring and gathering are taken out may cost
so much of native (`LIMITS`), and scoring and gathering so much of the full prefill (`limits.py`), which they depend on:
they read all tokens. With a quarter of the tokens left, 2 % of a full prefill is about 8 % of the short one, so a limit
on the sum would say nothing about either. The sum is printed too.

A decode step is compared in the same way: native is a step of the bare model whose cache holds as many entries,
weighted over layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import linear_regression, median
from typing import Any

import torch

from hf_compress.bench.limits import scoring_limit
from hf_compress.bench.models import Subject, stage
from hf_compress.bench.timing import CLOCKS, Candidate, Ratio, Stopwatch, interleave, weighted
from hf_compress.engine import evict, forward
from hf_compress.engine.evict import CachePolicy
from hf_compress.engine.forward import LanguageModel
from hf_compress.engine.layers import AttentionExit, LayerEntry
from hf_compress.engine.outermost import Outermost
from hf_compress.engine.visual import VisualPrompt
from hf_compress.patches.versions import cache_name, cache_of

LIMITS = {"vision": 1.05, "decoder": 1.10}  # prefill without scoring, compressed over native of equal length

# Functions of the engine that are timed on the host: those that score and gather, and the hooks around them.
PARTS: tuple[tuple[Any, str, str], ...] = (
    (VisualPrompt, "locate", "locate"),  # finds the images and takes the decision of the vision stage
    (forward, "cut", "cut"),
    (LayerEntry, "_rewrite", "drop"),
    (CachePolicy, "after_prompt", "evict"),
    (evict, "attention_and_sums", "attend"),  # attention that is read on its way, in place of the kernel
    (LanguageModel, "leave", "fill"),
)
KERNEL = ((torch.nn.functional, "scaled_dot_product_attention", "kernel"),)
HOOKS: tuple[tuple[Any, str, str], ...] = (
    (Outermost, "_noted", "enter"),
    (LanguageModel, "enter", "enter_decoder"),
    (LanguageModel, "record", "record"),
    (LayerEntry, "__call__", "layer"),
    (AttentionExit, "__call__", "attention"),
)


@dataclass
class Row:
    """One method at one ratio. Times are medians in milliseconds, shares are fractions of the full prefill.

    Attributes:
        tokens: rows per decoder layer, mean over layers; `entries`: KV cache entries per head after the prompt.
        prefill: ours over native of equal length.
        scoring: host time in the functions that score and gather; `hooks`: in all functions of the package. Where it
            attends itself, what attention takes in the bare prefill is taken off both.
        excess: ours less native: what compression really costs, hidden effects included.
        parts: `scoring` and `hooks` by function; `layer`, `enter_decoder` and `attention` contain the first ones.
        slope: what one more row costs our prefill, over what it costs the bare one; fitted over all ratios.
        decode: a decode step, ours over native at equal cache length, and native_step_ms, step_ms.
        note: why there are no numbers, if there are none.
    """

    model: str
    method: str
    stage: str
    ratio: float
    tokens: float = 0.0
    entries: float = 0.0
    full_ms: float = 0.0
    native_ms: float = 0.0
    ours_ms: float = 0.0
    prefill: Ratio | None = None
    scoring: float = 0.0
    hooks: float = 0.0
    excess: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    native_step_ms: float = 0.0
    step_ms: float = 0.0
    decode: Ratio | None = None
    slope: Ratio | None = None
    note: str = ""

    @property
    def short(self) -> float | None:
        """Ours over native without the time of scoring and gathering."""
        if self.prefill is None:
            return None
        return self.prefill.pairs.median - self.scoring * self.full_ms / self.native_ms

    @property
    def failures(self) -> list[str]:
        """Which limits are missed."""
        out = []
        limit = LIMITS.get(self.stage)
        if self.short is not None and limit is not None and self.short > limit:
            out.append("prefill")
        scoring = scoring_limit(self.model, self.method, self.stage)
        if self.prefill is not None and scoring is not None and self.scoring > scoring:
            out.append("scoring")
        return out

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"short": self.short, "failures": self.failures}


@contextmanager
def engine_watch(
    clock: Callable[[], float], parts: Sequence[tuple[Any, str, str]] = PARTS + HOOKS
) -> Iterator[Stopwatch]:
    """Time these functions of the engine inside the block, for models that are compressed inside it."""
    watch, was = Stopwatch(clock), []
    for owner, attribute, name in parts:
        was.append((owner, attribute, owner.__dict__[attribute]))
        setattr(owner, attribute, watch.wrap(name, owner.__dict__[attribute]))
    try:
        yield watch
    finally:
        for owner, attribute, function in was:
            setattr(owner, attribute, function)


class Ours:
    """One compressed model of a comparison, over the parameters of the bare one.

    Raises:
        ValueError: the method cannot do this ratio on this model.
    """

    def __init__(self, subject: Subject, method: str, ratio: float, watch: Stopwatch):
        self.subject, self.ratio, self.watch = subject, ratio, watch
        self.model = subject.compressed(method, ratio)
        self.totals: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.model(**subject.prompt(self.model))
        last = self.model.compression.last
        self.rows = [layer[0] for layer in last.layer_index]
        self.entries = [layer[0] for layer in last.cache_tokens]
        evicts = self.model.compression.context.cache_method
        self.holds = evicts is not None and evicts.policy == "hold"

    def candidate(self) -> Candidate:
        """Its prefill."""
        given: dict[str, Any] = {}

        def before() -> None:
            given.update(self.subject.prompt(self.model))
            self.watch.reset()

        def after() -> None:
            self.totals.append(self.watch.total)
            self.parts.append(self.watch.parts)

        return Candidate(lambda: self.model(**given), before, after)


def prefill_candidate(subject: Subject, rows: Sequence[int] | None) -> Candidate:
    """A bare prefill of some rows of the prompt."""
    given: dict[str, Any] = {}

    def before() -> None:
        given.clear()
        given.update(subject.prompt(subject.model, rows))

    return Candidate(lambda: subject.model(**given), before)


class Bare:
    """The bare prefill of the whole prompt, and the seconds of attention in each round of it.

    Args:
        kernel: a stopwatch on `KERNEL`.
    """

    def __init__(self, subject: Subject, kernel: Stopwatch):
        self.prefill, self.kernel, self.attention = prefill_candidate(subject, None), kernel, list[float]()

    def candidate(self) -> Candidate:
        """The prefill."""
        return Candidate(self.prefill.run, self._before, lambda: self.attention.append(self.kernel.total))

    def _before(self) -> None:
        assert self.prefill.before is not None
        self.prefill.before()
        self.kernel.reset()

    def spared(self, rounds: Sequence[dict[str, float]]) -> list[float]:
        """Seconds of the kernel that a compressed prefill went without in each of its rounds, given their parts."""
        return [took if "attend" in parts else 0.0 for took, parts in zip(self.attention, rounds)]


def step_candidate(subject: Subject, model: Any, rows: Sequence[int] | None, hold: bool) -> Candidate:
    """One decode step after a prefill; with `hold` the cache is cut back after every step, else it grows."""
    cache = cache_of(model(**subject.prompt(model, rows)))
    length, name = cache.get_seq_length(), cache_name(model)
    token = subject.ids[:, -1:]

    def before() -> None:
        if hold and cache.get_seq_length() > length:
            cache.crop(-1)
        model_position = torch.full_like(token, cache.get_seq_length())
        given.update({"input_ids": token, "position_ids": model_position, name: cache})

    given: dict[str, Any] = {}
    return Candidate(lambda: model(**given), before)


def shares(counts: Sequence[int]) -> dict[int, float]:
    """{count: share of the layers that have it}."""
    return {n: times / len(counts) for n, times in Counter(counts).items()}


@torch.no_grad()
def measure(
    subject: Subject,
    method: str,
    ratios: Sequence[float],
    *,
    rounds: int = 12,
    warmup: int = 2,
    decode: bool = True,
    clock: str = "wall",
) -> list[Row]:
    """All rows of one method; its ratios, their native runs and the full prefill take turns.

    Args:
        rounds, warmup: see `timing.interleave`.
        decode: time decode steps too, twice as many rounds.
        clock: a key of `timing.CLOCKS`.
    """
    options = {"rounds": rounds, "warmup": warmup, "device": subject.device, "clock": CLOCKS[clock]}
    table = {r: Row(subject.name, method, stage(method), r) for r in ratios}
    with engine_watch(CLOCKS[clock]) as watch, engine_watch(CLOCKS[clock], KERNEL) as kernel:
        rivals = []
        for r in ratios:
            try:
                rivals.append(Ours(subject, method, r, watch))
            except ValueError as refused:
                table[r].note = str(refused)
        if rivals:
            _prefills(subject, rivals, Bare(subject, kernel), table, options)
    if decode and rivals:
        _steps(subject, method, rivals, table, options | {"rounds": 2 * rounds})
    return list(table.values())


def _prefills(
    subject: Subject, rivals: list[Ours], bare: Bare, table: dict[float, Row], options: dict[str, Any]
) -> None:
    whole = subject.ids.shape[1]
    candidates: dict[Any, Candidate] = {whole: bare.candidate()}
    for rival in rivals:
        candidates["ours", rival.ratio] = rival.candidate()
        for rows in rival.rows:
            if len(rows) not in candidates:
                candidates[len(rows)] = prefill_candidate(subject, rows)
    seconds = interleave(candidates, **options)
    full = median(seconds[whole])
    for rival in rivals:
        row, ours = table[rival.ratio], seconds["ours", rival.ratio]
        counts = [len(rows) for rows in rival.rows]
        native = weighted(seconds, shares(counts))
        row.tokens, row.entries = sum(counts) / len(counts), sum(rival.entries) / len(rival.entries)
        row.full_ms, row.native_ms, row.ours_ms = (1e3 * median(s) for s in (seconds[whole], native, ours))
        row.prefill = Ratio.of(ours, native)
        row.excess = median(a - b for a, b in zip(ours, native)) / full
        spared = bare.spared(rival.parts)
        row.hooks = median(a - b for a, b in zip(rival.totals, spared)) / full
        names = sorted({name for parts in rival.parts for name in parts})
        row.parts = {name: median(parts.get(name, 0.0) for parts in rival.parts) / full for name in names}
        inner = [name for _, _, name in PARTS]
        inner_s = [sum(parts.get(name, 0.0) for name in inner) for parts in rival.parts]
        row.scoring = median(a - b for a, b in zip(inner_s, spared)) / full
    slope = _slope(rivals, seconds)
    for rival in rivals:
        table[rival.ratio].slope = slope


def _slope(rivals: list[Ours], seconds: dict[Any, list[float]]) -> Ratio | None:
    """What one more row costs us over what it costs the bare model, round by round; None below three lengths."""
    lengths = [sum(len(rows) for rows in rival.rows) / len(rival.rows) for rival in rivals]
    if len(set(lengths)) < 3:
        return None
    ours = [seconds["ours", rival.ratio] for rival in rivals]
    native = [weighted(seconds, shares([len(rows) for rows in rival.rows])) for rival in rivals]
    return Ratio.of(*([linear_regression(lengths, round_).slope for round_ in zip(*s)] for s in (ours, native)))


def _steps(subject: Subject, method: str, rivals: list[Ours], table: dict[float, Row], options: dict[str, Any]) -> None:
    """Models compressed once more, outside of the stopwatch: a step is short."""
    whole = subject.ids.shape[1]
    candidates: dict[Any, Candidate] = {}
    for rival in rivals:
        model = subject.compressed(method, rival.ratio)
        candidates["ours", rival.ratio] = step_candidate(subject, model, None, hold=False)
        for n in map(round, rival.entries):
            if n not in candidates:
                candidates[n] = step_candidate(subject, subject.model, range(whole - n, whole), rival.holds)
    seconds = interleave(candidates, **options)
    for rival in rivals:
        row, ours = table[rival.ratio], seconds["ours", rival.ratio]
        native = weighted(seconds, shares([round(n) for n in rival.entries]))
        row.native_step_ms, row.step_ms = 1e3 * median(native), 1e3 * median(ours)
        row.decode = Ratio.of(ours, native)
