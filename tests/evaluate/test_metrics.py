"""The metric modules against known values and slow, obvious references."""

import random
import shutil
from functools import cache
from itertools import combinations
from pathlib import Path

import evaluate
import pytest

from hf_compress.evaluate import metrics
from hf_compress.evaluate.metrics import METRICS, load_metric, score_answers


def one(name, answer, *references):
    return score_answers(name, [answer], [list(references)])[0]


def test_exact_match():
    assert one("exact_match", " Red  5", "red 5") == 1
    assert one("exact_match", "red", "blue", "Red") == 1
    assert one("exact_match", "red 5", "red") == 0


def test_vqa_accuracy_counts_people():
    """Ten people: 0.3 points per match, as each own answer is set aside in turn."""
    for matches, expected in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        given = ["cat"] * matches + [f"other {i}" for i in range(10 - matches)]
        assert one("vqa_accuracy", "cat", *given) == pytest.approx(expected), matches


def test_vqa_accuracy_is_the_mean_over_all_nine_of_ten():
    rng = random.Random(0)
    for _ in range(30):
        given = [rng.choice("abc") * 2 for _ in range(10)]
        said = rng.choice("abcd") * 2
        if len(set(given)) > 1:
            slow = [min(1, sum(g == said for g in nine) / 3) for nine in combinations(given, 9)]
            assert one("vqa_accuracy", said, *given) == pytest.approx(sum(slow) / 10)


@pytest.mark.parametrize(
    ("said", "normal"),
    [
        ("The Cat.", "cat"),
        ("two", "2"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("1,000", "1000"),  # a comma within a number goes, and with it all punctuation
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("well-known", "well known"),
        ("3.5", "3.5"),
        ("what ?", "what"),
        ("a\nb", "b"),
    ],
)
def test_vqa_accuracy_normalises_where_people_differ(said, normal):
    assert one("vqa_accuracy", said, *[normal] * 9, "x") == 1
    assert one("vqa_accuracy", normal, *[said] * 9, "x") == 1
    if said.strip() != normal:
        assert one("vqa_accuracy", said, *[normal] * 10) == 0  # unanimous answers are compared as they are


def test_vqa_accuracy_needs_several_people():
    with pytest.raises(ValueError, match="several people"):
        one("vqa_accuracy", "cat", "cat")


@cache
def levenshtein(a, b):
    """By the definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(levenshtein(a[1:], b) + 1, levenshtein(a, b[1:]) + 1, levenshtein(a[1:], b[1:]) + (a[0] != b[0]))


def test_anls():
    assert one("anls", "Hello", "hello") == 1
    assert one("anls", "helo", "hello") == pytest.approx(0.8)
    assert one("anls", "abcd", "abxx") == 0.5  # at the threshold
    assert one("anls", "abcde", "abxxx") == 0  # 0.4 counts as nothing
    assert one("anls", "cat", "dog", "cats") == 0.75  # the best reference
    rng = random.Random(0)
    for _ in range(40):
        a, b = ("".join(rng.choices("ab ", k=rng.randint(1, 7))).strip() or "a" for _ in range(2))
        a, b = " ".join(a.split()), " ".join(b.split())
        expected = 1 - levenshtein(a, b) / max(len(a), len(b))
        assert one("anls", a, b) == pytest.approx(expected if expected >= 0.5 else 0), (a, b)


def test_f1():
    assert one("f1", "the cat", "Cat!") == 1
    assert one("f1", "black cat", "cat") == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert one("f1", "cat cat", "cat dog") == 0.5  # a word counts as often as both have it
    assert one("f1", "dog", "cat", "big dog") == pytest.approx(2 / 3)
    assert one("f1", "the", "a") == 1 and one("f1", "the", "cat") == 0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The color of the ball is red.", "Red", 1),
        ("He looked bored.", "red", 0),
        ("There are 14 of them.", "4", 0),
        ("There are 4.", "4", 1),
        ("It costs $1.50!", "1.50", 1),
        ("It costs 1.50", "1", 0),
        ("about 1,000 people", "1,000", 1),
        ("about 1,000 people", "000", 0),
        ("-5 degrees", "5", 0),
        ("−5 degrees", "-5", 1),
        ("on 2020-01-01.", "2020-01-01", 1),
        ("on 2020-01-01.", "2020", 0),
        ("agent 007 it is", "7", 0),
        ("a red, round ball", "red round", 1),
        ("round and red", "red round", 0),
        ("red", "red ball", 0),
        ("New\n York", "new york", 1),
        ("ＲＥＤ", "red", 1),
        ("答案是红色。", "红色", 1),
        ("答案是红色。", "蓝色", 0),
        ("the sign is +", "+", 1),
        ("the sign is -", "+", 0),
        ("", "red", 0),
        ("It is a cat, so B.", "A", 0),
        ("It is a cat, so B.", "B", 1),
        ("(A) a cat", "A", 1),
        ("I don't know", "don't", 1),
    ],
)
def test_contains(answer, reference, expected):
    assert one("contains", answer, reference) == one("contains", answer, "no such word", reference) == expected


def test_contains_is_what_exact_match_is_on_short_answers():
    for said in ("red", "5", "New York", "+", "A"):
        assert one("contains", said, said) == one("exact_match", said, said) == 1


def test_modules_report_the_mean():
    for name in METRICS:
        found = load_metric(name).compute(predictions=["a b", "c d"], references=[["a b", "a b"], ["x y", "z w"]])
        assert found["scores"][1] == 0 and found[name] == sum(found["scores"]) / 2 > 0


def test_wrong_arguments():
    with pytest.raises(ValueError, match="metric='bleu' is not one of exact_match"):
        load_metric("bleu")
    with pytest.raises(ValueError, match="2 answers for 1"):
        score_answers("f1", ["a", "b"], [["a"]])


@pytest.mark.parametrize("name", METRICS)
def test_a_folder_is_a_module_by_itself(name, tmp_path):
    """Copied elsewhere it still loads, offline: it needs nothing of this package."""
    folder = shutil.copytree(Path(metrics.__file__).parent / name, tmp_path / name)
    assert "hf_compress" not in (folder / f"{name}.py").read_text()
    found = evaluate.load(str(folder), keep_in_memory=True).compute(predictions=["a"], references=[["a", "a"]])
    assert found[name] == found["scores"][0] > 0
