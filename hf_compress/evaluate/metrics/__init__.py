"""Metrics as modules of `evaluate`, each in a folder beside this file, loaded without a hub.

    from hf_compress.evaluate.metrics import load_metric

    metric = load_metric("anls")
    metric.compute(predictions=["a cat"], references=[["the cat", "a cat"]])  # {"anls": 1.0, "scores": [1.0]}

The folders are complete `evaluate` modules: `evaluate.load("path/to/hf_compress/evaluate/metrics/anls")` works too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

METRICS = ("exact_match", "contains", "vqa_accuracy", "anls", "f1")


@lru_cache
def load_metric(name: str) -> Any:
    """The metric as an `evaluate.EvaluationModule`: compute(predictions, references) -> {name: mean, "scores": list}.

    Raises:
        ValueError: there is no such metric, or no folder to keep its module in.
    """
    if name not in METRICS:
        raise ValueError(f"metric={name!r} is not one of {', '.join(METRICS)}")
    import evaluate

    try:
        return evaluate.load(str(Path(__file__).parent / name), keep_in_memory=True)
    except OSError as error:
        raise ValueError(
            f"metric={name!r} cannot be loaded: {error}; `evaluate` keeps a copy of it in HF_HOME, so set HF_HOME to a "
            "folder that can be written to"
        ) from error


def score_answers(name: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """One score per answer, 0..1.

    Raises:
        ValueError: there is no such metric, or the counts differ.
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers for {len(references)} references; pass a list of them per answer")
    found = load_metric(name).compute(predictions=list(answers), references=[list(r) for r in references])
    return [float(score) for score in found["scores"]]
