"""Exact match with an interval, and batched answers by plain `model.generate`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_compress.evaluate.intervals import CONFIDENCE, DIFFERENCES, interval, mean_of
from hf_compress.evaluate.prompts import encode
from hf_compress.pictures import Frames, as_seen


@dataclass(frozen=True)
class Score:
    """A share of right answers with its interval.

    Attributes:
        correct: right answers.
        total: questions.
        low, high: ends of the interval, 0..1.
        confidence: of the interval.
    """

    correct: int
    total: int
    low: float
    high: float
    confidence: float = 0.95

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0..1."""
        return self.correct / self.total

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} [{self.low:.1%}, {self.high:.1%}]"


def exact_match(answers: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Whether each answer is its reference, leaving aside case and white space.

    Args:
        answers: of the model; references: what is right, one for each.

    Raises:
        ValueError: the counts differ.
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers for {len(references)} references; pass one reference per answer")
    return [a.lower().split() == r.lower().split() for a, r in zip(answers, references)]


def score(correct: Sequence[bool], confidence: float = CONFIDENCE, groups: Sequence[Hashable] | None = None) -> Score:
    """Share of right answers with its interval: Wilson's, for as many independent draws as the groups are worth.

    Args:
        correct: right or wrong, per question.
        confidence: of the interval.
        groups: what belongs together, such as the image of each question; None: the questions are independent.

    Raises:
        ValueError: there are no answers, the counts differ, or `confidence` is not in 0..1.
    """
    from scipy.stats import binomtest

    if not len(correct):
        raise ValueError("correct=[] is empty; there is nothing to score")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} must lie between 0 and 1, such as 0.95")
    right = sum(map(bool, correct))
    if groups is not None:
        return Score(right, len(correct), *mean_of([bool(c) for c in correct], groups).interval(confidence), confidence)
    found = binomtest(right, len(correct)).proportion_ci(confidence, method="wilson")
    return Score(right, len(correct), float(found.low), float(found.high), confidence)


def difference(
    correct: Sequence[float],
    baseline: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
) -> tuple[float, float, float]:
    """Paired difference of two mean scores on the same questions, with its interval.

    What is drawn with several seeds goes in as the mean over them per question: every image draws on its own, so that
    the variation of the draws is part of that between images. In simulations (`benchmarks/README.md`) a 95 % interval
    holds the true difference in 94 to 97 % of all samples of 25 images and more, and in 91 % and more of four images.

    Args:
        correct: right or wrong, or a score of 0..1, per question.
        baseline: the same questions answered otherwise.
        groups: what belongs together, such as the image of each question; each question on its own if None.
        confidence: of the interval.

    Returns:
        (difference, low, high), each in -1..1.

    Raises:
        ValueError: the counts differ or are zero, a score is not in 0..1, or `confidence` is not.
    """
    if not len(correct) == len(baseline) == (len(correct) if groups is None else len(groups)) > 0:
        raise ValueError(
            f"correct, baseline and groups have {len(correct)}, {len(baseline)} and "
            f"{len(correct if groups is None else groups)} entries; "
            "pass the same questions, at least one, in the same order"
        )
    for name, scores in (("correct", correct), ("baseline", baseline)):
        if wrong := [s for s in scores if not 0 <= s <= 1]:
            raise ValueError(f"{name}={wrong[:3]}: a score must lie between 0 and 1")
    return interval([float(a) - float(b) for a, b in zip(correct, baseline)], groups, confidence, DIFFERENCES)


def answer(
    model: Any,
    processor: Any,
    dataset: Sequence[Any],
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
    **generation: Any,
) -> list[str]:
    """Answer one question per row with `model.generate`, greedily, in batches; the model may be compressed or not.

    Args:
        model: an image-text-to-text model.
        processor: its processor, with a chat template and left padding.
        dataset: rows with "question" (str) and "image" (PIL) or "video" (a list of frames, PIL), such as
            `hf_compress.demo.dataset.load_scenes()` and `hf_compress.demo.clip_dataset.load_clips()`.
        batch_size: rows per call.
        progress: called with the number of rows of every finished batch.
        **generation: passed on to `generate`.

    Returns:
        the answers, in the order of the rows, stripped.

    Raises:
        ValueError: `batch_size` is below 1, or the processor pads on the right.
    """
    import torch

    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; choose 1 or more")
    if processor.tokenizer.padding_side != "left":
        raise ValueError("processor.tokenizer.padding_side='right': generation needs 'left'; set it to 'left'")
    out: list[str] = []
    for start in range(0, len(dataset), batch_size):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        batch = encode(processor, [_shown(r) for r in rows], [r["question"] for r in rows]).to(model.device)
        with torch.inference_mode():
            tokens = model.generate(**batch, do_sample=False, **generation)
        new = tokens[:, batch["input_ids"].shape[1] :]
        out += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        if progress is not None:
            progress(len(rows))
    return out


def _shown(row: Any) -> Any:
    return Frames(map(as_seen, row["video"])) if "video" in row else as_seen(row["image"])
