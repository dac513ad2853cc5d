"""A training step (forward and backward) with compressed tokens, over one on a prompt that was as short from the start.

Both sides have the same labels: those of the text, of which no token is removed. The tower is in neither side, and no
gradient flows into it; all parameters of the language model get theirs. Peaks of memory are those of the step beyond
weights and their gradients, over the same step on the whole prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from hf_compress.bench.memory import peak
from hf_compress.bench.models import Subject, stage
from hf_compress.bench.parity import shares
from hf_compress.bench.timing import CLOCKS, Candidate, Ratio, interleave, weighted

LIMITS = {"vision": 1.05, "decoder": 1.10}  # a step, over native
MOST, REMOVED = 0.5, 0.75  # peak over full of a vision method that removes so much or more


@dataclass
class TrainRow:
    """One method at one ratio; milliseconds are medians.

    Attributes:
        step: ours over native of equal length; saved: ours over the full step.
        full_peak, peak: bytes of the full and of our step beyond weights and gradients.
        loss: ours; native_loss: of the bare model on the very rows that stay, where all layers and samples hold the
            same ones. They agree where no token is merged (the tests hold them to it).
    """

    model: str
    method: str
    stage: str
    ratio: float
    full_ms: float = 0.0
    native_ms: float = 0.0
    ours_ms: float = 0.0
    step: Ratio | None = None
    full_peak: int = 0
    peak: int = 0
    loss: float = 0.0
    native_loss: float | None = None
    note: str = ""

    @property
    def over_full(self) -> float | None:
        return self.peak / self.full_peak if self.full_peak else None

    @property
    def failures(self) -> list[str]:
        """Which limits are missed."""
        large = self.stage == "vision" and self.ratio >= REMOVED and (self.over_full or 0) > MOST
        slow = self.step is not None and self.step.pairs.median > LIMITS[self.stage]
        return ["step"] * slow + ["peak"] * large

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"over_full": self.over_full, "failures": self.failures}


class Step:
    """Forward and backward of one model on some rows of the prompt."""

    def __init__(self, subject: Subject, model: Any, rows: Sequence[int] | None = None):
        self.subject, self.model, self.rows = subject, model, rows
        self.labels = subject.ids.masked_fill(subject.visual, -100)
        if rows is not None:
            self.labels = self.labels[:, list(rows)]
        self.given: dict[str, Any] = {}
        self.loss: Any = 0.0

    def candidate(self) -> Candidate:
        """For `interleave`."""
        return Candidate(self.run, self.before, self.after)

    def before(self) -> None:
        with torch.no_grad():
            self.given = self.subject.prompt(self.model, self.rows) | {"labels": self.labels, "use_cache": False}
        del self.given["logits_to_keep"]
        self.model.zero_grad(set_to_none=True)

    def run(self) -> None:
        loss = self.model(**self.given).loss
        loss.backward()
        self.loss = loss.detach()

    def after(self) -> None:
        self.loss = float(self.loss)

    def peak(self) -> int:
        """Bytes that it allocates at most, where all gradients are there before."""
        self.before()
        self.run()
        return peak(self.run, self.subject.device)


def measure(
    subject: Subject, method: str, ratios: Sequence[float], *, rounds: int = 6, warmup: int = 1, clock: str = "wall"
) -> list[TrainRow]:
    """All rows of one method; its ratios, their native steps and the full step take turns."""
    whole = subject.ids.shape[1]
    table = {r: TrainRow(subject.name, method, stage(method), r) for r in ratios}
    steps: dict[Any, Step] = {whole: Step(subject, subject.model)}
    counts: dict[float, list[int]] = {}
    for ratio, row in table.items():
        try:
            model = subject.compressed(method, ratio)
            with torch.no_grad():
                model(**subject.prompt(model))
        except ValueError as refused:
            row.note = str(refused)
            continue
        steps["ours", ratio] = Step(subject, model)
        layers = [layer[0] for layer in model.compression.last.layer_index]
        counts[ratio] = [len(at) for at in layers]
        for at in layers:
            steps.setdefault(len(at), Step(subject, subject.model, at))
    options: dict[str, Any] = {"device": subject.device, "clock": CLOCKS[clock]}
    seconds = interleave({k: s.candidate() for k, s in steps.items()}, rounds=rounds, warmup=warmup, **options)
    full_peak = steps[whole].peak() if counts else 0
    for ratio, lengths in counts.items():
        row, ours, native = table[ratio], seconds["ours", ratio], weighted(seconds, shares(lengths))
        row.full_ms, row.native_ms, row.ours_ms = (1e3 * median(s) for s in (seconds[whole], native, ours))
        row.step, row.loss = Ratio.of(ours, native), steps["ours", ratio].loss
        row.full_peak, row.peak = full_peak, steps["ours", ratio].peak()
        if len(set(lengths)) == 1:
            row.native_loss = _own_native(subject, steps["ours", ratio])
    subject.model.zero_grad(set_to_none=True)
    return list(table.values())


def _own_native(subject: Subject, ours: Step) -> float | None:
    """Loss of the bare model on the very rows that `ours` kept (another method may have kept as many others).

    None: samples of the batch kept other rows.
    """
    rows, *others = ours.model.compression.last.layer_index[0]
    if any(other != rows for other in others):
        return None
    native = Step(subject, subject.model, rows)
    native.before()
    with torch.no_grad():
        return float(subject.model(**native.given).loss)
