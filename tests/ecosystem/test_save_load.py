"""save_pretrained, from_pretrained, push_to_hub: the compression travels in config.json, as JSON and nothing else."""

import copy
import importlib
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from huggingface_hub import ModelCard
from transformers.utils import hub

import hf_compress
from hf_compress import CompressionConfig
from tests.ecosystem.cases import CONFIGS, STACK, outputs, same
from tests.tiny import build, inputs


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A plain checkpoint, one saved while compressed, a batch, and the outputs of both."""
    model, folder = build("llava"), tmp_path_factory.mktemp("checkpoints")
    batch = inputs("llava", model)
    plain = outputs(model, batch)
    model.save_pretrained(folder / "plain")
    with model.compressed(STACK):
        compressed = outputs(model, batch)
        model.save_pretrained(folder / "stack")
    return folder, batch, plain, compressed


def load(path, **kwargs):
    return T.AutoModelForImageTextToText.from_pretrained(path, **kwargs).eval()


def load_text(path, **kwargs):
    return T.AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()


def rewrite(folder, target, config):
    """A copy of the checkpoint with another `compression_config` in its config.json."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    data = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(data | {"compression_config": config}))
    return target


def test_the_checkpoint_differs_by_one_entry_of_one_json_file(saved):
    folder, *_ = saved
    plain, stack = (json.loads((folder / name / "config.json").read_text()) for name in ("plain", "stack"))
    entry = stack.pop("compression_config")
    assert stack == plain
    assert {f.name for f in (folder / "stack").iterdir()} == {f.name for f in (folder / "plain").iterdir()}
    assert {f.suffix for f in (folder / "stack").iterdir()} == {".json", ".safetensors"}  # no code, no pickle
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("plain", "stack")]
    assert weights[0] == weights[1]
    assert entry["version"] == 1
    assert [m["method"] for m in entry["methods"]] == ["visionzip", "fastv", "snapkv"]
    assert entry["methods"][1] == {"method": "fastv", "ratio": 0.4, "keep": None, "knobs": {"layer": 1}}


def test_nothing_is_left_in_the_config_after_decompress(saved, tmp_path):
    folder, *_ = saved
    model = load(folder / "stack")
    model.decompress()
    model.save_pretrained(tmp_path / "stack")
    load(folder / "plain").save_pretrained(tmp_path / "plain")
    stack, plain = ((tmp_path / name / "config.json").read_bytes() for name in ("stack", "plain"))
    assert stack == plain


@pytest.mark.parametrize("name", CONFIGS)
def test_from_pretrained_restores(name, saved, tmp_path):
    folder, batch, plain, _ = saved
    model = load(folder / "plain").compress(CONFIGS[name])
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.compression.config == model.compression.config
    assert same(outputs(again, batch), expected)
    again.decompress()
    assert same(outputs(again, batch), plain)


@pytest.mark.parametrize("cls", [T.LlavaForConditionalGeneration, T.AutoModelForImageTextToText])
def test_one_line_compresses_any_checkpoint(cls, saved):
    folder, batch, _, compressed = saved
    model = cls.from_pretrained(folder / "plain", compression_config=STACK).eval()
    assert same(outputs(model, batch), compressed)
    model, info = cls.from_pretrained(
        folder / "plain", compression_config=CompressionConfig.from_dict(STACK), output_loading_info=True
    )
    assert same(outputs(model.eval(), batch), compressed)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("cls", [T.LlavaForConditionalGeneration, T.AutoModelForImageTextToText])
def test_the_keyword_wins_over_the_file(cls, saved):
    folder, batch, plain, _ = saved
    model = cls.from_pretrained(folder / "stack", compression_config=False).eval()
    assert model.compression is None and not hasattr(model.config, "compression_config")
    assert same(outputs(model, batch), plain)
    expected = outputs(model.compress(CONFIGS["features"]), batch)
    for wanted in (CONFIGS["features"], CompressionConfig.from_dict(CONFIGS["features"])):
        model = cls.from_pretrained(folder / "stack", compression_config=wanted).eval()
        assert same(outputs(model, batch), expected)
        assert model.compression.config == CompressionConfig.from_dict(CONFIGS["features"])


@pytest.mark.parametrize("cls", [T.LlavaForConditionalGeneration, T.AutoModelForImageTextToText])
def test_none_is_as_if_not_given(cls, saved):
    folder, batch, _, compressed = saved
    model = cls.from_pretrained(folder / "stack", compression_config=None).eval()
    assert same(outputs(model, batch), compressed)
    assert cls.from_pretrained(folder / "plain", compression_config=None).compression is None


def test_without_the_package_the_checkpoint_loads_uncompressed(saved):
    """What transformers itself does with it: from_pretrained as it was before `import hf_compress`."""
    folder, batch, plain, _ = saved
    stock = T.PreTrainedModel.from_pretrained.__func__.__wrapped__
    model = stock(T.LlavaForConditionalGeneration, folder / "stack").eval()
    assert model.compression is None
    assert same(outputs(model, batch), plain)


def test_text_models_and_every_knob(tmp_path):
    """`keep` and non-default knobs of several types, on a decoder-only model in half precision."""
    model = build("llama")
    batch = inputs("llama", model)
    model.save_pretrained(tmp_path / "plain")
    model = load_text(tmp_path / "plain", dtype="bfloat16")
    model.compress("snapkv", keep=7, window=3, kernel=3, pooling="max")
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path / "snapkv")
    again = load_text(tmp_path / "snapkv", dtype="bfloat16")
    assert again.compression.config == model.compression.config
    assert same(outputs(again, batch), expected)


def test_importing_again_changes_nothing():
    attached = [cls.from_pretrained.__func__ for cls in (T.PreTrainedModel, T.AutoConfig)]
    importlib.reload(hf_compress)
    assert [cls.from_pretrained.__func__ for cls in (T.PreTrainedModel, T.AutoConfig)] == attached


def test_saving_twice_and_in_shards(saved, tmp_path):
    folder, batch, _, compressed = saved
    load(folder / "stack").save_pretrained(tmp_path / "once", max_shard_size="20KB")
    assert len(list((tmp_path / "once").glob("*.safetensors"))) > 1
    load(tmp_path / "once").save_pretrained(tmp_path / "twice")
    assert same(outputs(load(tmp_path / "twice"), batch), compressed)


def test_a_config_object_is_not_changed_by_loading(saved):
    """Two models from one config object are compressed alike."""
    folder, batch, _, compressed = saved
    config = T.AutoConfig.from_pretrained(folder / "stack")
    before = copy.deepcopy(config.to_dict())
    for _ in range(2):
        assert same(outputs(load(folder / "stack", config=config), batch), compressed)
    assert config.to_dict() == before


def test_unknown_keys_warn_and_are_ignored(saved, tmp_path):
    folder, batch, _, compressed = saved
    future = copy.deepcopy(STACK) | {"version": 1, "schedule": "cosine"}
    future["methods"][0]["temperature"] = 0.5
    with pytest.warns(UserWarning, match=r"unknown keys \['schedule', 'temperature'\] are ignored"):
        model = load(rewrite(folder / "plain", tmp_path / "future", future))
    assert same(outputs(model, batch), compressed)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(folder / "stack")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"methods": [{"method": "fastvm", "ratio": 0.5}]}, "'fastvm' is not a method of hf_compress; did you mean"),
        ({"methods": [{"method": "os.system", "ratio": 0.5}]}, "'os.system' is not a method"),
        ({"methods": [{"method": "fastv", "ratio": 0.5, "knobs": {"lair": 1}}]}, r"has no \['lair'\]"),
        ({"methods": [{"method": "fastv"}]}, "got neither of ratio"),
        ({"methods": [{"ratio": 0.5}]}, "must be a list of objects with a key 'method'"),
        ({"methods": "fastv"}, "must be a list of objects with a key 'method'"),
        ({"method": "fastv", "ratio": 0.5}, "must be a list of objects with a key 'method'"),
        ({"methods": []}, "is empty"),
        (STACK | {"version": 2}, r"version=2.*later hf-compress.*versions up to 1.*compression_config=False"),
        (STACK | {"version": "1"}, r"version='1'.*must be an integer"),
        ({"methods": [{"method": ["fastv"], "ratio": 0.5}]}, r"method=\['fastv'\] must be the name of a method"),
        ({"methods": [{"method": "fastv", "ratio": 0.5, "knobs": None}]}, "knobs=None must be a dict"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(config, message, saved, tmp_path):
    folder, *_ = saved
    with pytest.raises(ValueError, match=message):
        load(rewrite(folder / "plain", tmp_path / "bad", config))
    with pytest.raises(ValueError, match=message):
        load(folder / "plain", compression_config=config)
    model = load(tmp_path / "bad", compression_config=False)  # the weights stay reachable
    assert model.compression is None


def test_push_to_hub_uploads_the_config(saved, monkeypatch):
    """The files of the commit that push_to_hub would make; nothing leaves the machine."""
    folder, *_ = saved
    uploaded = {}

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, operations, **kwargs):
            for operation in operations:
                with operation.as_file() as file:
                    uploaded[operation.path_in_repo] = file.read()

    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("---\n---\n"))
    load(folder / "stack").push_to_hub("someone/model")
    assert uploaded.keys() == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    config = json.loads(uploaded["config.json"])
    assert config["compression_config"] == CompressionConfig.from_dict(STACK).to_dict()
    card = uploaded["README.md"].decode()
    assert card.count("## Compression") == 1 and f"`{CompressionConfig.from_dict(STACK).summary()}`" in card
    model = load(folder / "stack")
    model.decompress()
    model.push_to_hub("someone/model")
    assert "Compression" not in uploaded["README.md"].decode()


def test_gradients_and_dtype_of_a_restored_model(saved):
    folder, batch, *_ = saved
    model = load(folder / "stack", dtype="bfloat16").train()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    labels = batch["input_ids"].masked_fill(batch["input_ids"] >= 80, -100)
    out = model(**batch | {"pixel_values": batch["pixel_values"].bfloat16()}, labels=labels)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.get_decoder().parameters())


def entry(folder):
    """What the config.json of a checkpoint says of its compression."""
    return json.loads((folder / "config.json").read_text()).get("compression_config")


def test_models_that_share_a_config_object_are_compressed_apart(tmp_path):
    """Saved, copied and decompressed in any order; the config itself says nothing, whoever is compressed."""
    config = build("llama").config
    one, two = T.LlamaForCausalLM(config), T.LlamaForCausalLM(config)
    before = copy.deepcopy(vars(config))
    one.compress("snapkv", ratio=0.5, window=4)
    two.save_pretrained(tmp_path / "two")
    one.save_pretrained(tmp_path / "one")
    copy.deepcopy(one).save_pretrained(tmp_path / "copy")
    assert entry(tmp_path / "two") is None
    assert entry(tmp_path / "one") == entry(tmp_path / "copy") == one.compression.config.to_dict()
    two.compress("knorm", ratio=0.25)
    one.decompress()
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two")
    assert entry(tmp_path / "one") is None
    restored = load_text(tmp_path / "two").compression.config
    two.decompress()
    assert restored == two.compress("knorm", ratio=0.25).compression.config
    assert not hasattr(config, "compression_config")
    assert {k: v for k, v in vars(config).items() if k not in ("dtype", "architectures")} == {
        k: v
        for k, v in before.items()
        if k not in ("dtype", "architectures")  # these two save_pretrained sets
    }


def test_a_config_that_came_from_a_compressed_checkpoint(saved, tmp_path):
    """Its entry speaks of that checkpoint: a model built from it is not compressed, and not saved as if it were."""
    folder, *_ = saved
    config = T.AutoConfig.from_pretrained(folder / "stack")
    before = copy.deepcopy(config.compression_config)
    model = T.AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path / "bare")
    assert model.compression is None and entry(tmp_path / "bare") is None
    model.compress("uniform", ratio=0.5)
    model.save_pretrained(tmp_path / "uniform")
    assert entry(tmp_path / "uniform") == model.compression.config.to_dict()
    assert config.compression_config == before == CompressionConfig.from_dict(STACK).to_dict()


@pytest.mark.parametrize("of", ["config", "weights"])
def test_a_save_that_fails_leaves_the_config_alone(of, saved, tmp_path, monkeypatch):
    folder, *_ = saved
    model = load(folder / "stack")

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    target = (type(model.config), "save_pretrained") if of == "config" else (T.modeling_utils, "safe_save_file")
    with monkeypatch.context() as patch:
        patch.setattr(*target, full)
        with pytest.raises(OSError, match="no space left"):
            model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "compression_config")
    model.save_pretrained(tmp_path)
    assert load(tmp_path).compression.config == model.compression.config


def test_what_was_measured_goes_along(saved, tmp_path):
    """It lies beside the checkpoint that it was measured on; what is saved from there acts alike."""
    folder, batch, *_ = saved
    for file in (folder / "plain").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = load(tmp_path)
    hf_compress.calibrate.merge_thresholds(model, [batch], ratio=0.5, progress=False)
    hf_compress.calibrate.retrieval_heads(model, tokens=20, progress=False)
    bare = {file.name for file in (folder / "plain").iterdir()}
    model.save_pretrained(tmp_path / "bare")
    assert {file.name for file in (tmp_path / "bare").iterdir()} == bare
    for method, name in (({"method": "dymu", "ratio": "adaptive"}, "d"), ({"method": "razor", "ratio": 0.1}, "r")):
        with model.compressed({"methods": [method]}):
            expected = outputs(model, batch)
            model.save_pretrained(tmp_path / name)
            model.save_pretrained(tmp_path)  # over itself
        again = load(tmp_path / name)
        assert again.compression.config.methods[0].method == method["method"] and same(outputs(again, batch), expected)
        assert {file.name for file in (tmp_path / name).iterdir()} - bare == {
            "merge_thresholds.json",
            "retrieval_heads.json",
        }
