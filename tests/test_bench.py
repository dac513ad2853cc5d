"""The timing helper against a clock that we turn ourselves, and the comparison end to end; no time is asserted."""

import gc
import json

import pytest
import torch
from typer.testing import CliRunner

from hf_compress import registry
from hf_compress.bench.__main__ import app
from hf_compress.bench.models import tiny
from hf_compress.bench.parity import HOOKS, PARTS, Row, engine_watch, measure, shares, table
from hf_compress.bench.timing import CLOCKS, Candidate, Ratio, Spread, Stopwatch, interleave, record, weighted


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def test_rounds_are_interleaved_backwards_every_other_time():
    clock, calls = Clock(), []
    candidates = {name: Candidate(lambda name=name: calls.append(name)) for name in "abc"}
    interleave(candidates, rounds=2, warmup=1, clock=clock)
    assert "".join(calls) == "cba" + "abc" + "cba"


def test_only_the_run_itself_is_timed_and_warm_up_is_thrown_away():
    clock, left = Clock(), []
    costs = iter([100.0, 1.0, 2.0, 3.0])
    candidate = Candidate(
        run=lambda: clock.wait(next(costs)), before=lambda: clock.wait(50.0), after=lambda: left.append(clock.wait(7.0))
    )
    assert interleave({"a": candidate}, rounds=3, warmup=1, clock=clock) == {"a": [1.0, 2.0, 3.0]}
    assert len(left) == 3  # what a warm-up run left behind is not read


def test_the_garbage_collector_is_off_while_a_candidate_runs_and_on_afterwards():
    seen = []
    interleave({"a": Candidate(lambda: seen.append(gc.isenabled()), lambda: seen.append(gc.isenabled()))}, rounds=1)
    assert seen[-2:] == [True, False] and gc.isenabled()


def test_a_run_that_fails_leaves_the_garbage_collector_on():
    with pytest.raises(ZeroDivisionError):
        interleave({"a": Candidate(lambda: 1 / 0)}, rounds=1)
    assert gc.isenabled()


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds=0"):
        interleave({}, rounds=0)


def test_spread_gives_median_and_quartiles():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(median=3.0, low=2.0, high=4.0, n=5)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 1)


def test_a_slow_spell_of_the_machine_cancels_in_pairs():
    native, spells = [10.0, 10.0, 10.0, 10.0], [1, 5, 1, 9]
    ratio = Ratio.of([11 * s for s in spells], [n * s for n, s in zip(native, spells)])
    assert ratio.pairs.median == pytest.approx(1.1) and ratio.pairs.low == pytest.approx(ratio.pairs.high)
    assert ratio.of_medians == pytest.approx(1.1) and ratio.of_minima == pytest.approx(1.1)


def test_a_ratio_needs_pairs():
    with pytest.raises(ValueError, match="3 rounds against 2"):
        Ratio.of([1.0, 2.0, 3.0], [1.0, 2.0])


def test_native_time_is_weighted_by_layers():
    assert shares([7, 7, 3, 3, 3, 3]) == {7: 1 / 3, 3: 2 / 3}
    assert weighted({7: [3.0, 6.0], 3: [1.5, 3.0], 9: [99.0, 99.0]}, shares([7, 3, 3])) == [2.0, 4.0]


def test_stopwatch_counts_a_nested_call_once_in_total_and_under_both_names():
    clock = Clock()
    watch = Stopwatch(clock)
    inner = watch.wrap("inner", lambda: clock.wait(2.0))
    outer = watch.wrap("outer", lambda: (clock.wait(1.0), inner()))
    outer(), inner()
    assert watch.total == 5.0 and watch.parts == {"outer": 3.0, "inner": 4.0}
    watch.reset()
    assert watch.total == 0.0 and watch.parts == {}


def test_the_engine_is_as_before_after_watching():
    def functions():
        return [owner.__dict__[attribute] for owner, attribute, _ in PARTS + HOOKS]

    before = functions()
    with pytest.raises(ZeroDivisionError), engine_watch(CLOCKS["wall"]):
        assert functions() != before
        raise ZeroDivisionError
    assert functions() == before


def test_the_record_names_hardware_and_versions():
    about = record("cpu")
    assert {"cpu", "cores", "threads", "device", "python", "torch", "transformers", "hf_compress"} <= set(about)
    assert about["torch"] == torch.__version__ and json.dumps(about)


@pytest.fixture(scope="module")
def subject():
    return tiny()


def test_a_twin_shares_the_parameters_and_nothing_else(subject):
    twin = subject.twin()
    assert all(a is b for a, b in zip(subject.model.parameters(), twin.parameters()))
    twin.compress("uniform", ratio=0.5)
    assert subject.model.compression is None


@torch.no_grad()
def test_the_native_short_prompt_is_what_the_compressed_model_computes(subject):
    twin = subject.twin()
    twin.compress("uniform", ratio=0.5)
    ours = twin(**subject.prompt(twin)).logits
    (rows,) = twin.compression.last.layer_index[0]
    native = subject.model(**subject.prompt(subject.model, rows)).logits
    torch.testing.assert_close(ours, native, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "ratio"), [("fastervlm", 0.75), ("pyramiddrop", 0.5), ("snapkv", 0.5), ("streaming", 0.5)]
)
def test_one_round_of_every_stage(subject, method, ratio):
    (row,) = measure(subject, method, [ratio], rounds=1, warmup=0)
    visual, text = 36, 10
    if row.stage == "cache":
        assert row.tokens == visual + text and row.entries == 23
    else:
        assert row.tokens == pytest.approx(text + visual * (1 - ratio), abs=1)
    assert row.prefill.pairs.n == 1 and row.decode.pairs.n == 2
    assert 0 < row.scoring < row.hooks and row.parts
    assert json.loads(json.dumps(row.as_dict()))["method"] == method


def test_a_ratio_out_of_reach_is_a_row_with_a_note(subject):
    row, good = measure(subject, "fastv", [0.89, 0.25], rounds=1, warmup=0, decode=False)
    assert row.prefill is None and "reachable" in row.note and good.prefill is not None
    assert table([row, good]).row_count == 2


def test_limits():
    def row(stage, ratio, scoring):
        times = dict(full_ms=4.0, native_ms=1.0, ours_ms=ratio)
        return Row("tiny", "m", stage, 0.5, prefill=Ratio.of([ratio], [1.0]), scoring=scoring, **times)

    assert row("vision", 1.05, 0.0).failures == []
    assert row("vision", 1.129, 0.02).failures == []  # 8 % of native are scoring
    assert row("vision", 1.14, 0.02).failures == ["prefill"]
    assert row("vision", 1.18, 0.03).failures == ["prefill", "scoring"]
    assert row("decoder", 1.09, 0.0).failures == []
    assert row("decoder", 1.11, 0.0).failures == ["prefill"]
    assert row("cache", 1.5, 0.021).failures == ["scoring"]  # nothing is shorter: only the cost of scoring counts


def test_the_command_prints_a_row_per_method_and_adds_to_its_file(tmp_path):
    path = tmp_path / "results" / "parity.json"
    args = ["parity", "--model", "tiny", "--ratios", ".5", "--rounds", "1", "--no-decode", "--json", str(path)]
    out = CliRunner().invoke(app, args)
    assert out.exit_code == 0, out.output
    for name in registry.methods():
        assert name in out.output
    assert CliRunner().invoke(app, [*args, "--methods", "random"]).exit_code == 0
    first, second = json.loads(path.read_text())
    assert {r["method"] for r in first["rows"]} == set(registry.methods())
    assert [r["method"] for r in second["rows"]] == ["random"] and first["record"]["clock"] == "wall"


@pytest.mark.parametrize("wrong", [["--model", "huge"], ["--clock", "sun"]])
def test_the_command_refuses_what_it_does_not_know(wrong):
    out = CliRunner().invoke(app, ["parity", "--rounds", "1", *wrong])
    assert out.exit_code == 2 and wrong[1] in out.output
