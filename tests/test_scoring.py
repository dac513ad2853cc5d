import numpy as np
import pytest
from scipy.stats import binomtest, norm

from hf_compress.demo.dataset import load_scenes
from hf_compress.evaluate import answer, difference, exact_match, interval, mean_of, score
from hf_compress.evaluate.intervals import DIFFERENCES


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


def test_a_score_of_several_questions_per_image():
    right = [True] * 36 + [False] * 4
    alone, together = score(right), score(right, groups=[i // 4 for i in range(40)])
    assert together.accuracy == alone.accuracy and together.high - together.low > 1.2 * (alone.high - alone.low)
    assert score([False] * 8, groups=list(range(8))).high > 0.3
    with pytest.raises(ValueError, match="3 groups"):
        score([True, False], groups=[1, 2, 3])


def test_difference_is_paired():
    a, b = [True] * 30 + [False] * 10, [True] * 20 + [False] * 20
    mean, low, high = difference(a, b)
    assert mean == 0.25 and 0 < low < 0.25 < high and (mean, low, high) == difference(a, b)
    wide = difference(a, b, groups=[i // 5 for i in range(40)])  # questions of one image go together
    assert wide[2] - wide[1] > high - low
    assert difference(b, a)[1:] == pytest.approx((-high, -low))
    turned = difference(a[::-1], b[::-1], groups=[f"image {i // 5}" for i in range(40)][::-1])
    assert turned == pytest.approx(wide)
    with pytest.raises(ValueError, match="entries"):
        difference(a, b[:-1])
    values = [float(x) - y for x, y in zip(a, b)]
    assert interval(values, bounds=DIFFERENCES) == (mean, low, high)
    with pytest.raises(ValueError, match=r"values=\[-1.0, -1.0, -1.0\]"):
        interval([-x for x in values])
    with pytest.raises(ValueError, match="correct="):
        difference([1.5], [0])
    with pytest.raises(ValueError, match="confidence=95"):
        difference(a, b, confidence=95)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 6, 30])
def test_no_interval_without_width(n):
    """Where all images agree the interval is that of the sign test, and of Clopper & Pearson, with the same verdict."""
    up, same = mean_of([1.0] * n, bounds=DIFFERENCES), mean_of([0.0] * n, bounds=DIFFERENCES)
    sign_test = binomtest(n, n).pvalue
    assert up.p_value() == pytest.approx(sign_test) and (up.interval()[0] > 0) == (sign_test < 0.05)
    low, high = same.interval()
    assert -low == high > 1 - 0.05 ** (1 / n) and same.p_value() == 1
    exact = binomtest(0, n).proportion_ci(0.95, method="exact")
    assert mean_of([0.0] * n).interval() == pytest.approx((exact.low, exact.high))
    one = difference([1, 1, 1, 0], [0, 1, 0, 0], ["a"] * 4)  # four questions about one image
    assert one[1] < 0 < one[0] and one[2] > 0.8


def test_the_interval_of_independent_answers_is_wilsons():
    """With one question per image and many of them t is z, and a variance between images that of answers."""
    right = [True] * 3000 + [False] * 1000
    wilson = binomtest(3000, 4000).proportion_ci(0.95, method="wilson")
    assert mean_of(right).interval() == pytest.approx((wilson.low, wilson.high), abs=1e-4)
    p = mean_of([1.0] * 5100 + [-1.0] * 4900, bounds=DIFFERENCES).p_value()
    assert p == pytest.approx(2 * norm.sf(2.0), rel=0.01)  # the score test of 5100 of 10000, z = 0.01 / 0.005


@pytest.mark.parametrize("values", [[1, -1, 0, 0.5, 0.25, 0.5], [0.2, 0.3, 0.1, 0.9], [0.5] * 9, [1.0] * 4])
def test_p_value_and_interval_agree(values):
    found = mean_of(values, bounds=DIFFERENCES)
    assert found.interval(1 - found.p_value() * 0.999)[0] < 0 < found.interval(1 - found.p_value() * 1.001)[0]


@pytest.mark.parametrize("sizes", [[4] * 8, [1, 2, 4, 9], [1, 1, 1, 1, 20], [3, 4, 5] * 5])
def test_variance_and_freedom_against_matrices(sizes):
    """CR2 of a mean, written out for all questions (Bell & McCaffrey 2002), answers of an image all alike."""
    rng, n, G = np.random.default_rng(0), sum(sizes), len(sizes)
    groups, values = np.repeat(np.arange(G), sizes), rng.random(n)
    hat, member = np.full((n, n), 1 / n), groups[:, None] == np.arange(G)
    columns = []
    for g in range(G):
        own = np.flatnonzero(member[:, g])
        block = np.eye(len(own)) - hat[np.ix_(own, own)]
        weight, turn = np.linalg.eigh(block)
        root = turn @ np.diag(weight**-0.5) @ turn.T
        columns.append((np.eye(n) - hat)[own].T @ root @ np.full(len(own), 1 / n))
    columns = np.array(columns)  # one row per image; the variance is the sum of (columns @ values)^2
    found = mean_of(values.tolist(), groups.tolist())
    assert found.variance == pytest.approx(((columns @ values) ** 2).sum())
    between = columns @ member @ member.T @ columns.T
    assert found.freedom == pytest.approx(np.trace(between) ** 2 / (between**2).sum())


@pytest.mark.parametrize(("images", "least", "most"), [(4, 0.94, 0.975), (8, 0.94, 0.96), (25, 0.94, 0.96)])
def test_intervals_cover(images, least, most):
    """A method and a control of three seeds, equally good, four questions per image; a larger run in benchmarks/."""
    rng, sets, held = np.random.default_rng(1), 2000, 0
    groups = np.repeat(np.arange(images), 4).tolist()
    for _ in range(sets):
        easy = rng.normal(size=(images, 1))
        answers = (easy + rng.normal(size=(4, images, 4)) < 0).reshape(4, -1).astype(float)
        _, low, high = difference(answers[0].tolist(), answers[1:].mean(0).tolist(), groups)
        held += low <= 0 <= high
    error = 2 * (0.95 * 0.05 / sets) ** 0.5  # of the simulation
    assert least - error < held / sets < most + error


def test_answer_does_not_depend_on_the_batch_size(demo):
    model, processor = demo
    data, seen = load_scenes("test", 3, 2), []
    together = answer(model, processor, data, 6, seen.append)
    assert seen == [6] and len(together) == 6
    assert answer(model, processor, data, 4, seen.append) == together and seen == [6, 4, 2]
    assert sum(exact_match(together, data["answer"])) >= 4  # a trained model
    with pytest.raises(ValueError, match="batch_size=0"):
        answer(model, processor, data, 0)
