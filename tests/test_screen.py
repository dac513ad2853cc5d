import io

import pytest
from rich.console import Console

from hf_compress.screen import Stages, Table

TABLES = [
    Table(["name", "count"], [["a", "1"], ["**b**", "22"]]),
    Table(
        ["name", "what it does", "paper"],
        [["divprune", "The K tokens that lie farthest apart.", "arXiv:2503.02175"]] * 2,
        left=3,
    ),
    Table(
        [f"column {i}" for i in range(12)], [[f"cell{i}" for i in range(12)]], title="A title of some length", rules={0}
    ),
    Table(["method", "reason"], [["x" * 70, "[CLS] is [bold]no[/bold] markup"], ["y", ""]], left=2),
    Table(["visual\ntokens", "empty"], []),
]


def printed(table, width):
    out = io.StringIO()
    table.print(Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("table", TABLES, ids=range(len(TABLES)))
@pytest.mark.parametrize("width", [20, 50, 80, 200])
def test_nothing_is_cut_and_no_line_is_too_long(table, width):
    text = printed(table, width)
    assert all(len(line) <= width for line in text.splitlines())
    letters = "".join(text.split())
    for row in table.rows:
        for cell in row:
            for word in cell.strip("*").split():
                assert word in text or word[: width // 2] in letters, word


def test_columns_where_they_fit_and_blocks_where_not():
    wide, narrow = printed(TABLES[1], 80), printed(TABLES[1], 30)
    assert wide.splitlines()[0].split() == ["name", "what", "it", "does", "paper"] and set(
        wide.splitlines()[1].strip()
    ) == {"-"}
    assert narrow.splitlines()[0].strip() == "divprune" and "  paper " in narrow


def test_emphasis_is_style_on_a_terminal_and_gone_elsewhere():
    assert "*" not in printed(TABLES[0], 80)
    out = io.StringIO()
    TABLES[0].print(Console(file=out, width=80, force_terminal=True, no_color=False))
    assert "\x1b[1m" in out.getvalue() and "**" not in out.getvalue()


def test_markdown():
    table = Table(["a", "b"], [["x|y", "1\n2"]])
    assert table.markdown() == "| a | b |\n| --- | --: |\n| x\\|y | 1 2 |"


def work(console):
    with Stages(console, 5, "questions") as stages:
        for name, steps in (("first", 2), ("second", 3)):
            stages.begin(name)
            stages.advance(steps)


def test_progress_in_a_pipe_is_a_line_a_stage():
    out = io.StringIO()
    work(Console(file=out, width=80))
    assert out.getvalue().splitlines() == [
        "first: 0 s; 2 of 5 questions in 0 s",
        "second: 0 s; 5 of 5 questions in 0 s",
    ]


def test_progress_on_a_terminal_is_a_bar_that_goes():
    out = io.StringIO()
    work(Console(file=out, width=100, force_terminal=True))
    assert "second" in out.getvalue() and "5 of 5" not in out.getvalue() and out.getvalue().endswith("\x1b[2K")


def test_a_stage_that_failed_is_not_said_to_be_done():
    out = io.StringIO()
    with pytest.raises(RuntimeError), Stages(Console(file=out, width=80), 5, "questions") as stages:
        stages.begin("first")
        raise RuntimeError
    assert out.getvalue() == ""
