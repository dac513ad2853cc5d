"""Growth: time and memory of the decision alone, from a few hundred to many thousand tokens.

Vision methods decide over the tokens of one picture behind a small tower, cache methods over a prompt of a small text
model; language models are as small as they can be, because only the decision is looked at. One run is timed, another
one is watched by the memory profiler. What must grow linearly is memory: nobody needs a map of all tokens against all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hf_compress.bench.memory import mark, peaks
from hf_compress.bench.models import TINY, Subject, llama, llava, qwen_vl, stage
from hf_compress.bench.timing import CLOCKS, Candidate, Stopwatch, interleave
from hf_compress.engine.evict import CachePolicy
from hf_compress.engine.forward import LanguageModel
from hf_compress.engine.visual import VisualPrompt

VISUAL = (576, 1024, 2304, 4096, 9216, 16384)  # squares
SIZES: dict[str, tuple[int, ...]] = {"llava": VISUAL, "qwen": VISUAL[:4], "cache": (*VISUAL, 32768)}
# (the tower of qwen sees four patches a token)
MEMORY = 1.25  # exponent of memory over the second half of the sizes: 1 is linear, 2 a map of all against all
SMALL = TINY | dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
DECISIONS: dict[str, tuple[tuple[type, str], ...]] = {
    "vision": ((VisualPrompt, "locate"),),
    "cache": ((CachePolicy, "after_prompt"), (LanguageModel, "leave")),
}


@dataclass
class GrowthRow:
    """One method over all sizes: tokens, milliseconds (median) and bytes of its decision, for one image or one prompt.

    Attributes:
        bytes: peak beyond what was there when the decision began; of cache methods the largest layer's.
    """

    model: str
    method: str
    stage: str
    ratio: float
    tokens: list[int] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    note: str = ""

    @property
    def time_exponent(self) -> float | None:
        return exponent(self.tokens, self.ms)

    @property
    def memory_exponent(self) -> float | None:
        return exponent(self.tokens, self.bytes)

    @property
    def failures(self) -> list[str]:
        """Which limits are missed."""
        power = self.memory_exponent
        return ["memory"] if power is not None and power > MEMORY else []

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {k: getattr(self, k) for k in ("time_exponent", "memory_exponent", "failures")}


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float | None:
    """p of value ~ size^p, least squares over the second half of the sizes; None for fewer than two of them."""
    half = [(math.log(n), math.log(v)) for n, v in zip(sizes, values) if v > 0][len(sizes) // 2 :]
    if len(half) < 2:
        return None
    x, y = (sum(column) / len(half) for column in zip(*half))
    return sum((a - x) * (b - y) for a, b in half) / sum((a - x) ** 2 for a, _ in half)


def subject_for(kind: str, architecture: str, tokens: int) -> Subject:
    """A model of `kind` ("vision" or "cache") with so many tokens.

    Raises:
        ValueError: `tokens` is not a square, which images of these models must be.
    """
    if kind == "cache":
        return llama("llama", tokens, 100, SMALL)
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"tokens={tokens}: images are square here; choose a square number, like {side**2}")
    build = {"llava": llava, "qwen": qwen_vl}[architecture]
    return build(architecture, side, 10, 100, (64, 2), SMALL)


@torch.no_grad()
def measure(
    methods: Sequence[str],
    *,
    sizes: Sequence[int],
    architecture: str = "llava",
    ratio: float = 0.75,
    rounds: int = 2,
    clock: str = "wall",
) -> Iterator[list[GrowthRow]]:
    """Rows of methods of one stage, after every size: they grow by a point each.

    Args:
        architecture: "llava" or "qwen", of vision methods.
        rounds: timed runs per point.
    """
    kind = stage(methods[0])
    name = architecture if kind == "vision" else "llama"
    rows = {m: GrowthRow(name, m, kind, ratio) for m in methods}
    for tokens in sizes:
        subject = subject_for(kind, architecture, tokens)
        for method, row in rows.items():
            if row.note:
                continue
            try:
                ms, size = _point(subject, method, ratio, kind, rounds, clock)
            except ValueError as refused:
                row.note = f"{tokens} tokens: {refused}"
                continue
            row.tokens.append(tokens)
            row.ms.append(ms)
            row.bytes.append(size)
        yield list(rows.values())


def _point(subject: Subject, method: str, ratio: float, kind: str, rounds: int, clock: str) -> tuple[float, int]:
    """Milliseconds and bytes of one decision."""
    watch, was = Stopwatch(CLOCKS[clock]), []
    for owner, attribute in DECISIONS[kind]:
        function = owner.__dict__[attribute]
        was.append((owner, attribute, function))
        setattr(owner, attribute, mark("decision", watch.wrap("decision", function)))
    try:
        model, given, totals = subject.compressed(method, ratio), {}, []

        def before() -> None:
            given.update(subject.prompt(model))
            watch.reset()

        run = Candidate(lambda: model(**given), before, lambda: totals.append(watch.total))
        before()
        size = peaks(lambda: model(**given))["decision"]  # the first run: it warms up too
        interleave({"": run}, rounds=rounds, warmup=0, clock=CLOCKS[clock])
        return 1e3 * median(totals), size
    finally:
        for owner, attribute, function in was:
            setattr(owner, attribute, function)


def picture(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Time and memory of the decision against tokens, double logarithmic, one line per method."""
    from matplotlib.figure import Figure

    from hf_compress.evaluate.figures import NAMED

    looks = list(NAMED.items())
    kinds = sorted({(r["stage"], r["model"]) for r in rows if r["tokens"]}, reverse=True)
    figure = Figure(figsize=(14, 4.5 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), 2, squeeze=False)
    for (kind, model), (left, right) in zip(kinds, axes):
        mine = [r for r in rows if r["tokens"] and (r["stage"], r["model"]) == (kind, model)]
        for n, row in enumerate(mine):
            (colour, marker), line = looks[n % len(looks)], ("-", "--", ":", "-.")[n // len(looks) % 4]
            style = {"color": colour, "marker": marker, "markersize": 4, "linestyle": line, "linewidth": 1}
            left.plot(row["tokens"], row["ms"], **style)
            right.plot(row["tokens"], [b / 2**20 for b in row["bytes"]], label=row["method"], **style)
        first, last = mine[0]["tokens"][0], mine[0]["tokens"][-1]
        low = min(b for r in mine for b in r["bytes"] if b) / 2**20
        right.plot([first, last], [low, low * last / first], color="0.6", linewidth=4, alpha=0.4, label="linear")
        for axis, label in ((left, "time of the decision, ms"), (right, "peak memory of the decision, MiB")):
            axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label, title=f"{kind} methods, {model}")
            axis.grid(alpha=0.3)
        place = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}  # beside the curves, none of which it hides
        right.legend(fontsize=8, frameon=False, handlelength=4, ncols=1 + len(mine) // 25, **place)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
