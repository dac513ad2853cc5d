import json

import pytest

from hf_compress import registry
from hf_compress.evaluate.plan import BARE, SEEDS, Run, controls_of, labels, parse_knobs, parse_weights, plan, split
from hf_compress.methods.base import PromptMethod
from tests.toys import toy


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


@pytest.fixture
def folders(tmp_path):
    """Two folders as `model.compression.save` names its files."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "compressor.safetensors").write_bytes(name.encode())
    return tmp_path


def test_weights_count_by_content(folders):
    """They belong to the key and to the setting; what `compress` takes has them apart from the knobs."""
    runs = [plan(["sts", "snapkv"], [0.5], weights={"sts": folders / name}) for name in ("a", "b", "a")]
    first, other, again = (next(run for run in found if run.method == "sts") for found in runs)
    assert first.key == again.key != other.key and Run.from_key(first.key) == first
    assert first.weights == str(folders / "a") and "weights" not in first.config().methods[0].knobs
    assert first.setting != other.setting and first.changed["sts"] == {"weights": str(folders / "a")}
    assert all(run.weights is None for run in runs[0] if run.method != "sts")
    (folders / "b" / "compressor.safetensors").write_bytes(b"a")
    moved = plan(["sts"], [0.5], weights={"sts": folders / "b"})[-1]
    assert moved.setting == first.setting
    composed = plan(["sts+snapkv"], [0.5], weights={"sts": folders / "a"})[-1]
    assert composed.weights == str(folders / "a")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"nothing": "a"}, "weights='nothing' is not a method"),
        ({"snapkv": "a"}, "weights of 'snapkv': it is not trained; these are: .*sts"),
        ({"sts": "nowhere"}, "weights='nowhere' of 'sts': name a folder that"),
        ({"sts": 1}, "weights=1 of 'sts': name a folder that"),
        (["sts"], "weights=.* must be a dict of folders"),
    ],
)
def test_weights_that_cannot_be(folders, monkeypatch, weights, message):
    monkeypatch.chdir(folders)
    with pytest.raises(ValueError, match=message):
        plan(["sts"], [0.5], weights=weights)


def test_weights_of_the_command_line():
    assert parse_weights(["sts=a=b", "stvit=c"]) == {"sts": "a=b", "stvit": "c"}
    for texts in (["sts"], ["sts="], ["sts=a", "sts=b"]):
        with pytest.raises(ValueError, match="write METHOD=FOLDER"):
            parse_weights(texts)


def test_a_key_holds_every_knob_and_what_its_files_hold(tmp_path):
    """A default that changes in a later version, or another file under the same name, is another record."""
    for name, spec in registry.methods().items():
        run = plan([name], [0.5])[-1]
        assert set(json.loads(run.knobs)[name]) == set(spec.knobs) and Run.from_key(run.key) == run
    heads = tmp_path / "a+b|c.json"
    keys = []
    for content in ("[1]", "[2]", "[1]"):
        heads.write_text(content)
        run = plan(["razor"], [0.5], {"razor": {"heads_file": str(heads)}})[-1]
        assert Run.from_key(run.key) == run
        keys.append(run.key)
    assert keys[0] == keys[2] != keys[1]
    with pytest.raises(ValueError, match=r"razor: heads_file='nowhere\.json' cannot be read"):
        plan(["razor"], [0.5], {"razor": {"heads_file": "nowhere.json"}})


def test_rows_are_told_apart_by_the_knobs_that_differ():
    runs = [
        *plan(["divprune+fastv"], [0.5], {"fastv": {"layer": 1}}),
        *plan(["divprune+fastv", "fastv:layer=3"], [0.5, 0.75], {"fastv": {"layer": 2, "scope": "joint"}}),
    ]
    found = labels(runs)
    names = {"none", "uniform", "random", "downsample", "fastv:layer=3"}
    for part in ("divprune", "uniform", "random", "downsample"):
        names |= {f"{part}+fastv:layer={layer}" for layer in (1, 2)}
    assert set(found.values()) == names
    for run, name in found.items():
        assert name == run.method or f'"layer": {name[-1]}' in run.key
        assert name == BARE or set(controls_of(name).values()) <= names  # the controls of the same setting
    seeds = [*plan(["uniform"], [0.5]), *plan(["uniform"], [0.5], {"random": {"seed": 5}})]
    assert [name for run, name in labels(seeds).items() if run.method == "random"] == ["random"] * 3 + ["random:seed=5"]
    assert set(labels(plan(["uniform", "snapkv"], [0.5])).values()) == {
        r.method for r in plan(["uniform", "snapkv"], [0.5])
    }


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


def test_text_has_no_control_of_another_stage():
    """Dropping text is no eviction: a budget of the cache says nothing beside it."""

    class FirstHalf(PromptMethod):
        """The first half."""

    with toy(FirstHalf, "prompt") as key:
        assert controls_of(key) == {}
        assert names(plan([key], [0.5])) == [(BARE, None, None), (key, 0.5, None)]
        assert list(controls_of(f"{key}+snapkv").values()) == ["kvrandom", "streaming"]


def test_where_nothing_is_seen_no_control_drops_visual_tokens():
    assert controls_of("promptdistill", "text") == {} and "random" in controls_of("promptdistill", "image")
    assert list(controls_of("promptdistill+snapkv", "text").values()) == ["kvrandom", "streaming"]
