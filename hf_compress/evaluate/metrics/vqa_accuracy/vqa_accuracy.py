"""VQA accuracy: an answer counts in full where at least three other people gave it (arXiv:1505.00468, VQAv2).

For each of the people's answers in turn, min(1, matches among the others / 3); the mean over people. Where the people
do not all say the same, answers are normalised first as the official evaluation does (vqaEval.py): punctuation removed
or replaced by a space, lower case, number words to digits, articles removed, apostrophes put back. Its oddities are
kept: 32 periods at most are removed, and unanimous answers are compared as they are.
"""

import re

import datasets
import evaluate

FEATURES = datasets.Features(
    {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
)
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(i) for i, word in enumerate(NUMBERS)}}
ARTICLES = {"a", "an", "the"}
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# One apostrophe forgotten -> the word with all of them. The official table has the last entry the wrong way round.
APOSTROPHES = {w[:i] + w[i + 1 :]: w for w in CONTRACTED.split() for i, c in enumerate(w) if c == "'"}
APOSTROPHES["somebody'd"] = "somebodyd"


def normalise(text):
    """An answer as the official evaluation compares it."""
    number = COMMA_IN_NUMBER.search(text)
    out = text
    for p in PUNCTUATION:
        out = out.replace(p, "" if number or f"{p} " in text or f" {p}" in text else " ")
    out = PERIOD.sub("", out, count=32)
    words = [DIGITS.get(word, word) for word in out.lower().split()]
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer, references):
    """0 to 1.

    Raises:
        ValueError: fewer than two references, so that nothing is left when one is set aside.
    """
    if len(references) < 2:
        raise ValueError(f"references={references}: VQA accuracy needs the answers of several people, usually ten")
    said, *given = (re.sub(r"[\n\t]", " ", text).strip() for text in (answer, *references))
    if len(set(given)) > 1:
        said, given = normalise(said), [normalise(reference) for reference in given]
    matches = given.count(said)
    return sum(min(1, (matches - (reference == said)) / 3) for reference in given) / len(given)


class VQAAccuracy(evaluate.Metric):
    """Mean over the questions, and the score of every one."""

    def _info(self):
        return evaluate.MetricInfo(description=__doc__, citation="", features=FEATURES)

    def _compute(self, predictions, references):
        scores = [vqa_accuracy(p, r) for p, r in zip(predictions, references)]
        return {"vqa_accuracy": sum(scores) / len(scores), "scores": scores}
