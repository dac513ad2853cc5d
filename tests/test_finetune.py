"""The fine-tuning recipe: configs name what there is, arguments win over them, a short run leaves what it promises."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

import hf_compress

ROOT = Path(__file__).parents[1] / "recipes/finetune"
CONFIGS = sorted((ROOT / "configs").glob("*.json"))


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("finetune", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["finetune"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["finetune"]


KNOBS_ONLY = {"v2pe": "m3"}  # what is no method but a knob of all of them, and the method that shows it


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_configs(recipe, config, tmp_path):
    asked, arguments = recipe.arguments_of([str(config), "--max_steps", "7", "--output_dir", str(tmp_path)])
    assert asked.method == KNOBS_ONLY.get(config.stem, config.stem)
    assert set(asked.knobs) <= set(hf_compress.methods()[asked.method].knobs)
    assert arguments.max_steps == 7 and arguments.output_dir == str(tmp_path)
    assert arguments.seed == 42 and arguments.learning_rate == json.loads(config.read_text())["learning_rate"]


def test_a_config_with_a_wrong_name(recipe, tmp_path):
    (tmp_path / "a.json").write_text('{"methode": "mqt"}')
    with pytest.raises(ValueError, match=r"\['methode'\], which neither Recipe nor TrainingArguments has"):
        recipe.arguments_of([str(tmp_path / "a.json")])


def test_a_method_without_a_module_trains_the_language_model(recipe):
    model, _ = hf_compress.load_demo("llava")
    model.compress("m3", ratio=0.75)
    with pytest.raises(ValueError, match="'m3' trains nothing of its own; pass --language true"):
        recipe.groups(model, recipe.Recipe("m3", language=False), 1e-3)
    (group,) = recipe.groups(model, recipe.Recipe("m3"), 1e-3)
    names = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"language_model", "multi_modal_projector"} and group["lr"] == recipe.Recipe.language_rate


def test_a_short_run(recipe, tmp_path):
    """Two steps: the loss is logged, the checkpoint answers as the model did, the module lies beside it."""
    few = ["--max_steps", "2", "--images", "6", "--split", "test", "--limit", "8", "--per_device_train_batch_size", "2"]
    result = recipe.main([str(ROOT / "configs/mqt.json"), *few, "--output_dir", str(tmp_path)])
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert set(result["accuracy"]) == {"49", "22", "9", "1"} and result["steps"] == 2
    assert (tmp_path / "compressor/compressor.safetensors").exists()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    _, processor = hf_compress.load_demo("llava")
    assert again.compression.config.methods[0].method == "mqt"
    assert recipe.judge(again, processor, [49, 1], 8) == {k: result["accuracy"][k] for k in ("49", "1")}
