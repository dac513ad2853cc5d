"""The measurements against clocks, caches and allocations that we make ourselves, and every command end to end.

No time is asserted: what is checked are shapes, limits, equalities and what is written.
"""

import gc
import json

import pytest
import torch
from typer.testing import CliRunner

import hf_compress
from hf_compress import registry
from hf_compress.bench import batch, cache, growth, memory, peak, results, train
from hf_compress.bench.__main__ import app
from hf_compress.bench.limits import OWN, scoring_limit
from hf_compress.bench.models import SUBJECTS, load, slim, stage, tiny, tiny_qwen, tiny_text, wide
from hf_compress.bench.parity import HOOKS, PARTS, Row, engine_watch, measure, shares
from hf_compress.bench.timing import CLOCKS, Candidate, Ratio, Spread, Stopwatch, interleave, record, weighted
from hf_compress.engine import evict, trained

CHECK = trained.check_trained  # as it is outside of the tests, see conftest.py


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


# -- subjects -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def subject():
    return tiny()


@pytest.fixture(scope="module")
def text():
    return tiny_text()


def test_a_twin_shares_the_parameters_and_nothing_else(subject):
    twin = subject.compressed("uniform", 0.5)
    assert all(a is b for a, b in zip(subject.model.parameters(), twin.parameters()))
    assert subject.model.compression is None


@torch.no_grad()
@pytest.mark.parametrize("build", [tiny, tiny_qwen])
def test_the_native_short_prompt_is_what_the_compressed_model_computes(build):
    subject = build()
    twin = subject.compressed("uniform", 0.5)
    ours = twin(**subject.prompt(twin)).logits
    (rows,) = twin.compression.last.layer_index[0]
    assert len(rows) == 28
    native = subject.model(**subject.prompt(subject.model, rows)).logits
    torch.testing.assert_close(ours, native, rtol=0, atol=1e-5)


def test_what_the_record_says_of_a_model():
    about = tiny_qwen().about()
    assert about == {
        "name": "tiny_qwen", "type": "qwen2_5_vl", "dtype": "float32", "hidden": 32, "layers": 4, "heads": 4,
        "kv_heads": 2, "head_size": 8, "batch": 1, "tokens": 46, "visual": 36,
    }  # fmt: skip


def test_the_wide_model_has_the_layers_of_a_real_one():
    with torch.device("meta"):
        subject = wide(16)
    assert subject.kv == (2, 32, 128) and subject.text.intermediate_size == 11008 and subject.ids.shape == (1, 16)
    assert sum(p.numel() * p.itemsize for p in subject.model.parameters()) < 2e9


def test_new_modules_are_timed_and_weights_are_part_of_the_name(monkeypatch, tmp_path):
    """What they cost does not hang on what they have learnt."""
    monkeypatch.setattr(trained, "check_trained", CHECK)
    subject = load("tiny")
    twin = subject.compressed("sts", 0.5)
    twin.compression.save(tmp_path / "sts")
    with torch.no_grad():
        out = twin(**subject.prompt(twin)).logits
        again = subject.compressed(f"sts:weights={tmp_path / 'sts'}", 0.5)
        torch.testing.assert_close(again(**subject.prompt(again)).logits, out, rtol=0, atol=0)


def test_knobs_are_part_of_the_name_of_a_method(text):
    twin = text.compressed("snapkv:window=4,heads=adaptive", 0.5)
    assert twin.compression.context.cache_method.window == 4 and twin.compression.context.cache_method.ragged
    assert stage("snapkv:window=4") == "cache"
    with pytest.raises(ValueError, match="windw"):
        text.compressed("snapkv:windw=4", 0.5)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(name="tiny", dtype="float33"), "float33"),
        (dict(name="tiny", length=99), "length=99"),
        (dict(name="/no/such/folder"), "no/such/folder"),
    ],
)
def test_a_model_that_cannot_be_had(arguments, match):
    with pytest.raises((ValueError, OSError), match=match):
        load(**arguments)


@pytest.mark.parametrize("sees", [True, False])
def test_checkpoints_are_loaded_from_a_path(sees, tmp_path):
    if sees:
        name = SUBJECTS["demo"]().model.name_or_path
        subject = load(name)
        assert subject.visual.sum() == 196 and subject.about()["type"] == "llava"
    else:
        from hf_compress.demo import load_demo

        subject = load(load_demo("recall")[0].name_or_path, length=64, dtype="bfloat16")
        assert subject.ids.shape == (1, 64) and subject.model.dtype == torch.bfloat16
    with torch.no_grad():
        assert subject.model(**subject.prompt(subject.model)).logits.isfinite().all()


# -- prefill and slope ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "ratio"), [("fastervlm", 0.75), ("pyramiddrop", 0.5), ("snapkv", 0.5), ("streaming", 0.5)]
)
def test_one_round_of_every_stage(subject, method, ratio):
    (row,) = measure(subject, method, [ratio], rounds=1, warmup=0)
    visual, words = 36, 10
    if row.stage == "cache":
        assert row.tokens == visual + words and row.entries == 23
    else:
        assert row.tokens == pytest.approx(words + visual * (1 - ratio), abs=1)
    assert row.prefill.pairs.n == 1 and row.decode.pairs.n == 2 and row.slope is None
    assert 0 < row.scoring < row.hooks and row.parts
    assert json.loads(json.dumps(row.as_dict()))["method"] == method


def test_a_slope_needs_three_lengths(subject):
    rows = measure(subject, "uniform", [0.25, 0.5, 0.75], rounds=2, warmup=0, decode=False)
    assert rows[0].slope is rows[2].slope and rows[0].slope.pairs.n == 2
    assert measure(subject, "uniform", [0.25, 0.5], rounds=1, warmup=0, decode=False)[0].slope is None


def test_a_ratio_out_of_reach_is_a_row_with_a_note(subject):
    row, good = measure(subject, "fastv", [0.89, 0.25], rounds=1, warmup=0, decode=False)
    assert row.prefill is None and "reachable" in row.note and good.prefill is not None
    shown = results.table("parity", [row.as_dict(), good.as_dict()])
    assert [cells[-1] == "not measured" for cells in shown.rows] == [True, False]


def test_limits():
    def row(stage, ratio, scoring):
        times = dict(full_ms=4.0, native_ms=1.0, ours_ms=ratio)
        return Row("mid", "m", stage, 0.5, prefill=Ratio.of([ratio], [1.0]), scoring=scoring, **times)

    assert row("vision", 1.05, 0.0).failures == []
    assert row("vision", 1.129, 0.02).failures == []  # 8 % of native are scoring
    assert row("vision", 1.14, 0.02).failures == ["prefill"]
    assert row("vision", 1.18, 0.03).failures == ["prefill", "scoring"]
    assert row("decoder", 1.09, 0.0).failures == []
    assert row("decoder", 1.11, 0.0).failures == ["prefill"]
    assert row("cache", 1.5, 0.03).failures == []  # nothing is shorter: only the cost of scoring counts
    assert row("cache", 1.5, 0.031).failures == ["scoring"]


# -- caches ---------------------------------------------------------------------------------------------------------
def test_cache_rows(text):
    wanted = [("snapkv:window=4", 0.5), ("adakv", 0.5), ("kivi", 0.75), ("zipcache", 0.1)]
    options = dict(rounds=1, warmup=0, steps=2, batches=(1, 3), together=3)
    first, second = cache.measure(text, wanted, **options)
    assert [r.store for r in first] == ["dense", "ragged", "packed"] and "zipcache" not in {r.method for r in first}
    assert first[0].entries == first[1].entries == 24 and first[2].entries == 48
    for row in first:
        assert set(row.steps) == {1, 3} and row.steps[3].pairs.n == 2
        assert 0 < row.parts["evict"] <= row.scoring
    assert "window" in first[0].parts and "settle" in first[2].parts
    assert second[0].note and second[0].as_dict()["failures"] == []


def test_bytes_are_counted_by_storages():
    small = slim(tiny_text(256))
    one = 2 * 4 * 2 * 8 * 2  # keys and values, layers, heads, channels, bytes
    index = 4 * 2 * 2  # of each entry that a head keeps: layers, heads, bytes
    assert cache.honesty(small, "knorm", 0.5) == pytest.approx((one + index) / one)
    twin = small.compressed("knorm", 0.5)
    with torch.no_grad():
        held = twin(**small.prompt(twin)).past_key_values
    before = cache.storages(held)
    held.layers[0].keys = torch.cat([held.layers[0].keys] * 2, 2)[:, :, :128]  # a view of more than it shows
    assert cache.storages(held) == before + 2 * 128 * 8 * 2


def test_attention_in_place_of_the_kernel_counts_for_what_it_takes_longer(text, subject, monkeypatch):
    """By a clock that only attention moves: one second in the kernel, three where the package attends."""
    now = [0.0]

    def slow(owner, name, seconds):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (now.__setitem__(0, now[0] + seconds), function(*a, **k))[1])

    monkeypatch.setitem(CLOCKS, "wall", lambda: now[0])
    slow(torch.nn.functional, "scaled_dot_product_attention", 1.0)
    slow(evict, "attention_and_sums", 3.0)
    (rows,) = cache.measure(text, [("h2o", 0.5), ("snapkv:window=4", 0.5)], rounds=1, warmup=0, batches=())
    assert [row.scoring for row in rows] == [2.0, 0.0] and rows[0].parts["attend"] == 3.0
    (row,) = measure(subject, "h2o", [0.5], rounds=1, warmup=0, decode=False)
    assert row.scoring == row.hooks == 2.0


def test_scoring_has_limits_where_layers_are_as_large_as_real_ones():
    """Methods that do more than rank have their own; on small models nothing is asked."""
    assert {name for name in OWN if name not in hf_compress.methods()} == set()
    assert scoring_limit("wide", "snapkv", "cache") == 0.03 and scoring_limit("mid", "fastv", "decoder") == 0.02
    assert scoring_limit("wide", "kvzip", "cache") == 1.5 and scoring_limit("mid", "pyramiddrop", "decoder") == 0.03
    assert scoring_limit("demo", "visionzip", "vision") is None
    times = dict(full_ms=1.0, native_ms=1.0, ours_ms=1.0, scoring=0.5, prefill=Ratio.of([1.0], [1.0]))
    assert Row("demo", "m", "cache", 0.5, **times).failures == []


def test_cache_limits():
    def row(store, scoring=0.0, step=1.0, size=1.0):
        ratio = Ratio.of([1.0], [1.0])
        steps = {8: Ratio.of([step], [1.0])}
        return cache.CacheRow(
            "wide", "x", 0.5, 9, store, scoring=scoring, prefill=ratio, steps=steps, bytes=size
        ).failures

    assert row("dense", 0.03, 1.03, 1.02) == [] and row("ragged", 0.0, 1.10, 1.02) == []
    assert row("dense", 0.04, 1.04, 1.03) == ["scoring", "step at batch 8", "bytes"]
    assert row("packed", 0.0, 9.0, 1.05) == [] and row("packed", 0.0, 9.0, 1.06) == ["bytes"]


def test_the_engine_is_as_before_after_watching_caches():
    before = [owner.__dict__[attribute] for owner, attribute, _ in cache.PARTS]
    with pytest.raises(ZeroDivisionError), cache.engine_watch(CLOCKS["wall"], cache.PARTS):
        raise ZeroDivisionError
    assert [owner.__dict__[attribute] for owner, attribute, _ in cache.PARTS] == before


# -- memory ---------------------------------------------------------------------------------------------------------
def test_the_peak_is_what_lies_in_memory_at_a_time():
    def inner():
        first = torch.empty(500_000)
        second = torch.empty(250_000)
        del first
        return second, torch.empty(250_000)

    def work():
        outer = torch.empty(1_000_000)
        kept = memory.mark("inner", inner)()
        del outer
        return kept, torch.empty(100_000)

    assert memory.peaks(work) == {"": 4 * 1_750_000, "inner": 4 * 750_000}
    assert memory.peak(work) == 4 * 1_750_000


def test_peak_rows(subject):
    vision, kept = peak.measure(subject, ["uniform", "snapkv"], [0.5])
    assert 0 < vision[0].native < vision[0].full == kept[0].full
    assert kept[0].native is None and vision[0].over_full < 1 and kept[0].over_full < 1.1
    assert vision[0].state == 46 * 32 * 4
    assert vision[0].as_dict()["over_native"] == vision[0].ours / vision[0].native


def test_peak_limits():
    def row(stage, ours):
        return peak.PeakRow("m", "x", stage, 0.5, full=200, ours=ours, native=100, state=10).failures

    assert row("vision", 120) == [] and row("vision", 121) == ["peak"]
    assert row("decoder", 200) == [] and row("decoder", 201) == ["peak"]
    assert row("cache", 210) == [] and row("cache", 211) == ["peak"]


# -- batches --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("build", [tiny, tiny_qwen, tiny_text])
def test_batch_truth(build):
    for method in ("fastervlm", "snapkv", "adakv") if build is not tiny_text else ("kivi:bits=4", "adakv"):
        (row,) = batch.measure(build(), method, [0.6], batch=3, rounds=1, warmup=0)
        assert row.same == 1.0 and row.logits < 1e-4 and row.time and row.bare, row


def test_samples_of_a_batch_differ():
    whole, samples = batch.prompts(tiny_qwen(), 3)
    assert [s["input_ids"].shape[1] for s in samples] == [46, 45, 44]
    assert whole["input_ids"].shape == (3, 46) and whole["attention_mask"].sum(1).tolist() == [46, 45, 44]
    assert not torch.equal(samples[0]["pixel_values"], samples[1]["pixel_values"])
    for b, sample in enumerate(samples):
        assert torch.equal(whole["position_ids"][:, b, b:], sample["position_ids"][:, 0])


def test_a_batch_that_keeps_something_else_is_found(subject, monkeypatch):
    from hf_compress.methods.vision.uniform import Uniform

    def other(self, images, keep, assign=Uniform.assign):
        answer = assign(self, images, keep)
        if len(images) > 1:  # as many, but the first ones
            answer.kept = torch.arange(keep).expand_as(answer.kept)
        return answer

    monkeypatch.setattr(Uniform, "assign", other)
    (row,) = batch.measure(subject, "uniform", [0.5], batch=2, rounds=1, warmup=0)
    assert row.same < 1 and "kept sets" in row.failures


# -- training -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("build", [tiny, tiny_qwen])
def test_a_training_step_has_the_loss_of_the_short_batch(build):
    subject = build()
    (row,) = train.measure(subject, "uniform", [0.5], rounds=2, warmup=0)
    assert row.step.pairs.n == 2 and row.loss == pytest.approx(row.native_loss, rel=1e-5) and row.loss > 1
    assert all(p.grad is None for p in subject.model.parameters())
    (row,) = train.measure(subject, "pyramiddrop", [0.5], rounds=1, warmup=0)
    assert row.native_loss is None and row.loss > 1


def test_peaks_of_a_training_step():
    """Shorter rows hold less for backward; gradients, which are there before, count on neither side."""
    subject = tiny()
    rows = train.measure(subject, "uniform", [0.25, 0.75], rounds=1, warmup=0)
    weights = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    assert rows[0].full_peak > rows[0].peak > rows[1].peak > 0
    one = train.Step(subject, subject.model)
    one.before()
    assert train.peak(one.run) > 0.8 * weights + 0.5 * one.peak()
    row = train.TrainRow("a", "uniform", "vision", 0.75, full_peak=100, peak=60)
    assert row.failures == ["peak"] and row.as_dict()["over_full"] == 0.6
    assert train.TrainRow("a", "uniform", "vision", 0.5, full_peak=100, peak=60).failures == []


def test_a_training_step_of_several_rows():
    """Which may keep other tokens: the bare model is then fed as many, and its loss is another one."""
    subject = tiny()
    subject.ids = subject.ids.repeat(2, 1)
    subject.vision = {name: torch.cat([x, x.flip(-1) * 2]) for name, x in subject.vision.items()}
    rows = {m: train.measure(subject, m, [0.75], rounds=1, warmup=0)[0] for m in ("uniform", "fastervlm")}
    assert rows["uniform"].loss == pytest.approx(rows["uniform"].native_loss, rel=1e-5)
    assert rows["fastervlm"].native_loss is None and rows["fastervlm"].step is not None


# -- growth ---------------------------------------------------------------------------------------------------------
def test_exponents():
    sizes = [10, 20, 40, 80]
    assert growth.exponent(sizes, [5, 5, 16, 64]) == pytest.approx(2)
    assert growth.exponent(sizes, [1, 2, 4, 8]) == pytest.approx(1)
    assert growth.exponent([10], [1]) is None


def test_growth_rows():
    for n, rows in enumerate(growth.measure(["fastervlm", "random"], sizes=[16, 36], rounds=1), 1):
        assert [len(r.bytes) for r in rows] == [n, n] and all(x > 0 for r in rows for x in r.bytes + r.ms)
    (rows,) = growth.measure(["kivi"], sizes=[64], ratio=0.01, rounds=1)
    assert rows[0].tokens == [] and rows[0].note.startswith("64 tokens")
    with pytest.raises(ValueError, match="tokens=17"):
        next(growth.measure(["random"], sizes=[17], rounds=1))


def test_a_map_of_all_against_all_is_found(monkeypatch):
    from hf_compress.methods.vision.random import RandomTokens

    def square(self, images, keep, assign=RandomTokens.assign):
        x = images.embeddings
        (x @ x.mT).sum()
        return assign(self, images, keep)

    sizes = [144, 324, 900, 2500]  # from 2000 on the map is larger than what a draw looks at
    (row,) = list(growth.measure(["random"], sizes=sizes, rounds=1))[-1]
    assert row.failures == []
    monkeypatch.setattr(RandomTokens, "assign", square)
    (row,) = list(growth.measure(["random"], sizes=sizes, rounds=1))[-1]
    assert row.memory_exponent > 1.4 and row.failures == ["memory"]


# -- commands -------------------------------------------------------------------------------------------------------
def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_prints_a_row_per_method_and_adds_to_its_file(tmp_path):
    path = tmp_path / "results" / "parity.json"
    args = ["parity", "--model", "tiny", "--ratios", ".5", "--rounds", "1", "--no-decode", "--json", path]
    out = call(*args)
    assert out.exit_code == 0, out.output
    gives = hf_compress.architectures()["llava"].gives
    timed = {name: spec for name, spec in registry.methods().items() if spec.stage != "prompt"}  # those have no timings
    fit = {name for name, spec in timed.items() if spec.needs <= gives}
    assert all("video" in spec.needs for name, spec in timed.items() if name not in fit)
    assert all(name in out.output for name in fit)
    assert call(*args, "--methods", "random,snapkv:window=4,heads=adaptive").exit_code == 0
    first, second = results.read(path)
    assert {r["method"] for r in first["rows"]} == fit
    assert [r["method"] for r in second["rows"]] == ["random", "snapkv:window=4,heads=adaptive"]
    assert first["record"]["clock"] == "wall" and first["subject"]["name"] == "tiny" and first["limits"]["vision"]


COMMANDS = {
    "parity": ["--model", "tiny_qwen", "--methods", "uniform", "--rounds", 1],
    "cache": ["--model", "tiny_text", "--methods", "knorm", "--rounds", 1, "--steps", 1, "--batch", "1,2"],
    "peak": ["--model", "tiny", "--methods", "decoder"],
    "batch": ["--model", "tiny_text", "--methods", "knorm", "--rounds", 1, "--length", 32],
    "train": ["--model", "tiny", "--methods", "uniform", "--rounds", 1],
    "growth": ["--stages", "llava,cache", "--methods", "random", "--sizes", "16,36", "--rounds", 1],
}


def test_every_command_writes_what_table_prints(tmp_path):
    path, page = tmp_path / "all.json", tmp_path / "all.md"
    for name, arguments in COMMANDS.items():
        if name == "growth":
            arguments = [*arguments[:1], "llava", *arguments[2:], "--picture", tmp_path / "curves.png"]
        out = call(name, *arguments, "--json", path)
        assert out.exit_code == 0, out.output
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert [run["what"] for run in results.read(path)] == list(COMMANDS)
    out = call("table", path, "--markdown", page)
    assert out.exit_code == 0 and all(f"{name}: " in out.output for name in COMMANDS)
    said = page.read_text()
    assert {r["method"] for r in results.read(path)[2]["rows"]} == set(registry.methods("decoder"))
    assert said.count("**") == 2 * len(COMMANDS) and "step, batch 2" in said and "uniform" in said


def test_a_page_lists_what_misses_its_limit_and_takes_the_newest_run():
    def run(ours):
        row = peak.PeakRow("tiny", "m", "cache", 0.5, full=100, ours=ours).as_dict()
        lost = peak.PeakRow("tiny", "other", "cache", 0.5, note="too small").as_dict()
        about = {"date": "2026-01-01", "subject": {"name": "tiny"}, "limits": peak.LIMITS}
        return {"what": "peak", "record": record("cpu") | {"clock": "wall"}, "rows": [row, lost], **about}

    page = results.page([run(999), run(106)], "the command")
    assert "1 measurements, 1 miss a limit" in page and "m at 0.5: peak" in page and "too small" in page
    assert "1.060" in page and "9.990" not in page and "the command" in page
    assert "0 miss" in results.page([run(106), run(100)], "the command")


@pytest.mark.parametrize(
    "wrong",
    [
        ["parity", "--model", "huge"],
        ["parity", "--clock", "sun"],
        ["parity", "--ratios", "half"],
        ["peak", "--model", "tiny", "--methods", "fastvv"],
        ["train", "--model", "tiny", "--methods", "snapkv"],
        ["cache", "--model", "tiny_text", "--device", "abacus"],
        ["growth", "--stages", "moon"],
        ["table", "nowhere.json"],
    ],
)
def test_the_commands_refuse_what_they_do_not_know(wrong):
    out = call(*wrong)
    assert out.exit_code == 2 and wrong[-1] in out.output


@pytest.mark.parametrize("arguments", [["cache", "--batch", "1,x"], ["growth", "--stages", "cache", "--sizes", "0"]])
def test_counts_that_are_none_are_refused(arguments):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and "whole numbers of 1 or more" in " ".join(done.output.replace("│", " ").split())
