"""Answers of a model and how good they are."""

from hf_compress.evaluate.scoring import Score, answer, difference, exact_match, score

__all__ = ["Score", "answer", "difference", "exact_match", "score"]
