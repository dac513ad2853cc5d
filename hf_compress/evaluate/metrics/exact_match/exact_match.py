"""Exact match: the answer is one of the references, leaving aside case and white space."""

import datasets
import evaluate

FEATURES = datasets.Features(
    {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
)


def exact_match(answer, references):
    """1 or 0."""
    said = answer.lower().split()
    return float(any(said == reference.lower().split() for reference in references))


class ExactMatch(evaluate.Metric):
    """Mean over the questions, and the score of every one."""

    def _info(self):
        return evaluate.MetricInfo(description=__doc__, citation="", features=FEATURES)

    def _compute(self, predictions, references):
        scores = [exact_match(p, r) for p, r in zip(predictions, references)]
        return {"exact_match": sum(scores) / len(scores), "scores": scores}
