"""Answers of a model and how good they are; many methods against their controls on the same questions.

from hf_compress.evaluate import sweep

print(sweep("demo:llava", "demo:scenes", ["fastervlm", "divprune+snapkv"], [0.75, 0.89], out="results"))
"""

from hf_compress.evaluate.explorer import explore
from hf_compress.evaluate.intervals import Mean, interval, mean_of
from hf_compress.evaluate.judge import sweep
from hf_compress.evaluate.page import leaderboard
from hf_compress.evaluate.results import Results
from hf_compress.evaluate.scoring import Score, answer, difference, exact_match, score

__all__ = [
    "Mean",
    "Results",
    "Score",
    "answer",
    "difference",
    "exact_match",
    "explore",
    "interval",
    "leaderboard",
    "mean_of",
    "score",
    "sweep",
]
