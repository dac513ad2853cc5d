"""The examples of CONTRIBUTING.md are files that work: read from there, loaded as plugins, held against references."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hf_compress
from hf_compress import plugin, registry
from hf_compress.cli import main
from hf_compress.evaluate.identity import made_by
from tests.ecosystem.cases import logits
from tests.invariants.reference import alone, bare, batch_of, close, fresh, image_embeddings, shared
from tests.tiny import build, inputs

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
METHODS = {re.search(r'@register\("(\w+)"', block)[1]: block for block in BLOCKS if "@register" in block}
(ADAPTER,) = (block for block in BLOCKS if "@register" not in block)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins")
    for name, block in METHODS.items():
        (folder / f"{name}.py").write_text(block)
    (folder / "adapter.py").write_text(ADAPTER)
    return folder


@pytest.fixture(autouse=True)
def _loaded(files):
    before = dict(plugin.FILES)
    for name in METHODS:
        plugin.load(files / f"{name}.py")
    yield
    registry.forget(METHODS)
    plugin.FILES.clear()
    plugin.FILES.update(before)


def test_there_is_one_for_every_stage():
    assert {hf_compress.methods()[name].stage for name in METHODS} == set(registry.STAGES)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", ["llava", "qwen2_5_vl", "llama"])
def test_a_batch_is_its_rows(name, model):
    """With its example, on either side of padding; refused where there is no image."""
    spec, batch = hf_compress.methods()[name], batch_of(model)
    if "visual" in spec.needs and model == "llama":
        with pytest.raises(ValueError, match=f"method='{name}' needs visual tokens"):
            shared(model).compress(name, **spec.example)
        return
    for side in ("left", "right"):
        batch = inputs(model, bare(model), side=side)
        torch.manual_seed(0)
        with shared(model).compressed(name, **spec.example) as compressed:
            together = logits(compressed, batch)
            for b in range(2):
                rows = batch["attention_mask"][b].bool()
                close(together[b, rows], logits(compressed, alone(model, batch, b))[0])


def test_outliers_are_the_farthest_from_the_mean():
    model, batch = shared("llava"), batch_of("llava")
    with model.compressed("outliers", keep=5):
        logits(model, batch)
        kept = model.compression.last.visual_kept
    for b in range(2):
        for x, mine in zip(image_embeddings("llava", alone("llava", batch, b)), kept[b]):
            far = [float((token - x.mean(0)).norm()) for token in x]
            assert mine == sorted(sorted(range(len(x)), key=lambda i: -far[i])[:5])


def test_first_seen_keeps_new_words():
    model, ids = shared("llama"), torch.tensor([[1, 5, 6, 5, 7, 6, 5, 8, 9, 5, 20, 21]])
    with model.compressed("first_seen", keep=5, keep_first=1, keep_last=2):
        model(input_ids=ids)
        (rows,) = model.compression.last.layer_index[0]
    assert rows == [0, 1, 2, 4, 7, 8, 10, 11]  # 5 6 7 8 9, between what always stays


def test_midway_is_fastv_there():
    model, batch = shared("llava"), batch_of("llava")
    with model.compressed("midway", ratio=0.3):
        found = logits(model, batch)
        n = model.compression.last.layer_tokens
    with model.compressed("fastv", ratio=0.3, layer=2):
        assert torch.equal(logits(model, batch), found) and n == model.compression.last.layer_tokens
    with pytest.raises(ValueError, match=r"ratio=0\.6: a cut in the middle removes less than half"):
        model.compress("midway", ratio=0.6)


def test_weighty_keeps_the_longest_values():
    model, sample = shared("llama"), alone("llama", batch_of("llama"), 0)
    whole = bare("llama")(**sample, use_cache=True).past_key_values
    with model.compressed("weighty", keep=6):
        cache = model(**sample, use_cache=True).past_key_values
    values = whole.layers[0].values[0]
    for head, kept in zip(values, cache.layers[0].values[0]):
        best = sorted(sorted(range(len(head)), key=lambda i: -float(head[i].norm()))[:6])
        close(kept, head[best])


def test_linear_pool_trains():
    model, batch = fresh("llava"), batch_of("llava")
    with model.compressed("uniform", ratio=0.5, grid=False):
        plain = logits(model, batch)
    model.compress("linear_pool", ratio=0.5)
    assert not torch.allclose(logits(model, batch), plain)
    for p in model.compressor.parameters():
        torch.nn.init.zeros_(p)
    close(logits(model, batch), plain)
    model(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] >= 80, -100)).loss.backward()
    assert all(p.grad.any() for p in model.compressor.parameters())


# -- the command line -------------------------------------------------------------------------------------------------
def command(folder, *arguments):
    """What the command prints, in a process that knows nothing of the files but what it is told."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", COLUMNS="200")
    program = [sys.executable, "-m", "hf_compress.cli", *map(str, arguments)]
    return subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("first", [True, False])
def test_methods_of_a_file_are_listed(first, files):
    option, listing = ["--plugin", files / "weighty.py"], ["methods", "--stage", "cache", "--json"]
    done = command(files, *option, *listing) if first else command(files, *listing, *option)
    assert done.returncode == 0, done.stderr
    names = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert names["weighty"]["summary"] == "Entries whose values are the longest." and "snapkv" in names
    assert names["weighty"]["example"] == {"ratio": 0.5}


def test_methods_of_a_file_are_judged(files, tmp_path):
    options = [
        "--out",
        tmp_path,
        "--model",
        "demo:llava",
        "--data",
        "demo:scenes",
        "--limit",
        "4",
        "--no-time",
        "--json",
    ]
    done = command(
        tmp_path, "eval", *options, "--methods", "outliers", "--ratios", "0.75", "--plugin", files / "outliers.py"
    )
    assert done.returncode == 0, done.stderr
    assert "outliers" in done.stdout
    done = command(tmp_path, "eval", *options, "--methods", "outliers", "--ratios", "0.75")
    assert done.returncode == 2 and "'outliers' is not a method" in done.stderr


def test_answers_of_another_file_are_others(files):
    model, processor = hf_compress.load_demo("llava")
    found = made_by(model, processor)["plugins"]
    assert len(found.split(",")) == len(METHODS)
    plugin.FILES.popitem()
    assert made_by(model, processor)["plugins"] != found
    plugin.FILES.clear()
    assert "plugins" not in made_by(model, processor)


def test_an_adapter_of_a_file(files):
    """A model type that nobody knows is served; in a process of its own, as classes are not forgotten."""
    program = f"""
import torch, transformers as T, pathlib
from hf_compress import plugin
from tests.tiny.text import TEXT

class Config(T.LlamaConfig):
    model_type = "my_model"

model = T.LlamaForCausalLM(Config(**TEXT)).eval()
try:
    model.compress("snapkv", ratio=0.5, window=4)
except ValueError as error:
    print("before:", error)
plugin.load(pathlib.Path({str(files / "adapter.py")!r}))
model.compress("snapkv", ratio=0.5, window=4)
model(torch.arange(3, 23)[None])
print("after:", model.compression.last.cache_tokens)
"""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert "before: model=LlamaForCausalLM (model_type='my_model') is not supported yet" in done.stdout, done.stderr
    assert "after: [[10], [10], [10], [10]]" in done.stdout, done.stderr
    listed = command(files, "architectures", "--json", "--plugin", files / "adapter.py")
    assert any(entry["model_types"] == ["my_model"] for entry in json.loads(listed.stdout))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"must be a file of Python \(\.py\)"),
        ("import nowhere", "cannot be read: ModuleNotFoundError: No module named 'nowhere'"),
        (METHODS["weighty"].replace('"weighty"', '"snapkv"'), "the name is taken by SnapKV"),
        (METHODS["weighty"].replace('"weighty"', '"other"') + "\n1 / 0\n", "cannot be read: ZeroDivisionError"),
        ("import sys; sys.exit(0)", "cannot be read: SystemExit: 0"),
    ],
)
def test_files_that_do_not_work(text, message, tmp_path):
    file, before = tmp_path / "mine.py", list(hf_compress.methods())
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        plugin.load(file)
    assert list(hf_compress.methods()) == before and file not in plugin.FILES
    found = CliRunner().invoke(main, ["methods", "--plugin", str(file)], env={"COLUMNS": "200"})
    assert found.exit_code == 2 and "plugin" in found.output


def test_a_file_is_read_once(files):
    plugin.load(files / "weighty.py")
    plugin.load(files / ".." / files.name / "weighty.py")
    assert build("llama").compress("weighty", keep=4).compression.config.methods[0].method == "weighty"
