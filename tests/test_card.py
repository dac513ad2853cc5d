"""The section of a model card: what was asked for, and the numbers of the sweep that judged it."""

import json

import pytest

import hf_compress
from hf_compress import card
from hf_compress.config import CompressionConfig, MethodConfig
from hf_compress.evaluate.results import Results
from hf_compress.evaluate.rows import Row

FULL = Row("none", "", None, accuracy=(0.95, 0.9, 0.98))
SETTINGS = {"model": "demo:llava", "data": "demo:scenes", "questions": 400, "dtype": "float32"}
SETTINGS |= {"protocol": "two-turn", "max_new_tokens": 8}


def board(*rows):
    return Results(SETTINGS, "exact_match", {}, "cpu", {}, {}, "", 0.0, [FULL, *rows])


def row(method, ratio, knobs=None, **values):
    found = {"accuracy": (0.92, 0.88, 0.95), "over_full": (-0.03, -0.05, -0.01), **values}
    return Row(method, "", ratio, json.dumps(knobs or {}), **found)


def test_what_was_measured():
    config = CompressionConfig([MethodConfig("divprune", 0.89), MethodConfig("snapkv", 0.89, knobs={"window": 16})])
    judged = row("divprune+snapkv", 0.89, {"snapkv": {"window": 16}}, over={"random": (0.4, 0.35, 0.45)})
    text = card.section(config, board(row("divprune", 0.89), row("divprune+snapkv", 0.89), judged))
    assert "92.0 % right, the uncompressed model 95.0 %; difference -3.0 points, 95 % interval [-5.0, -1.0]" in text
    assert "over random at the same budget +40.0 [+35.0, +45.0]" in text
    assert (
        "hf-compress eval --model demo:llava --data demo:scenes --methods divprune+snapkv --ratios 0.89"
        " --knob snapkv.window=16 --protocol two-turn --metric exact_match --dtype float32 --limit 400"
        " --max-new-tokens 8 --out results" in text
    )
    assert "| `divprune`: The K tokens" in text and "[2503.02175](https://arxiv.org/abs/2503.02175)" in text
    assert text.startswith(card.BEGIN) and text.endswith(card.END)


@pytest.mark.parametrize(
    "entry",
    [
        MethodConfig("divprune", 0.75),
        MethodConfig("divprune", keep=32),
        MethodConfig("divprune", 0.89, knobs={"positions": "renumber"}),
        MethodConfig("tome", 0.89),
    ],
    ids=str,
)
def test_what_was_not_judged_is_refused(entry):
    with pytest.raises(ValueError, match=r"is not among what was judged there: divprune at 0\.89"):
        card.row_of(CompressionConfig([entry]), board(row("divprune", 0.89)))


def test_defaults_that_are_written_out_are_defaults():
    entry = MethodConfig("divprune", 0.89, knobs={"positions": "auto"})
    assert card.row_of(CompressionConfig([entry]), board(row("divprune", 0.89))).ratio == 0.89


def test_of_a_model(tmp_path):
    model, _ = hf_compress.load_demo("llava")
    with model.compressed("divprune", ratio=0.89):
        assert "was not measured" in model.compression.card()
        with pytest.raises(ValueError, match="is not among"):
            model.compression.measured(board(row("tome", 0.89)))
        with pytest.raises(ValueError, match="holds no results"):
            model.compression.measured(tmp_path)
        model.compression.measured(board(row("divprune", 0.89)))
        assert "difference -3.0 points" in model.compression.card()


def test_a_section_takes_the_place_of_an_older_one(tmp_path):
    page = tmp_path / "README.md"
    card.write(tmp_path, f"{card.BEGIN}\nfirst\n{card.END}")
    assert page.read_text() == f"{card.BEGIN}\nfirst\n{card.END}\n"
    page.write_text(f"---\nlicense: mit\n---\n# Mine\n\n{page.read_text()}\nMore.\n")
    card.write(tmp_path, f"{card.BEGIN}\nsecond \\1\n{card.END}")
    assert page.read_text().endswith(f"# Mine\n\n{card.BEGIN}\nsecond \\1\n{card.END}\n\nMore.\n")
