"""Contains: the answer says one of the references in full, whatever it says besides.

For models that answer in sentences. Words are compared, not letters: "4" is not in "14" or "4.5", "red" not in "bored";
case, width and the punctuation around words do not count. In scripts without spaces between words, characters are
compared. A reference without a word in it ("+") is looked for as it stands, one capital letter ("A") as a capital.
An answer that lists everything contains everything: keep answers short, and look at their length beside this score.
"""

import re
import unicodedata

import datasets
import evaluate

FEATURES = datasets.Features(
    {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
)
# A number with its sign, fraction, thousands or parts of a date; a character of a script without spaces; a word.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"(?<!\w)[-−]?\d+(?:[.,:/-]\d+)*(?![^\W{UNSPACED}])|[{UNSPACED}]|(?:(?![{UNSPACED}])\w)+")


def words(text):
    """What is compared, in the case that it has."""
    return WORD.findall(unicodedata.normalize("NFKC", text).replace("−", "-"))


def contains(answer, references):
    """1 or 0."""
    spoken = words(answer)

    def holds(reference):
        wanted, said = words(reference), spoken
        if not wanted:
            return bool(reference.strip()) and reference.strip() in answer
        if len("".join(wanted)) > 1 or not wanted[0].isupper():  # "a" is an article, "A" a choice
            wanted, said = ([word.casefold() for word in found] for found in (wanted, said))
        return any(said[i : i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1))

    return float(any(map(holds, references)))


class Contains(evaluate.Metric):
    """Mean over the questions, and the score of every one."""

    def _info(self):
        return evaluate.MetricInfo(description=__doc__, citation="", features=FEATURES)

    def _compute(self, predictions, references):
        scores = [contains(p, r) for p, r in zip(predictions, references)]
        return {"contains": sum(scores) / len(scores), "scores": scores}
