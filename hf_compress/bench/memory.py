"""Peak memory of a piece of work: the allocator's own counters on CUDA, its events in a profiler trace on CPU."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

RANGE = "hf_compress.bench: "
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else every trace prints that it started and stopped


def mark(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, found again in the trace of `peaks` under `name`; works for methods."""

    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(RANGE + name):
            return function(*args, **kwargs)

    return marked


def peak(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Bytes that `run` allocates at most at a time, beyond what was there before."""
    kind = torch.device(device)
    if kind.type == "cuda":
        torch.cuda.synchronize(kind)
        torch.cuda.reset_peak_memory_stats(kind)
        before = torch.cuda.memory_allocated(kind)
        run()
        torch.cuda.synchronize(kind)
        return torch.cuda.max_memory_allocated(kind) - before
    return peaks(run)[""]


def peaks(run: Callable[[], Any]) -> dict[str, int]:
    """The same on CPU, under "" for all of `run`, and for every range that `mark` names: its most costly call.

    The profiler logs every allocation of torch's CPU allocator; what libraries allocate behind it is not seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        p.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((float(e["ts"]), int(e["args"]["Bytes"])) for e in events if e.get("name") == "[memory]")
    ranges = [("", float("-inf"), float("inf"))]
    for e in events:
        if str(e.get("name", "")).startswith(RANGE) and "dur" in e:
            ranges.append((e["name"].removeprefix(RANGE), float(e["ts"]), float(e["ts"]) + float(e["dur"])))
    out: dict[str, int] = {}
    for name, start, stop in ranges:
        out[name] = max(out.get(name, 0), _highest([n for at, n in changes if start <= at <= stop]))
    return out


def _highest(changes: list[int]) -> int:
    level = top = 0
    for n in changes:
        level += n
        top = max(top, level)
    return top
