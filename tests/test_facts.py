"""The trained model that recalls facts from running text: what ships, its texts, and what it tells of cache methods."""

from itertools import pairwise

import pytest

import hf_compress
from hf_compress.demo.facts_data import load_facts, make_context, owners
from hf_compress.demo.recall_data import KINDS, SPLITS, answer
from hf_compress.evaluate import exact_match
from hf_compress.evaluate.tasks import load_task
from tests.recalls import check_length, check_repeatable, check_shipped

LENGTH = 512


@pytest.fixture(scope="module")
def facts():
    """What `hf_compress.load_demo("facts")` returns: leave the model as it was."""
    return hf_compress.load_demo("facts")


@pytest.fixture(scope="module")
def data():
    """40 questions about 8 contexts whose pairs of name and thing the model never met."""
    return load_facts("test", contexts=8, length=LENGTH)


def share_right(facts, rows, turns=1):
    right = exact_match(answer(*facts, rows, turns=turns), rows["answer"])
    return sum(right) / len(right)


def test_what_ships(facts):
    check_shipped("facts", *facts)


@pytest.mark.parametrize("length", [128, 300, LENGTH, 1024])
def test_prompts_have_the_length_asked_for(facts, length):
    check_length(facts[1], load_facts("test", contexts=3, length=length), length)


def test_same_arguments_same_data(data):
    check_repeatable(load_facts, data, LENGTH)
    task = load_task("demo:facts", 7)
    assert task.questions == data["question"][:7] and task.modality == "text"


def test_splits_share_no_pair():
    train, test = (set(owners(split)) for split in SPLITS)
    assert not train & test and len(train | test) == 576
    for split, allowed in zip(SPLITS, (train, test)):
        for index in range(8):
            words = make_context(split, index)[0].split()
            stated = {(a, b) for of, a, b in zip(words, words[1:], words[2:]) if of == "of" and (a, b) in train | test}
            assert stated and stated <= allowed


def test_facts_stand_where_the_kind_says():
    for index in range(32):
        context, questions = make_context("test", index, LENGTH)
        assert list(questions) == list(KINDS)
        words = context.split()
        stated = [fact.statement for fact in questions.values()]
        places = [[i for i in range(len(words)) if tuple(words[i : i + 9]) == words_of] for words_of in stated]
        assert [len(found) for found in places] == [1, 1, 1, 3, 1]
        early, middle, late = (found[0] / len(words) for found in places[:3])
        assert early < 0.45 and 0.2 < middle < 0.8 and late > 0.55  # thirds of the filler, so not quite of the words
        similar = questions["similar"]
        assert words.count(similar.thing) == 3  # the name may stand in the text, too


def test_no_text_is_told_twice():
    """Of the sentences of a context that say how somebody is called, few stand in the next one."""
    told = [{s for s in make_context("test", index)[0].split(" . ") if len(s.split()) > 6} for index in range(9)]
    assert all(len(one) > 20 for one in told)
    assert sum(len(one & other) for one, other in pairwise(told)) <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_facts("dev"), "split='dev'"),
        (lambda: load_facts(length=127), "length=127"),
        (lambda: load_facts(contexts=0), "contexts=0"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("turns", [1, 2])
def test_uncompressed_answers(facts, data, turns):
    assert share_right(facts, data, turns) >= 0.9


def test_prompts_of_other_lengths(facts):
    assert share_right(facts, load_facts("test", contexts=4, length=1024)) >= 0.85


def test_the_answer_is_in_the_context(facts, data):
    other = data.map(lambda row: {"context": make_context("test", 99, LENGTH)[0]}, load_from_cache_file=False)
    assert share_right(facts, other) <= 0.05


def test_what_is_asked_later_was_not_attended_to(facts, data):
    """The text draws attention to itself: who keeps what it looks at loses facts, who can repeat it all keeps them."""
    model, _ = facts
    found = {}
    for method in ("kvzip", "snapkv", "kvrandom"):
        with model.compressed(method, ratio=0.75):
            found[method] = share_right(facts, data, turns=2)
    assert found["kvzip"] > found["snapkv"] + 0.2 > found["kvrandom"] + 0.2
    with model.compressed("snapkv", ratio=0.75):
        assert share_right(facts, data, turns=1) > found["snapkv"] + 0.2  # the question is in its window
