"""benchmarks/published.py: what is published of large models, and how far boards agree with it."""

from pathlib import Path

import pytest

import hf_compress
from benchmarks.published import BENCHMARKS, BOARDS, HERE, KINDS, agreed, page, paper, read, verdict, voices
from hf_compress.evaluate import Results
from hf_compress.evaluate.agreement import accuracies, agreement, side_by_side


def test_agreement_leaves_controls_and_the_bare_model_out():
    one = {"none": 0, "kvrandom": 100, "snapkv": 3, "h2o": 2, "tova": 1}
    other = {"none": 100, "kvrandom": 0, "snapkv": 30, "h2o": 20, "tova": 10, "knorm": 5}
    tau, _, n = agreement(one, other)
    assert (tau, n) == (pytest.approx(1), 3)


def test_columns_side_by_side_have_a_dash_for_what_they_lack():
    lines = side_by_side([{"none": 100, "fastv": 52.5}, {"none": 64}]).splitlines()
    assert lines[2:] == ["| none | 100 | 64 |", "| fastv | 52.5 | – |"]


def test_kinds_of_questions_count_by_their_number():
    folder = HERE / "boards" / "llava"
    board = Results.read(folder)
    whole, kinds = accuracies([folder], 0.75), tuple(board.types)
    assert accuracies([folder], 0.75, kinds) == pytest.approx(whole)
    row = next(row for row in board.rows if (row.method, row.ratio) == ("divprune", 0.75))
    two = accuracies([folder], 0.75, kinds[:2])["divprune"]
    right = sum(round(row.types[kind] * board.types[kind]) for kind in kinds[:2])
    assert two == pytest.approx(100 * right / sum(board.types[kind] for kind in kinds[:2]))


def test_published_scores_name_methods_and_where_they_stand():
    names, columns = {*hf_compress.methods(), "none"}, read()
    assert len({one["name"] for one in columns}) == len(columns)
    for one in columns:
        assert one["board"] in BOARDS and 0 < one["removed"] < 1 and one["address"].startswith("https://")
        assert one["model"] and one["benchmark"] and one["read"] and one["source"]
        assert all(0 <= score <= 100 for score in one["scores"].values())
        for scores in (one["scores"], *one["parts"].values()):
            assert scores.keys() <= names and "none" in scores and len(scores) > 2
    assert {part for one in columns for part in one["parts"]} >= {*BENCHMARKS}


def test_kinds_are_those_of_the_questions():
    assert {kind for kinds in KINDS.values() for kind in kinds} <= Results.read(HERE / "boards" / "llava").types.keys()


def column(name, removed=0.5, parts=None, **scores):
    return {"name": name, "removed": removed, "scores": scores, "parts": parts or {}}


def test_papers_with_the_same_numbers_are_one_voice():
    first = column("A, 64 tokens", parts={"GQA": {"fastv": 1.5, "dart": 2.5, "tome": 3.5, "none": 9}})
    again = column("B, 64 tokens", parts={"GQA": {"fastv": 1.5, "dart": 2.5, "tome": 3.6, "none": 9}})
    own = column("C, 64 tokens", parts={"GQA": {"fastv": 1.5, "dart": 2.6, "tome": 3.6, "none": 9}})
    assert voices([first, again]) == {"A": "A", "B": "A"}
    assert voices([first, own]) == {"A": "A", "C": "C"}


def test_pairs_are_those_on_which_two_papers_agree_and_none_differs():
    columns = [
        column("A, 128 tokens", fastv=3, dart=2, tome=1, random=0),
        column("A, 64 tokens", removed=0.9, fastv=3, dart=2, tome=2, random=9),
        column("B, 64 tokens", removed=0.9, fastv=5, dart=6, tome=1),
        column("C, 64 tokens", removed=0.9, divprune=5, dart=6),
    ]
    assert agreed(columns) == ({("fastv", "tome"), ("dart", "tome")}, 3)  # of fastv and dart A and B differ
    pairs = {("fastv", "tome"), ("dart", "tome"), ("divprune", "tome")}
    ours = {"fastv": 1, "dart": 2, "tome": 2}
    assert verdict(pairs, ours) == ([], [("dart", "tome")], [("fastv", "tome")])


def test_pairs_of_a_benchmark_are_taken_from_its_scores():
    columns = [column(f"{name}, 64", parts={"GQA": {"fastv": i, "dart": i + 1}}) for i, name in enumerate("AB")]
    assert agreed(columns, "GQA") == ({("dart", "fastv")}, 1) and agreed(columns, "POPE") == (set(), 0)


def test_every_paper_is_named_up_to_its_budget():
    assert {paper(one) for one in read() if one["board"] == "video"} == {"VidCom2", "GleanVID", "TOPS", "IDPruner"}


def test_the_page_is_what_the_command_writes():
    assert Path(HERE, "published.md").read_text(encoding="utf-8") == page()
