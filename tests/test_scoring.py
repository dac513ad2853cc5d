import pytest

from hf_compress.demo.dataset import load_scenes
from hf_compress.evaluate import answer, difference, exact_match, score


def test_exact_match_ignores_case_and_space():
    assert exact_match(["Red 5 ", "top left", ""], ["red 5", "top  left", "no"]) == [True, True, False]
    with pytest.raises(ValueError, match="2 answers for 1"):
        exact_match(["a", "b"], ["a"])


def test_score_is_the_wilson_interval():
    s = score([True] * 8 + [False] * 2)
    assert s.accuracy == 0.8 and (s.low, s.high) == pytest.approx((0.4901625, 0.9433178))  # Wilson 1927
    assert str(s) == "80.0% [49.0%, 94.3%]"
    assert score([True] * 5).high == 1 and score([True] * 5).low < 0.6
    with pytest.raises(ValueError, match="empty"):
        score([])
    with pytest.raises(ValueError, match="confidence"):
        score([True], 95)


def test_difference_is_paired_and_seeded():
    a, b = [True] * 30 + [False] * 10, [True] * 20 + [False] * 20
    mean, low, high = difference(a, b)
    assert mean == 0.25 and 0 < low < 0.25 < high and (mean, low, high) == difference(a, b)
    assert difference(a, a) == (0, 0, 0)
    wide = difference(a, b, groups=[i // 5 for i in range(40)])  # questions of one image go together
    assert wide[2] - wide[1] > high - low
    with pytest.raises(ValueError, match="entries"):
        difference(a, b[:-1])


def test_answer_does_not_depend_on_the_batch_size(demo):
    model, processor = demo
    data, seen = load_scenes("test", 3, 2), []
    together = answer(model, processor, data, 6, seen.append)
    assert seen == [6] and len(together) == 6
    assert answer(model, processor, data, 4, seen.append) == together and seen == [6, 4, 2]
    assert sum(exact_match(together, data["answer"])) >= 4  # a trained model
    with pytest.raises(ValueError, match="batch_size=0"):
        answer(model, processor, data, 0)
