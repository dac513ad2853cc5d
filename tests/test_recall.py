"""The trained model that recalls facts: what ships, what it can do, and that it tells cache methods apart."""

from itertools import pairwise

import pytest

import hf_compress
from hf_compress.demo.recall_data import KINDS, LAST_NAMES, SPLITS, answer, load_recall, make_context, people
from hf_compress.evaluate import difference, exact_match
from tests.recalls import check_length, check_repeatable, check_shipped

LENGTH = 512


@pytest.fixture(scope="module")
def recall():
    """What `hf_compress.load_demo("recall")` returns: leave the model as it was."""
    return hf_compress.load_demo("recall")


@pytest.fixture(scope="module")
def data():
    """60 questions about 12 contexts whose people the model never met."""
    return load_recall("test", contexts=12, length=LENGTH)


@pytest.fixture(scope="module")
def right(recall, data):
    """Right answers under a compression, computed once per module."""
    model, tokenizer = recall
    known = {}

    def run(method=None, ratio=None, turns=1, **knobs):
        key = (method, ratio, turns, *sorted(knobs.items()))
        if key not in known:
            if method is not None:
                model.compress(method, ratio=ratio, **knobs)
            try:
                known[key] = exact_match(answer(model, tokenizer, data, turns=turns), data["answer"])
            finally:
                if method is not None:
                    model.decompress()
        return known[key]

    return run


def share(correct):
    return sum(correct) / len(correct)


def test_what_ships(recall):
    check_shipped("recall", *recall)


@pytest.mark.parametrize("length", [96, 128, 300, LENGTH, 1024])
def test_prompts_have_the_length_asked_for(recall, length):
    check_length(recall[1], load_recall("test", contexts=3, length=length), length)


def test_same_arguments_same_data(data):
    check_repeatable(load_recall, data, LENGTH)


def test_splits_share_no_person():
    train, test = (set(people(split)) for split in SPLITS)
    assert not train & test and len(train | test) == 576
    for split, allowed in zip(SPLITS, (train, test)):
        for index in range(8):
            words = make_context(split, index)[0].split()
            stated = {pair for pair in pairwise(words) if pair[1] in LAST_NAMES}
            assert stated and stated <= allowed


def test_facts_stand_where_the_kind_says():
    for index in range(32):
        context, questions = make_context("test", index, LENGTH)
        assert list(questions) == list(KINDS)
        words = context.split()
        stated = [fact.statement for fact in questions.values()]
        places = [[i for i in range(len(words)) if tuple(words[i : i + 5]) == words_of] for words_of in stated]
        assert [len(found) for found in places] == [1, 1, 1, 3, 1]
        early, middle, late = (found[0] / len(words) for found in places[:3])
        assert early < 0.45 and 0.2 < middle < 0.8 and late > 0.55  # thirds of the filler, so not quite of the words
        similar, names = questions["similar"], list(pairwise(words))
        assert len({last for first, last in names if first == similar.first}) == 3
        assert len({first for first, last in names if last == similar.last}) == 3
        for fact in [*questions.values()][:4]:  # nobody else has either of these names
            assert {pair for pair in names if fact.first == pair[0] or fact.last == pair[1]} == {
                (fact.first, fact.last)
            }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_recall("dev"), "split='dev'"),
        (lambda: load_recall(length=50), "length=50"),
        (lambda: load_recall(contexts=0), "contexts=0"),
        (lambda: answer(None, None, [], turns=3), "turns=3"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("turns", [1, 2])
def test_uncompressed_answers(right, turns):
    assert share(right(turns=turns)) >= 0.95


def test_prompts_of_other_lengths(recall):
    rows = load_recall("test", contexts=4, length=1024)
    assert share(exact_match(answer(*recall, rows), rows["answer"])) >= 0.95


def test_the_answer_is_in_the_context(recall, data):
    other = data.map(lambda row: {"context": make_context("test", 99, LENGTH)[0]}, load_from_cache_file=False)
    assert share(exact_match(answer(*recall, other), data["answer"])) <= 0.05


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_attention_of_the_question_beats_recency(right, data, ratio):
    """SnapKV, which sees the question, against the newest entries, context by context."""
    assert difference(right("snapkv", ratio), right("streaming", ratio), data["context_id"])[1] > 0.1


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_attention_of_the_question_beats_chance(right, data, ratio):
    """The window and the sinks that it could keep for nothing are given to the control too."""
    chance = right("kvrandom", ratio, sinks=4, window=32)
    assert difference(right("snapkv", ratio), chance, data["context_id"])[1] > 0.1


def test_an_unknown_question_is_harder(right):
    """In a second turn the window of SnapKV has not seen the question."""
    assert share(right("snapkv", 0.75, turns=2)) < share(right("snapkv", 0.75)) - 0.2
