"""F1 of the words of answer and reference, as SQuAD counts it (arXiv:1606.05250, evaluate-v1.1.py).

Lower case; punctuation and the articles a, an, the removed. The best reference counts. Where one side has no words
left, the score is 1 if both have none, else 0 (evaluate-v2.0.py).
"""

import re
import string
from collections import Counter

import datasets
import evaluate

FEATURES = datasets.Features(
    {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
)


def words(text):
    """The words that count."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def f1(answer, references):
    """Of the best reference."""

    def score(reference):
        a, b = words(answer), words(reference)
        common = sum((Counter(a) & Counter(b)).values())
        if not a or not b:
            return float(a == b)
        return 2 * common / (len(a) + len(b))  # the harmonic mean of common / len(a) and common / len(b)

    return max(map(score, references), default=0.0)


class F1(evaluate.Metric):
    """Mean over the questions, and the score of every one."""

    def _info(self):
        return evaluate.MetricInfo(description=__doc__, citation="", features=FEATURES)

    def _compute(self, predictions, references):
        scores = [f1(p, r) for p, r in zip(predictions, references)]
        return {"f1": sum(scores) / len(scores), "scores": scores}
