"""recipes/real: texts with facts, what is asked of them, runs that go on, agreement of boards; on the recall model."""

import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hf_compress
from hf_compress.demo.recall_data import answer, load_recall

RECIPE = Path(__file__).parents[1] / "recipes" / "real"


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPE))
    import board
    import facts
    import heads
    import perplexity
    import run
    import texts

    yield SimpleNamespace(texts=texts, facts=facts, heads=heads, perplexity=perplexity, board=board, run=run)
    sys.path.remove(str(RECIPE))
    for name in ("texts", "facts", "heads", "perplexity", "board", "run"):
        sys.modules.pop(name)


class Words:
    """A tokenizer of words."""

    def __call__(self, text, **_):
        return type("Ids", (), {"input_ids": text.split()})


def test_passages_are_running_text_of_bounded_length(recipe):
    texts = recipe.texts
    found = [p for p, _ in zip(texts.passages(Words(), 200), range(20))]
    assert all(100 < len(p.split()) <= 200 for p in found) and len(set(found)) == 20
    assert found == [p for p, _ in zip(texts.passages(Words(), 200), range(20))]
    assert found != [p for p, _ in zip(texts.passages(Words(), 200, seed=1), range(20))]


def test_every_fact_stands_once_and_is_asked_for(recipe):
    texts = recipe.texts
    passage = next(texts.passages(Words(), 300))
    text, asked = texts.with_facts(passage, 4, random.Random(0))
    places = []
    for question, code in asked:
        name, thing = re.match(r"What is the code of (\w+)'s (\w+)\?", question).groups()
        assert text.count(texts.FACT.format(name=name, thing=thing, code=code)) == 1 and text.count(code) == 1
        places.append(text.index(code))
    assert places == sorted(places) and len(set(asked)) == 4


@pytest.fixture(scope="module")
def recall():
    return hf_compress.load_demo("recall")


def test_likelihood_is_that_of_a_hand_written_loop(recipe, recall):
    model, _ = recall
    ids = torch.randint(5, 100, (1, 60), generator=torch.Generator().manual_seed(0))
    found = recipe.perplexity.likelihood(model, ids[:, :48], ids[:, 48:])
    with torch.no_grad():
        logits = model(ids).logits[0].double()
    own = sum(float(logits[i].log_softmax(-1)[ids[0, i + 1]]) for i in range(48, 59)) / 11
    assert found == pytest.approx(own, rel=1e-4)
    with hf_compress.compressed(model, "streaming", ratio=0.5):
        assert recipe.perplexity.likelihood(model, ids[:, :48], ids[:, 48:]) != found


@pytest.mark.parametrize("method", [None, "snapkv", "kivi", "adakv"])
def test_questions_behind_one_reading_are_answered_as_each_behind_its_own(recipe, recall, method):
    model, tokenizer = recall
    rows = load_recall("test", contexts=1, length=160)
    context, questions = rows["context"][0], rows["question"]
    reads = []
    hook = model.register_forward_hook(lambda *call: reads.append(call[-1].logits.shape[0]))
    config = None if method is None else hf_compress.compress(model, method, ratio=0.5)
    try:
        found = recipe.facts.ask_later(model, tokenizer, context, questions)
        count = reads.count(1)
        assert found == answer(model, tokenizer, rows, batch_size=1, turns=2)
        within = recipe.facts.ask_within(model, tokenizer, context, questions)
        assert within == answer(model, tokenizer, rows, batch_size=1)
    finally:
        hook.remove()
        if config is not None:
            model.decompress()
    assert count == 1  # the context


def test_digits_that_are_told(recipe):
    told = recipe.facts.digits_told
    assert told("The code of Anna's locker is 6953.", "6953") == 4
    assert told("It is 6913, or 12.", "6953") == 2
    assert told("I do not know.", "6953") == 0 and told("16953", "6953") == 0


SETTINGS = {"tokens": 200, "texts": 2, "contexts": 2, "facts": 2, "within": 1, "seed": 0, "ratio": 0.5}
OF_PAGE = {"model": "recall", "dtype": "float32", "after": 64, "python": "3", "torch": "2", "transformers": "5"}


class Tokenizer(Words):
    """Ids of words for texts, and answers that are never given by a model."""

    def __call__(self, text, **options):
        ids = super().__call__(text).input_ids
        return SimpleNamespace(input_ids=torch.tensor([[len(w) + 5 for w in ids]]) if options else ids)


def test_a_run_goes_on_where_it_was_stopped_and_says_what_a_method_refuses(recipe, recall, tmp_path, monkeypatch):
    model, _ = recall
    calls = []

    def told(judged, tokenizer, context, questions):
        calls.append(judged.compression)
        return [re.search(rf"{q[12:].split('?')[0]} is (\d+)", context)[1] for q in questions]

    monkeypatch.setattr(recipe.run, "ask_later", told)
    monkeypatch.setattr(recipe.run, "ask_within", told)
    file = tmp_path / "results.json"
    for _ in range(2):
        judge = recipe.run.Judge(model, Tokenizer(), SETTINGS | OF_PAGE, file)
        for label, (method, knobs) in recipe.run.variants(["snapkv", "kvrandom"], tmp_path).items():
            judge.judge(label, method, knobs)
        judge.judge("razor", "razor", {})
        assert len(calls) == 3 * 2 * 2 and model.compression is None
    found = json.loads(file.read_text())
    assert found["rows"]["snapkv"]["later"] == [[4, 4], [4, 4]] and found["rows"]["snapkv"]["within"] == [[4], [4]]
    assert "retrieval heads" in found["refused"]["razor"] and "razor" not in found["rows"]
    with pytest.raises(ValueError, match="name another folder"):
        recipe.run.Judge(model, Tokenizer(), SETTINGS | OF_PAGE | {"facts": 3}, file)
    recipe.board.write_board([file], tmp_path / "board.md")
    page = (tmp_path / "board.md").read_text()
    assert "| snapkv |" in page and "`razor` is refused" in page and "RULER 4k" in page


def test_needles_are_the_rows_that_state_the_fact(recipe, recall, monkeypatch):
    _, tokenizer = recall
    monkeypatch.setattr(recipe.heads, "PROMPTS", 3)
    written = []

    def render(tokenizer, question, context):
        written.append(f"{context} {question}")
        return written[-1]

    monkeypatch.setattr(recipe.heads, "render", render)
    found = recipe.heads.prompts(tokenizer, 300)
    for text, one in zip(written, found):
        start, stop = one["needle"]
        words = ["<s>", *text.split()]  # a token is a word
        assert one["input_ids"].shape == (1, len(words)) and "offset_mapping" not in one
        assert re.fullmatch(r"The code of \w+'s \w+ is \d{4}\.", " ".join(words[start:stop]))
    assert len(found) == 3


def test_heads_are_given_to_the_methods_that_want_them(recipe, tmp_path):
    found = recipe.run.variants(["razor", "compresskv", "snapkv"], tmp_path)
    assert found["razor"] == ("razor", {"heads_file": str(tmp_path / "retrieval_heads.json")})
    assert found["compresskv, all heads"] == ("compresskv", {}) and found["snapkv"] == ("snapkv", {})


def test_published_scores_name_methods_and_where_they_stand(recipe):
    names = {*hf_compress.methods("cache"), "none"}
    for one in json.loads(recipe.board.PUBLISHED.read_text()):
        assert one["scores"].keys() <= names and all(0 <= score <= 100 for score in one["scores"].values())
        assert one["address"].startswith("https://") and one["read"] and one["model"] and one["benchmark"]
        assert (one["removed"] is None) == ("kept" in one)
