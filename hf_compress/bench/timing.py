"""The one timing helper: candidates take turns in one process, warm-up is thrown away, ratios are medians of pairs."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

import hf_compress

# "cpu" leaves out what other processes take: on a shared machine the better clock, for one thread on the CPU.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Candidate:
    """One of the things compared.

    Args:
        run: what is timed.
        before: what has to happen before every run, untimed (fresh inputs, a cache cut back to its length).
        after: reads what the run left behind, untimed.
    """

    run: Callable[[], Any]
    before: Callable[[], Any] | None = None
    after: Callable[[], Any] | None = None


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done what it was given; nothing to wait for on the CPU."""
    kind = torch.device(device).type
    if kind != "cpu":
        getattr(torch, kind).synchronize()


def interleave(
    candidates: Mapping[Any, Candidate],
    *,
    rounds: int,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, list[float]]:
    """Seconds per round of every candidate, the candidates taking turns, so that all of them meet the same machine.

    Every other round runs backwards: nobody always follows the same neighbour. The garbage collector is off
    while a candidate runs.

    Args:
        rounds: timed rounds. `warmup` rounds before them are thrown away.
        device: synchronised before the clock starts and before it stops.
        clock: seconds.

    Returns:
        `rounds` seconds per candidate; entries of equal index come from the same round.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-warmup, rounds):
        order = list(candidates) if number % 2 == 0 else list(candidates)[::-1]
        for name in order:
            took = _once(candidates[name], device, clock)
            if number >= 0:
                seconds[name].append(took)
                if (after := candidates[name].after) is not None:
                    after()
    return seconds


def _once(candidate: Candidate, device: torch.device | str, clock: Callable[[], float]) -> float:
    if candidate.before is not None:
        candidate.before()
    with _no_collection():
        synchronize(device)
        start = clock()
        candidate.run()
        synchronize(device)
        return clock() - start


@contextmanager
def _no_collection() -> Any:
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@dataclass
class Spread:
    """Median and quartiles of a sample of `n` values, in the unit of the values."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; quartiles by linear interpolation."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))


@dataclass
class Ratio:
    """Time of one candidate over the time of another.

    Attributes:
        pairs: median and quartiles of the ratios of each round: a slow spell of the machine hits both sides of a pair.
        of_medians: ratio of the two medians.
        of_minima: ratio of the two fastest rounds, the least disturbed ones.
    """

    pairs: Spread
    of_medians: float
    of_minima: float

    @classmethod
    def of(cls, ours: Sequence[float], native: Sequence[float]) -> Ratio:
        """Of two samples whose entries of equal index come from the same round.

        Raises:
            ValueError: the samples differ in length.
        """
        if len(ours) != len(native):
            raise ValueError(f"{len(ours)} rounds against {len(native)}: pairs need as many of one as of the other")
        pairs = Spread.of([a / b for a, b in zip(ours, native)])
        medians = statistics.median(ours) / statistics.median(native)
        return cls(pairs, medians, min(ours) / min(native))


def weighted(seconds: Mapping[int, Sequence[float]], weights: Mapping[int, float]) -> list[float]:
    """Round by round, the weighted sum over the keys of `weights`."""
    columns = [[weights[key] * s for s in seconds[key]] for key in weights]
    return [sum(column) for column in zip(*columns)]


@dataclass
class Stopwatch:
    """Host seconds spent in chosen functions, by name, and in all of them together.

    A function called by another one counts under its own name too, and once in `total`.
    """

    clock: Callable[[], float] = time.perf_counter
    total: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    depth: int = 0

    def reset(self) -> None:
        """Back to zero."""
        self.total, self.parts = 0.0, {}

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed under `name`; works for methods."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.clock()
            self.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                took = self.clock() - start
                self.parts[name] = self.parts.get(name, 0.0) + took
                if not self.depth:
                    self.total += took

        return timed


def record(device: torch.device | str) -> dict[str, Any]:
    """Hardware and versions, as they belong into every file of results."""
    kind = torch.device(device)
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name(kind) if kind.type == "cuda" else kind.type,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_compress": hf_compress.__version__,
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
