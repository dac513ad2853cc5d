"""compress, decompress, compressed: every refusal says what is wrong and what would work, and changes nothing."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import hf_compress
from hf_compress import CompressionConfig
from tests.invariants.reference import (
    VLMS,
    adapter_of,
    alone,
    assert_restored,
    bare,
    batch_of,
    fresh,
    logits_of,
    of_kind,
    options,
    shared,
    snapshot,
    unchanged,
)
from tests.tiny import LLAVA_TOKENS

# (model, method, arguments, what the message must say)
REFUSED = [
    ("llava", "fastvlm", dict(ratio=0.5), r"fastvlm.*did you mean.*'fast(er)?v(lm)?'"),
    ("llava", "xyzzy", dict(ratio=0.5), r"xyzzy.*`hf-compress methods` lists all \d+, hf_compress.methods"),
    ("llava", [], dict(ratio=0.5), r"method=\[\].*hf_compress.methods"),
    ("llava", "divprune", dict(), r"neither of ratio.*keep"),
    ("llava", "divprune", dict(ratio=0.5, keep=8), r"both of ratio.*keep"),
    ("llava", "divprune", dict(ratio=0.5, window=3), r"window=3 is not an argument"),
    ("llava", "snapkv", dict(ratio=0.5, windw=3), r"windw=3.*'window'"),
    ("llava", "snapkv", dict(ratio=0.5, window=0), r"window=0 must be an integer of at least 1"),
    ("llava", "snapkv", dict(ratio=0.5, window=2.5), r"window=2.5"),
    ("llava", "snapkv", dict(ratio=0.5, kernel=4), r"kernel=4 must be odd"),
    ("llava", "snapkv", dict(ratio=0.5, pooling="sum"), r"pooling='sum' must be one of"),
    ("llava", "snapkv", dict(ratio=0.5, policy="hold"), r"policy='hold' must be one of"),
    ("llava", "streaming", dict(ratio=0.5, sinks=-1), r"sinks=-1"),
    ("llava", "knorm", dict(ratio=0.5, skip_layers=True), r"skip_layers=True"),
    ("llava", "fastv", dict(ratio=0.4, layer=0), r"layer=0"),
    ("llava", "fastv", dict(ratio=0.4, layer=4), r"layer=4.*4 decoder layers"),
    ("llava", "fastv", dict(ratio=0.4, scope="all"), r"scope='all'"),
    ("llava", "fastv", dict(ratio=0.99, layer=2), r"ratio=0.99 cannot be reached.*0 <= ratio < 0.5"),
    ("llava", "fastv", dict(keep=1, layer=2), r"cannot be reached.*0 <= ratio < 0.5"),
    ("llava", "pyramiddrop", dict(ratio=0.99), r"ratio=0.99 cannot be reached.*0 <= ratio <= 0.7"),
    ("llava", "pyramiddrop", dict(ratio=0.4, layers=(2, 1)), r"layers=\(2, 1\)"),
    ("llava", "pyramiddrop", dict(ratio=0.4, layers=(2, 9)), r"layers=\(2, 9\)"),
    ("llava", "vtc_cls", dict(ratio=0.5), r"reads 4 blocks.*has 3"),
    ("llava", "divprune", dict(ratio=0.5, positions="shift"), r"positions='shift'"),
    ("llava", "divprune", dict(keep=LLAVA_TOKENS + 1), r"keep=37.*36 visual tokens"),
    ("qwen2_5_vl", "divprune", dict(ratio=0.5, positions="renumber"), r"positions='renumber'.*Qwen2_5_VL"),
    ("internvl", "tome", dict(ratio=0.5, where="tower"), r"where='tower'"),
    ("llama", "fastervlm", dict(ratio=0.5), r"fastervlm.*Llama.*work on it.*snapkv"),
    ("llama", "fastv", dict(ratio=0.5), r"visual tokens.*LlamaForCausalLM"),
    ("mistral_window", "snapkv", dict(ratio=0.5), r"sliding window of 9"),
    ("llama", ["snapkv", "knorm"], dict(ratio=0.5), r"'snapkv' and 'knorm' both act in the cache stage"),
    ("llava", ["divprune", "snapkv"], dict(ratio=[0.5]), r"ratio=\[0.5\] has 1 entries for 2 methods"),
    ("llava", ["divprune", "snapkv"], dict(ratio=[0.5, None]), r"snapkv.*neither"),
    ("llava", ["divprune", "snapkv"], dict(ratio=0.5, layer=2), r"layer=2 is not an argument"),
    ("llama", "knorm", dict(ratio=0.5, skip_layers=4), r"skip_layers=4"),
]
REFUSED += [
    ("llava", "VMTC", dict(ratio=0.5), r"'VMTC' is not a method.*did you mean 'vmtc'"),
    ("llava", "vmtc", dict(ratio=0.5, hide=0.3, hide_after=3), r"hide_after=3: no later layer .* up to 2"),
    ("llava", None, dict(ratio=0.5), r"method=None must be a name"),
    ("llava", 5, dict(ratio=0.5), r"method=5 must be a name"),
    ("llava", {"uniform"}, dict(ratio=0.5), r"method=\{'uniform'\} must be a name"),
    ("llava", [["uniform"]], dict(ratio=0.5), r"method=\['uniform'\] must be the name of a method"),
    ("llava", {"methods": [{"method": "uniform", "ratio": 0.5, "knobs": None}]}, {}, r"knobs=None must be a dict"),
    ("llava", {"methods": [{"method": ["uniform"], "ratio": 0.5}]}, {}, r"method=\['uniform'\] must be the name"),
    ("llava", {"methods": [{"method": "snapkv", "ratio": 0.5}], "version": 2}, {}, r"version=2.*versions up to 1"),
    ("llama", "adakv", dict(ratio=0.5, scorer=[]), r"scorer=\[\] must be the name"),
    ("llama", "adakv", dict(ratio=0.5, scorer="snap"), r"scorer='snap' is not a method.*'snapkv'"),
    ("llama", "adakv", dict(ratio=0.5, scorer_knobs=[]), r"scorer_knobs=\[\] must be a dict"),
    ("llama", "kvzip", dict(ratio=0.5, instruction_ids=0), r"instruction_ids=0 must be a list"),
    ("llama", "kvzip", dict(ratio=0.5, suffix_ids=[1, 10**6]), r"suffix_ids: \[1000000\] are not token ids"),
    ("llama", "gear", dict(ratio=0.5, group=10**6), r"group=1000000 must be an integer of at most"),
    ("llama", "snapkv", dict(ratio=0.5, window=10**12), r"window=10+ must be an integer of at most"),
    ("llama", "snapkv", dict(ratio=0.5, window=print), r"window=<built-in.*is not plain data"),
    ("llama", "kivi", dict(bits=2.0), r"bits=2.0 must be one of"),
    ("llama", "kivi", dict(bits=True), r"bits=True must be one of"),
    ("llama", "h2o", dict(ratio=0.5, normalize=1), r"normalize=1 must be one of"),
    ("llama", "ems", dict(ratio=0.5, gamma=float("nan")), r"gamma=nan must be a number"),
    ("llama", "razor", dict(ratio=0.5, retrieval="x"), r"retrieval='x' must be a list of \(layer, KV head\) pairs"),
    ("llava", ["fastv", "snapkv"], dict(ratio=0.3, scope="visual"), r"method='fastv': scope='visual'"),
    ("llava", ["divprune", "snapkv"], dict(ratio=0.5, window=[4]), r"window=\[4\] has 1 entries for 2 methods"),
    ("llava", ["divprune", "snapkv"], dict(ratio=0.5, window=[4, 4]), r"'divprune' has no 'window'.*must be None"),
    ("llava", ["divprune", "snapkv"], dict(ratio={}, window=4), r"ratio=\{\}"),
]
REFUSED += [
    ("llama", "knorm", dict(ratio=r), r"ratio=.*0 <= ratio < 1") for r in (1, 1.0, -0.1, 2, "half", True, [], {})
]
REFUSED += [("llama", "knorm", dict(ratio=float("nan")), r"ratio=nan")]
REFUSED += [("llama", "knorm", dict(keep=k), r"keep=.*integer of at least 1") for k in (0, -3, 2.0, True, "8")]


@pytest.mark.parametrize(("name", "method", "arguments", "message"), REFUSED)
def test_refused(name, method, arguments, message):
    """A ValueError whose message names argument, value and what would work; the model is as it was."""
    model = shared(name)
    with unchanged(model):
        try:
            with pytest.raises(ValueError, match=f"(?s){message}"):
                model.compress(method, **arguments)
        finally:
            if model.compression is not None:  # it was accepted: leave the shared model to the other tests
                model.decompress()
        with pytest.raises(ValueError, match=f"(?s){message}"), model.compressed(method, **arguments):
            pass
    assert model.compression is None


def test_unsupported_models_are_told_what_is_supported():
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=11, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    with unchanged(model), pytest.raises(ValueError, match=r"GPT2LMHeadModel.*llama.*llava.*qwen2_5_vl") as error:
        model.compress("knorm", ratio=0.5)
    assert all(kind in str(error.value) for kind in hf_compress.architectures())
    with pytest.raises(ValueError, match="Linear"):
        hf_compress.compress(torch.nn.Linear(2, 2), "knorm", ratio=0.5)


def test_compressing_twice_and_not_at_all():
    """The first compression survives the refusal of a second one."""
    model, batch = shared("llama"), batch_of("llama")
    with unchanged(model), pytest.raises(ValueError, match="not compressed"):
        model.decompress()
    with model.compressed("knorm", ratio=0.5):
        expected, first = logits_of(model, batch), model.compression
        with pytest.raises(ValueError, match=r"already compressed by knorm\(ratio=0.5\).*decompress"):
            model.compress("snapkv", ratio=0.5)
        with pytest.raises(ValueError, match="already compressed"), model.compressed("snapkv", ratio=0.5):
            pass
        assert model.compression is first
        assert torch.equal(logits_of(model, batch), expected)


@pytest.mark.parametrize("inner", [True, False])
def test_parts_of_a_compressed_model_are_not_compressed_again(inner):
    """Nor is a model whose part is compressed; the first compression goes on."""
    whole, batch = fresh("llava"), batch_of("llava")
    first, second = (whole.base_model, whole) if inner else (whole, whole.base_model)
    first.compress("dymu", ratio=0.5)
    expected = logits_of(whole, batch)
    with pytest.raises(ValueError, match=rf"belongs to a {type(first).__name__} .* by dymu\(ratio=0.5\); decompress"):
        second.compress("snapkv", ratio=0.5)
    assert second.compression is None and torch.equal(logits_of(whole, batch), expected)
    first.decompress()
    other = fresh("llava")
    other.base_model.vision_tower = whole.base_model.vision_tower
    with (
        whole.compressed("dymu", ratio=0.5),
        unchanged(other),
        pytest.raises(ValueError, match="is shared with another"),
    ):
        other.compress("dymu", ratio=0.5)


def test_unsuitable_kernels_are_refused():
    """Flash and flex attention take no masks of our own."""
    model = fresh("llama")
    model.config._attn_implementation_internal = "flex_attention"
    with unchanged(model), pytest.raises(ValueError, match="flex_attention"):
        model.compress("snapkv", ratio=0.5)


def test_functional_twins():
    """The same without attributes on the model."""
    model, batch = fresh("llama"), batch_of("llama")
    assert hf_compress.compress(model, "snapkv", **options("snapkv")) is model
    expected = logits_of(model, batch)
    assert hf_compress.decompress(model) is None and model.compression is None
    with hf_compress.compressed(model, "snapkv", **options("snapkv")) as same:
        assert same is model and torch.equal(logits_of(model, batch), expected)
    assert model.compression is None


def test_a_list_runs_in_stage_order():
    """However it is written."""
    model = shared("llava")
    with model.compressed(["snapkv", "fastervlm"], ratio=[0.25, 0.5]):
        config = model.compression.config
        assert [(m.method, m.ratio) for m in config.methods] == [("fastervlm", 0.5), ("snapkv", 0.25)]
        assert config.from_json(config.to_json()) == config
        assert config.summary() == "fastervlm(ratio=0.5) + snapkv(ratio=0.25)"


def test_shared_knobs_reach_every_method():
    """A knob that several methods have goes to all of them."""
    model = shared("llava")
    with model.compressed(["fastv", "h2o"], ratio=[0.4, 0.5], layer=1, policy="grow"):
        assert model.compression.context.decoder_method.layer == 1
        assert model.compression.context.cache_method.policy == "grow"


@pytest.mark.parametrize(
    ("methods", "knobs", "expected"),
    [
        (["random", "kvrandom"], dict(seed=[1, 2]), [{"seed": 1}, {"seed": 2}]),
        (["random", "kvrandom"], dict(seed=3), [{"seed": 3}, {"seed": 3}]),
        (["kvrandom", "random"], dict(seed=[1, None]), [{}, {"seed": 1}]),
        (
            ["divprune", "snapkv"],
            dict(window=[None, 4], positions="original"),
            [{"positions": "original"}, {"window": 4}],
        ),
        (["vtc_cls", "pyramiddrop"], dict(layers=[2, (1, 2, 3)]), [{"layers": 2}, {"layers": [1, 2, 3]}]),
        (["divprune", "pyramiddrop"], dict(layers=(1, 2)), [{}, {"layers": [1, 2]}]),
        (["pyramiddrop"], dict(layers=[[1, 3]]), [{"layers": [1, 3]}]),
        ("pyramiddrop", dict(layers=[1, 2]), [{"layers": [1, 2]}]),
        ("pyramiddrop", dict(layers=np.arange(1, 4)), [{"layers": [1, 2, 3]}]),
    ],
)
def test_knobs_per_method(methods, knobs, expected):
    """With several methods a list has one entry each, in the order of the methods; a tuple is one value for all."""
    with shared("llava").compressed(methods, ratio=0.3, **knobs) as model:
        config = model.compression.config
        assert [m.knobs for m in config.methods] == expected
        assert CompressionConfig.from_json(config.to_json()) == config
        for entry, (_, stage) in zip(config.methods, model.compression.context.stages.items()):
            for name, value in entry.knobs.items():
                held = getattr(stage.method, name)
                assert (list(held) if isinstance(held, tuple) else held) == value


@pytest.mark.parametrize(
    "ratio",
    [
        np.float16(0.89),
        np.float32(0.89),
        np.float64(0.89),
        np.array(0.89, "float32"),
        torch.tensor(0.89),
        Fraction(89, 100),
    ],
)
def test_numbers_of_other_libraries(ratio, tmp_path):
    """They are what they are written as; the config of the compression is plain JSON."""
    knobs = dict(window=np.int64(4), kernel=torch.tensor(3), floor=np.float32(0.1), pooling=np.str_("max"))
    with shared("llama").compressed("snapkv", ratio=ratio, **knobs) as model:
        entry = model.compression.config.methods[0]
        assert entry.ratio == 0.89 and type(entry.ratio) is float
        assert entry.knobs == dict(window=4, kernel=3, floor=0.1, pooling="max")
        assert [type(entry.knobs[k]) for k in sorted(entry.knobs)] == [float, int, str, int]
        assert model.compression.context.stages["cache"].ratio == Fraction(89, 100)
        assert CompressionConfig.from_json(model.compression.config.to_json()) == model.compression.config
    for keep in (np.int32(7), torch.tensor(7), np.array(7)):
        with shared("llama").compressed(["knorm"], keep=keep) as model:
            assert model.compression.context.stages["cache"].keep == 7
    for wrong in (np.float32(7), np.bool_(True), torch.tensor([7, 8])):
        with pytest.raises(ValueError, match="keep="):
            shared("llama").compress("knorm", keep=wrong)
    with pytest.raises(ValueError, match=r"heads_file='.*none.json' does not exist"):
        shared("llama").compress("compresskv", ratio=0.5, heads_file=Path(tmp_path, "none.json"))


def test_ratios_near_one_are_not_one():
    with shared("llama").compressed("knorm", ratio=1 - 1e-9) as model:
        assert model.compression.context.stages["cache"].ratio < 1


STRANGE = [
    None,
    True,
    -1,
    0,
    1,
    2.5,
    float("nan"),
    float("inf"),
    10**30,
    "x",
    "",
    [],
    ["x"],
    [[1]],
    {},
    {"x": 1},
    object,
]


@pytest.mark.parametrize("method", hf_compress.methods())
def test_no_value_of_any_knob_is_more_than_refused(method):
    """Whatever a knob is given: it is taken, or a ValueError names it, and the model is as it was."""
    name = "llava"
    model = shared(name)
    with unchanged(model):
        for knob in hf_compress.methods()[method].knobs:
            for value in STRANGE:
                try:
                    model.compress(method, **options(method, model) | {knob: value})
                except ValueError as error:
                    assert knob in str(error) or f"{method!r}" in str(error), error
                else:
                    model.decompress()


def test_a_config_edited_by_hand_is_checked_again():
    config = CompressionConfig.from_dict({"methods": [{"method": "knorm", "ratio": 0.5}]})
    config.version = 3
    with pytest.raises(ValueError, match=r"version=3.*up to 1"):
        shared("llama").compress(config)
    for wrong in ([{"method": "knorm", "ratio": 0.5}], "knorm", None):
        with pytest.raises(ValueError, match=r"methods=.* must be a list of MethodConfig"):
            CompressionConfig(wrong)
    for wrong in ([], None, "knorm"):
        with pytest.raises(ValueError, match="must be a list of objects with a key 'method'"):
            CompressionConfig.from_dict(wrong)


def test_listings():
    """Names, stages and papers for people; unknown stages are refused."""
    methods = hf_compress.methods()
    assert {"fastervlm", "fastv", "snapkv"} <= set(methods)
    assert list(hf_compress.methods("cache")) == [m for m, spec in methods.items() if spec.stage == "cache"]
    assert all(spec.summary and spec.paper for spec in methods.values())
    with pytest.raises(ValueError, match="stage='tower'"):
        hf_compress.methods("tower")
    assert {"llava", "qwen2_5_vl", "llama"} <= set(hf_compress.architectures())


def test_last_before_the_first_call():
    model = shared("llama")
    with model.compressed("knorm", ratio=0.5):
        assert model.compression.last is None
        assert "knorm(ratio=0.5)" in str(model.compression.report())


# -- budgets ----------------------------------------------------------------------------------------------------------
def of_known_size(name):
    """Whether every image has as many tokens; a picture of tiles, which share a count, has any number."""
    adapter = adapter_of(name)
    return not adapter.tiles and adapter.tokens_per_image(bare(name)) is not None


FIXED = [name for name in VLMS if of_known_size(name)]
SMALL = {"vtc_cls": {"layers": 1}, "fastv": {"layer": 1}, "prunevid_inner": {"layer": 1}}
SMALL["pyramiddrop"] = {"layers": (1, 2)}


@pytest.mark.parametrize("method", ["avgpool-grid", "tome", *of_kind("shrinking")])  # others reach all counts
@pytest.mark.parametrize("name", {bare(n).config.model_type: n for n in FIXED}.values())
def test_every_count_is_refused_at_once_or_met(name, method):
    """Of an image of known size: what compress() takes the first forward takes too, what it refuses has an interval."""
    method, _, variant = method.partition("-")
    model, knobs = shared(name), SMALL.get(method, {}) | ({"grid": True} if variant else {})
    whole = adapter_of(name).tokens_per_image(model)
    batch, stage = alone(name, batch_of(name), 0), hf_compress.methods()[method].stage
    refused, before = [], snapshot(model)
    for keep in sorted({1, 2, 3, 5, 7, whole // 2 + 1, whole, whole + 1}):
        try:
            model.compress(method, keep=keep, **knobs)
        except ValueError as error:
            assert f"keep={keep}" in str(error), error
            assert re.search(r"\d+ (to|and) \d+|at most \d+|<= ratio <", str(error)), error
            refused.append(keep)
            assert_restored(model, before)
            continue
        try:
            model(**batch)
            found = model.compression.last
        finally:
            model.decompress()
        before = snapshot(model)
        if stage == "vision" and not hf_compress.methods()[method].cls.at_most:
            assert {len(image) for image in found.visual_kept[0]} == {keep}
    assert whole + 1 in refused and whole not in refused


def test_grids_that_a_count_does_not_fit():
    model = shared("llava")  # 6 x 6
    with unchanged(model), pytest.raises(ValueError, match=r"keep=7 does not.* 6 x 6 grid.*nearest.* are 6 and 8 .*36"):
        model.compress("avgpool", keep=7, grid=True)
    with unchanged(model), pytest.raises(ValueError, match=r"ratio=0.8 of 36 visual tokens: keep=7 does not.*6 and 8"):
        model.compress("avgpool", ratio=0.8, grid=True)
    with (
        pytest.raises(ValueError, match=r"keep=7 does not .*nearest that do are"),
        shared("qwen2_5_vl").compressed("avgpool", keep=7, grid=True) as open_,
    ):  # of any resolution: the first forward tells
        open_(**batch_of("qwen2_5_vl"))


def test_decoder_budgets_count_what_the_vision_stage_left():
    """Two tokens cannot become a quarter on average when one stays in every layer: said by compress()."""
    model = shared("llava")
    model.compress("pyramiddrop", ratio=0.6)
    model.decompress()
    with unchanged(model):
        with pytest.raises(ValueError, match=r"ratio=0.6 cannot be reached.*of 2 visual tokens.*0 <= ratio <= 0.375"):
            model.compress(["uniform", "pyramiddrop"], keep=[2, None], ratio=[None, 0.6])
        with pytest.raises(ValueError, match=r"keep=9: images of .* have 8 visual tokens here; keep at most 8"):
            model.compress(["uniform", "fastv"], keep=[8, 9], layer=1)
        with pytest.raises(ValueError, match=r"keep=1 of 8 tokens: ratio=0.875 cannot.*0 <= ratio < 0.75"):
            model.compress(["uniform", "fastv"], keep=[8, 1], layer=1)


def test_budgets_of_packed_caches_know_the_size_of_heads():
    """A head of 8 has groups of 8 at most: step and minimum of each cost 4 bits per number."""
    model = shared("llama")
    with unchanged(model):
        with pytest.raises(ValueError, match=r"ratio=0.8: entries of 16 and 2 bits in groups of 8 .*0 to 0.625"):
            model.compress("mikv", ratio=0.8)
        with pytest.raises(ValueError, match=r"ratio=0.8: codes of 2 bits remove 0.625 of the bytes at most"):
            model.compress("gear", ratio=0.8)
        with pytest.raises(ValueError, match=r"ratio=0.9: 8 to 1 bits with group=32 remove .* to 0.78"):
            model.compress("kivi", ratio=0.9)
    message = r"skip_layers=2.*3 of \d+ entries; .*keep \d+ to \d+"
    with model.compressed("knorm", keep=3, skip_layers=2), pytest.raises(ValueError, match=message):
        model(**batch_of("llama"), use_cache=True)
