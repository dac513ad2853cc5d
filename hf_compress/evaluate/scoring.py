"""Exact match with an interval, and batched answers by plain `model.generate`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any


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

    Raises:
        ValueError: the counts differ.
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers for {len(references)} references; pass one reference per answer")
    return [a.lower().split() == r.lower().split() for a, r in zip(answers, references)]


def score(correct: Sequence[bool], confidence: float = 0.95) -> Score:
    """Share of right answers with the Wilson interval, which takes the questions as independent draws.

    Raises:
        ValueError: there are no answers, or `confidence` is not in 0..1.
    """
    from scipy.stats import binomtest

    if not len(correct):
        raise ValueError("correct=[] is empty; there is nothing to score")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} must lie between 0 and 1, such as 0.95")
    right = sum(map(bool, correct))
    interval = binomtest(right, len(correct)).proportion_ci(confidence, method="wilson")
    return Score(right, len(correct), float(interval.low), float(interval.high), confidence)


def difference(
    correct: Sequence[bool],
    baseline: Sequence[bool],
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Paired difference of two accuracies on the same questions, with a percentile bootstrap interval.

    Args:
        correct: right or wrong, per question.
        baseline: the same questions answered otherwise.
        groups: what belongs together and is drawn together, such as the image of each question; each question on its
            own if None.
        confidence: of the interval.
        seed: of the 9999 resamples.

    Returns:
        (difference, low, high), each in -1..1.

    Raises:
        ValueError: the counts differ or are zero.
    """
    import numpy as np
    from scipy.stats import bootstrap

    names = list(range(len(correct))) if groups is None else list(groups)
    if not len(correct) == len(baseline) == len(names) > 0:
        raise ValueError(
            f"correct, baseline and groups have {len(correct)}, {len(baseline)} and {len(names)} entries; "
            "pass the same questions, at least one, in the same order"
        )
    delta: dict[Hashable, list[int]] = {}
    for name, a, b in zip(names, correct, baseline):
        delta.setdefault(name, []).append(int(a) - int(b))
    sums, sizes = np.array([sum(d) for d in delta.values()]), np.array([len(d) for d in delta.values()])
    mean = float(sums.sum() / sizes.sum())
    if len(sums) == 1 or np.ptp(sums / sizes) == 0:  # every resample gives the same
        return mean, mean, mean

    def ratio(s: Any, n: Any, axis: int = -1) -> Any:
        return s.sum(axis) / n.sum(axis)

    found = bootstrap(
        (sums, sizes), ratio, paired=True, confidence_level=confidence, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return mean, float(found.low), float(found.high)


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
        dataset: rows with "image" (PIL) and "question" (str), such as `hf_compress.demo.dataset.load_scenes()`.
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
        batch = encode(processor, [r["image"] for r in rows], [r["question"] for r in rows]).to(model.device)
        with torch.inference_mode():
            tokens = model.generate(**batch, do_sample=False, **generation)
        new = tokens[:, batch["input_ids"].shape[1] :]
        out += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        if progress is not None:
            progress(len(rows))
    return out


def encode(processor: Any, images: Sequence[Any], questions: Sequence[str]) -> Any:
    """One image and one question per row as a padded batch, by the chat template of the processor."""
    turns = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}] for question in questions
    ]
    texts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    return processor(images=list(images), text=texts, padding=True, return_tensors="pt")
