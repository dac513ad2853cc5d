"""What a run costs: time to the first token and time per further token, against the uncompressed model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from hf_compress.api import compress, decompress
from hf_compress.bench.timing import CLOCKS, Candidate, interleave
from hf_compress.evaluate.plan import Run
from hf_compress.evaluate.prompts import Batch

ROWS = 4  # of the batch that is timed
ROUNDS = 3
STEPS = 24  # further tokens: so many that their time is not lost in that of the prompt


def clock_of(device: torch.device) -> str:
    """CPU time where the CPU works, which other processes do not disturb; wall time elsewhere."""
    return "cpu" if device.type == "cpu" else "wall"


@contextmanager
def one_thread(clock: str) -> Iterator[None]:
    """One thread where CPU time is taken, which counts what threads spend on waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if clock == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def time_run(model: Any, run: Run, batch: Batch) -> dict[str, Any]:
    """The model compressed and not, in turns, on the same batch.

    Returns:
        "prefill": time of `generate` for one token, vision tower included, over that of the uncompressed model;
        "decode": time per further token over that of the uncompressed model. Both are medians over the rounds, with
        the lowest and the highest round beside them, "prefill_range" and "decode_range".
    """
    inputs = batch.inputs.to(model.device)

    def shape(on: bool) -> Callable[[], None]:
        def change() -> None:
            if on and model.compression is None:
                compress(model, run.config(), weights=run.weights)
            if not on and model.compression is not None:
                decompress(model)

        return change

    def say(tokens: int) -> Callable[[], Any]:
        return lambda: model.generate(**inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)

    candidates = {
        (on, tokens): Candidate(say(tokens), before=shape(on)) for on in (False, True) for tokens in (1, 1 + STEPS)
    }
    clock = clock_of(model.device)
    try:
        with one_thread(clock):
            seconds = interleave(candidates, rounds=ROUNDS, warmup=1, device=model.device, clock=CLOCKS[clock])
    finally:
        shape(False)()
    first = {on: seconds[on, 1] for on in (False, True)}
    later = {on: [b - a for a, b in zip(first[on], seconds[on, 1 + STEPS])] for on in (False, True)}
    out: dict[str, Any] = {}
    for name, took in (("prefill", first), ("decode", later)):
        ratios = [ours / full for ours, full in zip(took[True], took[False])]
        out |= {name: median(ratios), f"{name}_range": (min(ratios), max(ratios))}
    return out
