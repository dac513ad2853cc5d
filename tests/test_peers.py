"""The side-by-side with peers, as far as it goes without them: the cases, the comparison, our own side of it."""

import dataclasses
import json
from dataclasses import asdict

import pytest

from benchmarks.peers.cases import CASES
from benchmarks.peers.compare import agreement, summary, table
from benchmarks.peers.kvpress import STEPS, make_model, overheads
from benchmarks.peers.worker import Ours
from hf_compress import registry
from hf_compress.bench.timing import Ratio


def test_agreement_of_two_selections():
    ours, theirs = [[[0, 1, 2], [0, 1]], [[5], []]], [[[0, 1, 3], [0, 1]], [[6], []]]
    found = agreement(ours, theirs)
    assert found["equal"] == 0.5 and found["worst"] == 0 and found["differing"] == 1
    assert found["jaccard"] == pytest.approx((0.5 + 1 + 0 + 1) / 4)
    assert found["ours"] == [2.5, 0.5] == found["theirs"]
    with pytest.raises(ValueError, match=r"\[2, 2\] heads per layer against \[2\]"):
        agreement(ours, theirs[:1])


def test_prompts_are_put_together():
    a, b = agreement([[[0], [1]]], [[[0], [1]]]), agreement([[[0, 2], [1]]], [[[0, 1], [1]]])
    found = summary([a, b])
    assert found == {
        "equal": 0.75, "jaccard": pytest.approx((1 + 1 + 1 / 3 + 1) / 4), "worst": pytest.approx(1 / 3), "differing": 1,
        "ours": [1], "theirs": [1],
    }  # fmt: skip


def test_table():
    row = summary([agreement([[[0]]], [[[0]]])]) | {"case": "knorm", "ratio": 0.5}
    row["bytes"] = {"ours": 0.502, "theirs": 0.5}
    ours, theirs = (asdict(Ratio.of(times, [1.0] * 3)) for times in ([1.0, 1.0312, 1.1], [1.2] * 3))
    row |= {"prefill": {"ours": ours, "theirs": theirs}, "step": {"ours": theirs, "theirs": ours}}
    head, rule, line = table([row]).splitlines()
    assert line.startswith(
        "| knorm | 0.5 | 100.0% | 1.0000 | 1.0000 | 0 | 50.2% | 50.0% | 1.031 (1.016-1.066) | 1.200 (1.200-1.200) |"
    )
    assert head.count("|") == rule.count("|") == line.count("|")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_name_methods_and_knobs_that_exist(case):
    spec = registry.get(case.method)
    assert spec.stage == "cache" and case.knobs.keys() <= spec.knobs.keys()
    spec.cls(**case.knobs)
    json.dumps(dataclasses.asdict(case))  # plain data


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    make_model(folder, length=160, prompts=2, hidden=64)
    return Ours(folder)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: CASES[i].name)
def test_our_side_keeps_what_was_asked_for(ours, number):
    """Four heads a layer; the mean over layers and heads is the budget, for ragged heads and layers too."""
    ours.select(number, 0.5)
    ours.prefill(0)
    kept, held = ours.kept()
    assert [len(layer) for layer in kept] == [4] * 4
    assert sum(len(head) for layer in kept for head in layer) == 16 * 80
    assert all(head == sorted(set(head)) and head[0] >= 0 and head[-1] < 160 for layer in kept for head in layer)
    ours.select(None)
    ours.prefill(0)
    full = ours.storages()
    assert full == 4 * 2 * 4 * 160 * 8 * 4  # layers, keys and values, heads, entries, head size, bytes
    assert 0.5 <= held / full < 0.54


def test_what_is_selected_next_starts_from_the_bare_model(ours):
    """No case leaves anything behind: the bare model runs in between, and another prompt gives other entries."""
    number = [case.name for case in CASES].index("keydiff")
    found = []
    for prompt in (0, 1, 0):
        ours.select(number, 0.5)
        ours.prefill(prompt)
        found.append(ours.kept()[0])
        ours.select(None)
        assert ours.models["sdpa"].compression is None
    assert found[0] == found[2] != found[1]


def test_times_are_taken_beside_bare_runs_of_the_same_length(ours):
    """A step is compared with one of a cache that holds as many entries."""
    asked = []

    class Worker:
        def ask(self, name, *arguments):
            asked.append((name, *arguments))
            return getattr(ours, name)(*arguments)

    number = [case.name for case in CASES].index("knorm")
    times = overheads({"ours": Worker()}, [(number, 0.75)], 160, rounds=1)
    assert times.keys() == {(what, "ours", (number, 0.75)) for what in ("prefill", "step")}
    assert all(ratio.pairs.median > 0 for ratio in times.values())
    before = asked[asked.index(("steps", STEPS)) - 3 : asked.index(("steps", STEPS))]
    assert [name for name, *_ in before if name == "prefill"] == ["prefill"] and ("prefill", 0, 40) in asked
