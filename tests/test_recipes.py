"""The recipes of docs/evidence.md: what stands there is what the files say, and a wrong value is found."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reproduce():
    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "recipes" / "reproduce.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["reproduce"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["reproduce"]


def test_every_file_is_read_and_judges_something(reproduce):
    figures = reproduce.load()
    assert figures
    for figure in figures:
        assert any(e.value is not None for e in figure.expect), figure.name
        assert any(e.small is not None for e in figure.expect), figure.name
        assert all(e.tolerance > 0 for e in figure.expect if e.value is not None), figure.name


def test_the_page_states_these_figures(reproduce):
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert reproduce.render(text, reproduce.load()) == text, "run `python recipes/reproduce.py --readme`"


def test_every_accuracy_outside_the_tables_is_in_a_recipe(reproduce):
    """Of the first page and of the one with the figures; the other table there is made from the leaderboard."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/evidence.md"))
    table = reproduce.readme_table(reproduce.load())
    prose = re.sub(r"<!-- start:begin -->.*?<!-- start:end -->", "", text.replace(table, ""), flags=re.DOTALL)
    for number in re.findall(r"\d+\.\d %", prose):
        assert number in table.replace("%", " %"), f"{number}: no recipe gives it"


FIGURE = """
title: one
machine: here
cache: {model: tiny_text, length: 64, methods: [streaming], ratios: [0.5], rounds: 1, steps: 1, batches: [1]}
small: {length: 48}
expect:
  - {row: streaming, ratio: 0.5, column: entries, value: 32, tolerance: 0.5, small: SMALL, small_tolerance: 0.5}
"""


@pytest.mark.parametrize(("small", "off"), [("24", 0), ("30", 1)])
def test_values_are_compared(reproduce, tmp_path, small, off):
    path = tmp_path / "one.yaml"
    path.write_text(FIGURE.replace("SMALL", small), encoding="utf-8")
    figure = reproduce.Figure.read(path)
    console = Console(record=True, width=120)
    assert reproduce.check(figure, small=True, console=console) == off
    assert ("OFF" in console.export_text()) == bool(off)
    assert figure.command.startswith("hf-compress bench cache --model tiny_text --length 64 --methods streaming")


def test_unknown_keys_and_names_are_refused(reproduce, tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text(FIGURE.replace("machine:", "machines:"), encoding="utf-8")
    with pytest.raises(ValueError, match="must be title, machine"):
        reproduce.Figure.read(path)
    with pytest.raises(ValueError, match="'nothing' is no figure"):
        reproduce.load(["nothing"])
