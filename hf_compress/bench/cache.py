"""The cache stage on a text model: what a prompt pays for scoring and evicting, what a step gains, what bytes are left.

All methods and the bare model take turns over the same prompt. A step is measured at several batch sizes: the cache of
the prompt is repeated, and native is a step of the bare model whose cache holds as many entries.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_compress.bench.limits import scoring_limit
from hf_compress.bench.models import Subject, slim
from hf_compress.bench.parity import KERNEL, Bare, engine_watch, shares
from hf_compress.bench.timing import CLOCKS, Candidate, Ratio, Stopwatch, interleave, weighted
from hf_compress.engine import evict
from hf_compress.engine.entries import StoredView
from hf_compress.engine.evict import CachePolicy
from hf_compress.engine.forward import LanguageModel
from hf_compress.engine.layers import AttentionExit, LayerEntry
from hf_compress.patches.versions import cache_name, cache_of
from hf_compress.stores import HeldLayer, Ragged

STEP = {"dense": 1.03, "ragged": 1.10}  # a decode step over a native one; packed stores have no limit without a kernel
BYTES = {"dense": 1.02, "ragged": 1.02, "packed": 1.05}  # what is allocated over what the ratio promises

# Where the time of a prompt goes. "evict" contains what ranks and packs; "passes" feeds the prompt again; "attend" is
# the attention of methods that read it on its way: what attention takes in the bare prefill is then taken off.
PARTS: tuple[tuple[Any, str, str], ...] = (
    (CachePolicy, "after_prompt", "evict"),
    (LanguageModel, "leave", "passes"),
    (LayerEntry, "__call__", "layer"),
    (AttentionExit, "__call__", "attention"),
    (LanguageModel, "enter", "enter"),
    (evict, "attention_and_sums", "attend"),
    (StoredView, "column_sums", "columns"),
    (StoredView, "window_rows", "window"),
    (evict, "best_slots", "sort"),
    (HeldLayer, "select", "gather"),
    (HeldLayer, "pack", "pack"),
)


@dataclass
class CacheRow:
    """One cache method at one ratio. Shares are fractions of a bare prefill.

    Attributes:
        store: "dense", "ragged" or "packed".
        entries: per head, mean over layers and heads.
        scoring: CPU seconds of the package during the prompt, over a bare prefill; where it attends itself, less those
            of attention in the bare prefill. `parts`: by function, in which "score" is the method's own ranking and
            "settle" its packing.
        prefill: the whole compressed prefill over the bare one.
        steps: decode step over native by batch size.
        bytes: allocated over promised, of the same cache in 16 bits per number.
        note: why there are no numbers, if there are none.
    """

    model: str
    method: str
    ratio: float
    length: int
    store: str = "dense"
    entries: float = 0.0
    full_ms: float = 0.0
    scoring: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    prefill: Ratio | None = None
    steps: dict[int, Ratio] = field(default_factory=dict)
    step_ms: dict[int, float] = field(default_factory=dict)
    bytes: float | None = None
    note: str = ""

    @property
    def failures(self) -> list[str]:
        """Which limits are missed."""
        out = []
        scoring = scoring_limit(self.model, self.method, "cache")
        if self.prefill is not None and scoring is not None and self.scoring > scoring:
            out.append("scoring")
        limit = STEP.get(self.store)
        out += [f"step at batch {b}" for b, step in self.steps.items() if limit and step.pairs.median > limit]
        if self.bytes is not None and self.bytes > BYTES[self.store]:
            out.append("bytes")
        return out

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        by_batch = {key: {str(b): x for b, x in asdict(self)[key].items()} for key in ("steps", "step_ms")}
        return asdict(self) | by_batch | {"failures": self.failures}


class Ours:
    """One compressed twin and the cache of its last prompt."""

    def __init__(self, subject: Subject, method: str, ratio: float, watch: Stopwatch):
        self.model, self.watch = subject.compressed(method, ratio), watch
        self.given = subject.prompt(self.model)
        context = self.model.compression.context
        context.cache_method.score = watch.wrap("score", context.cache_method.score)
        if context.policy.store is not None:
            store = context.policy.store
            context.policy.store = _Settling(store, watch)
        self.totals: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.cache: Any = None

    def candidate(self) -> Candidate:
        """Its prefill."""
        return Candidate(self._run, self.watch.reset, self._read)

    def _run(self) -> None:
        self.cache = cache_of(self.model(**self.given))

    def _read(self) -> None:
        self.totals.append(self.watch.total)
        self.parts.append(self.watch.parts)


class _Settling:
    """A store whose packing is timed."""

    def __init__(self, store: Any, watch: Stopwatch):
        self._store, self.settle = store, watch.wrap("settle", store.settle)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@torch.no_grad()
def measure(
    subject: Subject,
    wanted: Sequence[tuple[str, float]],
    *,
    rounds: int = 5,
    warmup: int = 1,
    steps: int = 40,
    batches: Sequence[int] = (1, 8),
    clock: str = "wall",
    together: int = 6,
) -> Iterator[list[CacheRow]]:
    """Rows of (method, ratio) pairs; `together` of them take turns with the bare prefill.

    Args:
        rounds, warmup: of prefills; `steps`: rounds of decode steps.
        batches: batch sizes of the decode steps.
    """
    every, length = iter(wanted), subject.ids.shape[1]
    honest = subject if subject.model.dtype.itemsize == 2 else slim(subject)  # low bits are promised against 16
    options: dict[str, Any] = {"device": subject.device, "clock": CLOCKS[clock]}
    while some := list(islice(every, together)):
        rows, rivals = [], {}
        with engine_watch(CLOCKS[clock], PARTS) as watch, engine_watch(CLOCKS[clock], KERNEL) as kernel:
            for method, ratio in some:
                row = CacheRow(subject.name, method, ratio, length)
                rows.append(row)
                try:
                    rivals[method, ratio] = row, Ours(subject, method, ratio, watch)
                except ValueError as refused:
                    row.note = str(refused)
            bare = Bare(subject, kernel)
            candidates: dict[Any, Candidate] = {"full": bare.candidate()}
            candidates |= {key: ours.candidate() for key, (_, ours) in rivals.items()}
            seconds = interleave(candidates, rounds=rounds, warmup=warmup, **options)
        for key, (row, ours) in rivals.items():
            _prompt(row, ours, bare, seconds["full"], seconds[key])
            row.bytes = honesty(honest, *key)
        for batch in batches:
            _steps(subject, rivals, batch, options | {"rounds": steps, "warmup": 5})
        yield rows


def _prompt(row: CacheRow, ours: Ours, bare: Bare, full: list[float], seconds: list[float]) -> None:
    whole, layers = median(full), ours.cache.layers
    row.full_ms, row.prefill = 1e3 * whole, Ratio.of(seconds, full)
    row.scoring = median(a - b for a, b in zip(ours.totals, bare.spared(ours.parts))) / whole
    names = sorted({name for parts in ours.parts for name in parts})
    row.parts = {name: median(parts.get(name, 0.0) for parts in ours.parts) / whole for name in names}
    bodies = [layer.body for layer in layers]
    if any(bodies):
        row.store = "ragged" if all(b is None or isinstance(b[0], Ragged) for b in bodies) else "packed"
    row.entries = sum(held(layer) for layer in layers) / len(layers)


def held(layer: HeldLayer) -> float:
    """Entries per head, mean over samples and heads."""
    assert layer.layout is not None
    return layer.layout.valid.sum(-1).float().mean().item()


def filled(subject: Subject, batch: int, entries: int) -> DynamicCache:
    """A cache of the bare model with so many random entries."""
    cache, (layers, heads, size) = DynamicCache(config=subject.text), subject.kv
    x = torch.randn(batch, heads, entries, size, device=subject.device, dtype=subject.model.dtype)
    for i in range(layers):
        cache.update(x.clone(), x.clone(), i)
    return cache


def step(model: Any, cache: Any, token: Tensor) -> Candidate:
    """A decode step; the cache grows with every one."""
    at, name = [cache.get_seq_length()], cache_name(model)

    def run() -> None:
        model(input_ids=token, position_ids=torch.full_like(token, at[0]), **{name: cache})
        at[0] += 1

    return Candidate(run)


def _steps(subject: Subject, rivals: dict[Any, Any], batch: int, options: dict[str, Any]) -> None:
    token = subject.ids[:, -1:].expand(batch, 1)
    counts = {key: [round(held(layer)) for layer in ours.cache.layers] for key, (_, ours) in rivals.items()}
    candidates: dict[Any, Candidate] = {
        n: step(subject.model, filled(subject, batch, n), token)
        for n in sorted({n for c in counts.values() for n in c})
    }
    for key, (_, ours) in rivals.items():
        cache = copy.deepcopy(ours.cache)
        if batch > 1:
            cache.batch_repeat_interleave(batch)
        candidates[key] = step(ours.model, cache, token)
    seconds = interleave(candidates, **options)
    for key, (row, _) in rivals.items():
        row.steps[batch] = Ratio.of(seconds[key], weighted(seconds, shares(counts[key])))
        row.step_ms[batch] = 1e3 * median(seconds[key])


def storages(cache: Any) -> int:
    """Bytes of all storages behind the tensors of a cache, each once."""
    tensors = [t for layer in cache.layers for t in layer.tensors()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@torch.no_grad()
def honesty(subject: Subject, method: str, ratio: float) -> float:
    """Bytes allocated for the cache of the prompt over (1 - ratio) of the whole one."""
    layers, heads, size = subject.kv
    ours = Ours(subject, method, ratio, Stopwatch())
    ours.candidate().run()
    full = 2 * layers * heads * size * subject.ids.numel() * subject.model.dtype.itemsize
    return storages(ours.cache) / ((1 - ratio) * full)
