"""Peak memory of a compressed prefill, over a native one of equal length and over the full one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_compress.bench.memory import peak
from hf_compress.bench.models import Subject, stage
from hf_compress.bench.parity import shares

LIMITS = {"decoder": 1.0, "cache": 1.05}  # over the full prefill
STATES = 2.0  # vision: over native, in hidden states of the whole prompt; its embeddings and features are there first


@dataclass
class PeakRow:
    """One method at one ratio; bytes beyond what was there before the prefill.

    Attributes:
        full, ours: peaks of the full and of the compressed prefill; native: of the bare model on as few rows (the
            layer-weighted mean where layers differ), None for cache methods.
        state: bytes of the hidden states of the whole prompt at one layer.
    """

    model: str
    method: str
    stage: str
    ratio: float
    full: int = 0
    ours: int = 0
    native: float | None = None
    state: int = 0
    note: str = ""

    @property
    def over_full(self) -> float | None:
        return self.ours / self.full if self.full else None

    @property
    def over_native(self) -> float | None:
        return self.ours / self.native if self.native else None

    @property
    def states(self) -> float | None:
        return (self.ours - self.native) / self.state if self.native else None

    @property
    def failures(self) -> list[str]:
        """Which limits are missed."""
        measured, limit = self.over_full, LIMITS.get(self.stage, STATES)
        if self.stage == "vision":
            measured = self.states
        return ["peak"] if measured is not None and measured > limit else []

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {k: getattr(self, k) for k in ("over_full", "over_native", "states", "failures")}


@torch.no_grad()
def measure(subject: Subject, methods: Sequence[str], ratios: Sequence[float]) -> Iterator[list[PeakRow]]:
    """Rows of method after method; bare prefills of equal length are measured once."""
    bare: dict[int, int] = {}
    for method in methods:
        yield [_row(subject, method, ratio, bare) for ratio in ratios]


def _row(subject: Subject, method: str, ratio: float, bare: dict[int, int]) -> PeakRow:
    row = PeakRow(subject.name, method, stage(method), ratio)
    try:
        model = subject.compressed(method, ratio)
        row.ours = _peak(subject, model)
    except ValueError as refused:
        row.note = str(refused)
        return row
    layers = [layer[0] for layer in model.compression.last.layer_index]
    whole = subject.ids.shape[1]
    for n, rows in ({whole: None} | {len(at): at for at in layers}).items():
        if n not in bare:
            bare[n] = _peak(subject, subject.model, rows)
    row.full, row.state = bare[whole], subject.ids.numel() * subject.text.hidden_size * subject.model.dtype.itemsize
    if row.stage != "cache":
        row.native = sum(share * bare[n] for n, share in shares([len(at) for at in layers]).items())
    return row


def _peak(subject: Subject, model: Any, rows: Sequence[int] | None = None) -> int:
    """Of the second prefill: the first one may fill caches that stay."""
    model(**subject.prompt(model, rows))
    given = subject.prompt(model, rows)
    return peak(lambda: model(**given), subject.device)
