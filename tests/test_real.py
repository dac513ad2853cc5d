"""recipes/real: texts with facts, perplexity behind a compressed context, agreement of boards; on the recall model."""

import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch

import hf_compress

RECIPE = Path(__file__).parents[1] / "recipes" / "real"


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPE))
    import board
    import perplexity
    import texts

    yield texts, perplexity, board
    sys.path.remove(str(RECIPE))
    for name in ("texts", "perplexity", "board"):
        sys.modules.pop(name)


class Words:
    """A tokenizer of words."""

    def __call__(self, text, **_):
        return type("Ids", (), {"input_ids": text.split()})


def test_passages_are_running_text_of_bounded_length(recipe):
    texts, *_ = recipe
    found = [p for p, _ in zip(texts.passages(Words(), 200), range(20))]
    assert all(100 < len(p.split()) <= 200 for p in found) and len(set(found)) == 20
    assert found == [p for p, _ in zip(texts.passages(Words(), 200), range(20))]
    assert found != [p for p, _ in zip(texts.passages(Words(), 200, seed=1), range(20))]


def test_every_fact_stands_once_and_is_asked_for(recipe):
    texts, *_ = recipe
    passage = next(texts.passages(Words(), 300))
    text, asked = texts.with_facts(passage, 4, random.Random(0))
    places = []
    for question, code in asked:
        name, thing = re.match(r"What is the code of (\w+)'s (\w+)\?", question).groups()
        assert text.count(texts.FACT.format(name=name, thing=thing, code=code)) == 1 and text.count(code) == 1
        places.append(text.index(code))
    assert places == sorted(places) and len(set(asked)) == 4


def test_perplexity_is_that_of_a_hand_written_loop(recipe):
    _, perplexity, _ = recipe
    model, _ = hf_compress.load_demo("recall")
    ids = [torch.randint(5, 100, (1, 60), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    found = perplexity.perplexities(model, ids, 48, ["streaming", "kvrandom", "razor"], 0.5)
    sums = []
    with torch.no_grad():
        for one in ids:
            logits = model(one).logits[0].double()
            sums.append(sum(float(logits[i].log_softmax(-1)[one[0, i + 1]]) for i in range(48, 59)) / 11)
    assert found["none"] == pytest.approx(math.exp(-sum(sums) / 2), rel=1e-4)
    assert found["streaming"] != found["none"] and "retrieval heads" in found["razor"]
    assert model.compression is None


def test_agreement_leaves_controls_and_the_bare_model_out(recipe):
    *_, board = recipe
    one = {"none": 0, "kvrandom": 100, "snapkv": 3, "h2o": 2, "tova": 1}
    tau, _, n = board.agreement(one, {"none": 100, "kvrandom": 0, "snapkv": 30, "h2o": 20, "tova": 10, "knorm": 5})
    assert (tau, n) == (pytest.approx(1), 3)
