"""Answers that are cut are counted, and a board whose uncompressed model knows nothing gives no marks."""

import pytest

import hf_compress
from hf_compress.evaluate import sweep, tables
from hf_compress.evaluate.prompts import encode_rows, reply
from hf_compress.evaluate.results import Results, best_constant
from hf_compress.evaluate.tasks import load_task

QUIET = dict(timed=False, progress=False, device="cpu")


def test_the_best_constant_answer():
    answers = [["yes"], ["Yes"], ["no"], ["yes", "no"]]
    assert best_constant("exact_match", answers) == ("yes", 0.75)
    assert best_constant("f1", [["a cat"], ["dog"], ["cat"]]) == ("a cat", pytest.approx(2 / 3))
    assert best_constant("contains", [["A"], ["A", "B"], ["C"]]) == ("A", pytest.approx(2 / 3))  # a capital is one
    ten = ["a"] * 3 + ["b"] * 7
    assert best_constant("vqa_accuracy", [ten, ten]) == ("b", 1)


def test_cut_answers_are_counted(demo):
    """Those without an end mark among as many tokens as were allowed; by the tokens that `generate` returns."""
    model, processor = demo
    task = load_task("demo:scenes", 8)
    batch = encode_rows(processor, list(range(8)), task.questions, task.shown(range(8)))
    end = model.generation_config.eos_token_id
    for limit in (1, 2, 16):
        inputs = batch.inputs
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=limit)[:, inputs["input_ids"].shape[1] :]
        expected = [end not in row for row in tokens.tolist()]
        assert [r["cut"] for r in reply(model, processor, batch, limit)] == expected
    assert not any(expected)
    model.generation_config.eos_token_id = None  # a model that never ends
    try:
        assert all(r["cut"] for r in reply(model, processor, batch, 3))
        model.generation_config.eos_token_id = [end, 0]
        assert not any(r["cut"] for r in reply(model, processor, batch, 16))
    finally:
        model.generation_config.eos_token_id = end


def test_a_board_at_the_floor_says_so(demo, tmp_path):
    """References that nobody could give: no marks, in the page, the figure and the table; the other board has them."""
    model, processor = demo
    found = {}
    for name, wanted in (("right", None), ("floor", "zebra")):
        task = load_task("demo:scenes", 8)
        if wanted:
            task.answers = [[f"{wanted} {i % 3}"] for i in range(8)]
        found[name] = sweep(
            model, task, ["divprune"], [0.94], processor=processor, out=tmp_path / name, max_new_tokens=1, **QUIET
        )
    floor, right = found["floor"], found["right"]
    assert floor.rows[0].accuracy[0] == 0 < floor.floor and right.rows[0].accuracy[0] > right.floor
    page = (tmp_path / "floor" / "leaderboard.md").read_text()
    assert "**The uncompressed model answers at the floor**: 'zebra 0' to every question scores 37.5 %" in page
    assert "at the floor" not in (tmp_path / "right" / "leaderboard.md").read_text()
    rows = [row for row in floor.rows if row.method == "divprune"]
    assert rows and not any(row.beats for row in floor.rows) and tables.cell(rows[0]) == "0.0"
    rows[0].lost, rows[0].over = [], {"random": (0.1, 0.05, 0.2)}  # whatever the differences are
    assert not rows[0].beats and tables.cell(rows[0]) == "0.0"
    assert f"Answers have 1 tokens at most; {100 * right.rows[0].cut:.1f} % of the uncompressed ones were cut" in page
    assert right.rows[0].cut == 1 and "| cut |" in page
    again = Results.read(tmp_path / "floor")
    assert (again.constant, again.floor, again.rows[0].marked) == ("zebra 0", 0.375, False)


def test_sentences_are_judged_by_what_they_contain(tmp_path):
    """A model that talks: nothing by exact match, which the board says, everything by `contains`."""
    model, tokenizer = hf_compress.load_demo("recall")
    model.generation_config.eos_token_id = None  # it goes on after its answer
    task = load_task("demo:recall", 10)
    found = {}
    for metric in ("exact_match", "contains"):
        found[metric] = sweep(
            model, task, "streaming", [0.5], processor=tokenizer, out=tmp_path / metric, metric=metric,
            max_new_tokens=12, **QUIET,
        )  # fmt: skip
    assert found["exact_match"].rows[0].accuracy[0] == 0 and not found["exact_match"].rows[0].marked
    assert found["contains"].rows[0].accuracy[0] == 1 and found["contains"].rows[0].cut == 1
    assert found["contains"].rows[0].marked
