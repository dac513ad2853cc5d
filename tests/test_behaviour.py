"""On the trained model that ships: what the literature says of the methods must show, question by question."""

import pytest

from hf_compress.demo.dataset import load_scenes
from hf_compress.evaluate import answer, difference, exact_match


@pytest.fixture(scope="module")
def scenes():
    """96 questions about 24 scenes that the model never saw."""
    return load_scenes("test", images=24, questions=4)


@pytest.fixture(scope="module")
def right(demo, scenes):
    """Right answers under a compression, computed once per module."""
    model, processor = demo
    known = {}

    def run(method=None, ratio=None, **knobs):
        key = (method, ratio, *sorted(knobs.items()))
        if key not in known:
            if method is not None:
                model.compress(method, ratio=ratio, **knobs)
            try:
                known[key] = exact_match(answer(model, processor, scenes, 16), scenes["answer"])
            finally:
                if method is not None:
                    model.decompress()
        return known[key]

    return run


def share(correct):
    return sum(correct) / len(correct)


def test_uncompressed_answers(right):
    assert share(right()) >= 0.9


@pytest.mark.parametrize("method", ["fastervlm", "vtc_cls", "visionzip", "divprune"])
def test_beats_random_at_equal_budget(right, scenes, method):
    """At 22 of 196 tokens the interval of the paired difference lies above zero."""
    low = difference(right(method, 0.89), right("random", 0.89), scenes["image_id"])[1]
    assert low > 0.05


def test_merging_beats_dropping_at_random(right, scenes):
    assert difference(right("tome", 0.75), right("random", 0.75), scenes["image_id"])[1] > 0


def test_half_of_the_tokens_are_enough(right):
    """By [CLS] attention or diversity, half of the visual tokens answer as well as all of them, within five points."""
    for method in ("fastervlm", "divprune", "tome"):
        assert share(right(method, 0.5)) >= share(right()) - 0.05


@pytest.mark.parametrize("method", ["snapkv", "h2o"])
def test_half_of_the_cache_is_enough(right, method):
    """Answers of up to four tokens, the first of which still saw everything."""
    assert share(right(method, 0.5)) >= share(right()) - 0.05
