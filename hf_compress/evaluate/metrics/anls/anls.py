"""ANLS: average normalised Levenshtein similarity, below 0.5 counted as 0 (ST-VQA, arXiv:1905.13648; DocVQA).

Of an answer and a reference, lower case, outer white space removed: 1 - distance / length of the longer one. The best
reference counts.
"""

import datasets
import evaluate

FEATURES = datasets.Features(
    {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
)
THRESHOLD = 0.5


def distance(a, b):
    """Levenshtein: insertions, deletions and substitutions that turn one into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def anls(answer, references):
    """0, or THRESHOLD to 1."""
    best = 0.0
    for reference in references:
        a, b = (" ".join(text.strip().lower().split()) for text in (answer, reference))
        longest = max(len(a), len(b))
        best = max(best, 1 - distance(a, b) / longest if longest else 1.0)
    return best if best >= THRESHOLD else 0.0


class ANLS(evaluate.Metric):
    """Mean over the questions, and the score of every one."""

    def _info(self):
        return evaluate.MetricInfo(description=__doc__, citation="", features=FEATURES)

    def _compute(self, predictions, references):
        scores = [anls(p, r) for p, r in zip(predictions, references)]
        return {"anls": sum(scores) / len(scores), "scores": scores}
