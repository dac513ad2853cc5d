import pytest

from hf_compress.evaluate.plan import BARE, SEEDS, Run, controls_of, parse_knobs, plan, split


def names(runs):
    return [(r.method, r.ratio, r.seed) for r in runs]


def test_controls_at_every_ratio():
    runs = plan(["fastervlm", "snapkv"], [0.75, 0.5])
    assert names(runs)[0] == (BARE, None, None)
    for ratio in (0.5, 0.75):
        here = [n for n in names(runs) if n[1] == ratio]
        assert [s for m, _, s in here if m == "random"] == [s for m, _, s in here if m == "kvrandom"] == list(SEEDS)
        assert {m for m, _, s in here if s is None} == {"uniform", "downsample", "streaming", "fastervlm", "snapkv"}
    assert len(runs) == len(set(runs)) == 1 + 2 * 11


@pytest.mark.parametrize(
    ("method", "controls"),
    [
        ("fastervlm", ["random", "uniform", "downsample"]),
        ("fastv", ["random", "uniform", "downsample"]),
        ("snapkv", ["kvrandom", "streaming"]),
        ("divprune+snapkv", ["random+kvrandom", "uniform+streaming", "downsample+streaming"]),
        ("divprune+fastv", ["random+fastv", "uniform+fastv", "downsample+fastv"]),
        ("divprune+fastv+h2o", ["random+fastv+kvrandom", "uniform+fastv+streaming", "downsample+fastv+streaming"]),
        ("uniform", ["random", "downsample"]),
        ("streaming", ["kvrandom"]),
    ],
)
def test_controls_stand_in_stage_by_stage(method, controls):
    assert list(controls_of(method).values()) == controls


def test_keys_are_read_back():
    for run in plan(["divprune+snapkv:window=8", "fastv"], [8 / 9, 0.1], {"fastv": {"layer": 1}}):
        assert Run.from_key(run.key) == run
    assert len({run.key for run in plan(["fastv", "fastv:layer=1", "fastv:layer=3"], [0.5])}) == 1 + 3 + 2 + 3


def test_knobs():
    assert split("fastv:layer=1+pyramidkv:window=4:pooling=max") == [
        ("fastv", {"layer": 1}),
        ("pyramidkv", {"window": 4, "pooling": "max"}),
    ]
    assert parse_knobs(["fastv.layer=1", "kvrandom.window=32", "fastv.scope=joint"]) == {
        "fastv": {"layer": 1, "scope": "joint"},
        "kvrandom": {"window": 32},
    }
    run = plan(["fastv:layer=3", "fastv"], [0.5], {"fastv": {"layer": 1, "scope": "joint"}})[-2:]
    assert [r.config().methods[0].knobs["layer"] for r in run] == [3, 1]
    assert all(r.config().methods[0].knobs["scope"] == "joint" for r in run)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan(["fastvlm"], [0.5]), "did you mean 'fastervlm'"),
        (lambda: plan(["fastervlm"], [1.5]), "ratio=1.5"),
        (lambda: plan([], [0.5]), "at least one"),
        (lambda: plan(["fastv"], [0.5], {"fastv": {"depth": 1}}), "depth"),
        (lambda: plan(["fastv:depth=1"], [0.5]), "depth"),
        (lambda: parse_knobs(["fastv=1"]), "METHOD.NAME=VALUE"),
        (lambda: parse_knobs(["fastvlm.layer=1"]), "fastvlm"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
