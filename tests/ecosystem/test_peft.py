"""PEFT: adapters on a compressed model, and compression of a model with adapters; train, merge, save, load."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers as T
from packaging.version import Version

import hf_compress
from hf_compress.loading_peft import FILE
from tests.ecosystem.cases import CONFIGS, STACK, outputs, same, tokens
from tests.tiny import build, inputs

ROOT = Path(__file__).parents[2]
DECODER = r".*language_model.*(q|k|v|o|gate|up|down)_proj"


def lora(**kwargs):
    """LoRA on the decoder with adapters that do something from the start."""
    options = dict(r=4, lora_alpha=16, target_modules=DECODER, init_lora_weights=False)
    return peft.LoraConfig(**options | kwargs)


# The adapters of transformers itself: some of its releases ask for a PEFT that is not out yet.
native = pytest.mark.skipif(
    Version(peft.__version__) < Version(getattr(T.integrations.peft, "MIN_PEFT_VERSION", "0")),
    reason=f"transformers {T.__version__} asks for a newer PEFT than {peft.__version__}",
)


def wrap(model, **kwargs):
    torch.manual_seed(0)
    return peft.get_peft_model(model, lora(**kwargs)).eval()


def loss_inputs(batch):
    return batch | {"labels": batch["input_ids"].masked_fill(batch["input_ids"] >= 80, -100)}


def train(model, batch, steps=3):
    """The losses of a few steps on the parameters that want them."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(**loss_inputs(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.fixture(scope="module")
def batch():
    return inputs("llava", build("llava"))


@pytest.mark.parametrize("name", CONFIGS)
def test_compress_a_wrapped_model(name, batch):
    model = wrap(build("llava"))
    plain = outputs(model, batch)
    merged = copy.deepcopy(model).merge_and_unload().compress(CONFIGS[name])
    inner = model.compress(CONFIGS[name])
    assert inner is model.get_base_model() and model.compression.context.model is inner
    compressed = outputs(model, batch)
    assert same(compressed, outputs(merged, batch), atol=2e-4)  # W x + B A x, and (W + B A) x
    assert not same(compressed, plain)
    assert torch.equal(tokens(inner, batch), tokens(model, batch))
    model.decompress()
    assert same(outputs(model, batch), plain)


@pytest.mark.parametrize("outside", [wrap, torch.compile, lambda model: torch.compile(wrap(model))])
def test_the_functions_reach_the_model_inside(outside, batch):
    """`hf_compress.compress(model)` does what `model.compress()` does, whatever wraps the model."""
    inner = build("llava")
    model = outside(inner)
    assert hf_compress.compress(model, CONFIGS["cache"]) is inner and inner.compression.context.model is inner
    with pytest.raises(ValueError, match="already compressed by h2o"):
        hf_compress.compress(model, "knorm", ratio=0.5)
    hf_compress.decompress(model)
    assert inner.compression is None
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration is not compressed"):
        hf_compress.decompress(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_wrap_a_compressed_model(name, batch):
    model = wrap(build("llava"))
    model.compress(CONFIGS[name])
    other = wrap(build("llava").compress(CONFIGS[name]))
    assert same(outputs(other, batch), outputs(model, batch))
    other.decompress()
    model.decompress()
    assert same(outputs(other, batch), outputs(model, batch))


@pytest.mark.parametrize("first", ["compress", "wrap"])
def test_train_and_merge(first, batch):
    model = build("llava")
    model = wrap(model.compress(STACK)) if first == "compress" else wrap(model)
    if first == "wrap":
        model.compress(STACK)
    frozen = {k: p.clone() for k, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, batch)
    assert losses[0] > losses[1] > losses[2]
    assert all(torch.equal(p, frozen[k]) for k, p in model.named_parameters() if k in frozen)
    expected = outputs(model, batch)

    merged = model.merge_and_unload()
    assert isinstance(merged, T.LlavaForConditionalGeneration) and merged.compression is not None
    assert same(outputs(merged, batch), expected, atol=2e-4)
    again = copy.deepcopy(merged)
    again.decompress()
    assert {type(m) for m in again.modules()} == {type(m) for m in build("llava").modules()}
    assert same(outputs(again.compress(STACK), batch), outputs(merged, batch))


def test_training_is_the_same_whoever_comes_first(batch):
    a, b = wrap(build("llava").compress(STACK)), wrap(build("llava"))
    b.compress(STACK)
    losses = train(a, batch)
    assert train(b, batch) == pytest.approx(losses, rel=1e-5)
    assert train(wrap(build("llava")), batch) != pytest.approx(losses, rel=1e-2)


def test_gradients_are_those_of_the_merged_weights(batch):
    """d loss / d B = (d loss / d W) A^T * scale: the adapters learn through the compression as the weights would."""
    model = wrap(build("llava"))
    merged = copy.deepcopy(model).merge_and_unload()
    for m in (model, merged):
        m.compress(STACK)
        m.requires_grad_(True)
        m(**loss_inputs(batch)).loss.backward()
    for i, layer in enumerate(model.get_decoder().layers):
        part, weight = layer.self_attn.v_proj, merged.get_decoder().layers[i].self_attn.v_proj.weight
        expected = weight.grad @ part.lora_A["default"].weight.T * part.scaling["default"]
        torch.testing.assert_close(part.lora_B["default"].weight.grad, expected, atol=1e-4, rtol=1e-3)


def test_adapters_are_saved_and_loaded(batch, tmp_path):
    """The folder of an adapter says how its model is compressed; a merged model says it in its config."""
    model = wrap(build("llava").compress(STACK))
    train(model, batch)
    expected, folder = outputs(model, batch), tmp_path / "adapter"
    model.save_pretrained(folder)
    assert json.loads((folder / FILE).read_text()) == model.compression.config.to_dict()
    assert not (folder / "config.json").exists()
    for base in (build("llava"), build("llava").compress(STACK)):
        again = peft.PeftModel.from_pretrained(base, folder).eval()
        assert again.compression.config == model.compression.config and again.compression.context.model is base
        assert same(outputs(again, batch), expected)
    later = peft.PeftModel.from_pretrained(build("llava"), folder, compression_config=False).eval()
    assert later.compression is None and not same(outputs(later, batch), expected)
    later.compress(STACK)
    assert same(outputs(later, batch), expected)

    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    restored = T.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert restored.compression.config == merged.compression.config
    assert same(outputs(restored, batch), outputs(merged, batch))


def test_an_adapter_of_another_compression_is_refused(batch, tmp_path):
    """Before anything is loaded; or the model keeps its own, if that is said."""
    wrap(build("llava").compress(STACK)).save_pretrained(tmp_path)
    base = build("llava").compress("uniform", ratio=0.5)
    expected, names = outputs(base, batch), [n for n, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"goes with visionzip.*compressed by uniform.*compression_config=False"):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert [n for n, _ in base.named_modules()] == names and same(outputs(base, batch), expected)
    kept = peft.PeftModel.from_pretrained(base, tmp_path, compression_config=False)
    assert kept.compression.config.summary() == "uniform(ratio=0.5)"
    with pytest.raises(ValueError, match="goes with visionzip"):
        kept.load_adapter(tmp_path, "second")
    assert list(kept.peft_config) == ["default"]
    kept.decompress()
    kept.load_adapter(tmp_path, "second")
    assert kept.compression.config.summary().startswith("visionzip")


def test_a_load_that_fails_leaves_the_model_uncompressed(tmp_path):
    wrap(build("llava").compress(STACK)).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    base = build("llava")
    with pytest.raises(Exception, match=r"(?i)weights|repo"):  # PEFT looks for them on a hub then
        peft.PeftModel.from_pretrained(base, str(tmp_path), local_files_only=True)
    assert base.compression is None


def test_saving_over_an_adapter(tmp_path):
    """The file belongs to the adapter that is saved: it goes with the compression; each adapter has its own."""
    model = wrap(build("llava").compress(STACK))
    model.add_adapter("second", lora(r=2))
    model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).exists() and (tmp_path / "second" / FILE).exists()
    model.decompress()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists() and not (tmp_path / "second" / FILE).exists()
    assert all("save_pretrained" not in vars(config) for config in model.peft_config.values())


@native
def test_adapters_that_transformers_saves_and_loads(batch, tmp_path):
    """Without a `PeftModel`: by `load_adapter`, and by `from_pretrained` of the folder of the adapter."""
    build("llava").save_pretrained(tmp_path / "base")
    model = T.AutoModelForImageTextToText.from_pretrained(tmp_path / "base").compress(STACK)
    torch.manual_seed(0)
    model.add_adapter(lora())
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    expected = outputs(model.eval(), batch)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / FILE).exists()
    again = T.AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter").eval()
    assert again.compression.config == model.compression.config
    assert same(outputs(again, batch), expected)
    later = T.AutoModelForImageTextToText.from_pretrained(tmp_path / "base").eval()
    later.load_adapter(tmp_path / "adapter")
    assert same(outputs(later.eval(), batch), expected)
    bare = T.AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter", compression_config=False)
    assert bare.compression is None


def test_peft_is_reached_whoever_is_imported_first(tmp_path):
    """And importing hf_compress does not import it."""
    wrap(build("llama").compress("knorm", ratio=0.5), target_modules="all-linear").save_pretrained(tmp_path)
    for first, second in (("hf_compress", "peft"), ("peft", "hf_compress")):
        program = (
            f"import sys, {first}; assert 'peft' not in sys.modules or {first!r} == 'peft'; import importlib.util; "
            f"importlib.util.find_spec('peft.peft_model'); import {second}, peft; from tests.tiny import build; "
            f"model = peft.PeftModel.from_pretrained(build('llama'), {str(tmp_path)!r}); "
            "print(model.compression.config.summary())"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.stdout.strip().endswith("knorm(ratio=0.5)"), done.stderr


def test_adapters_can_be_switched_off_and_swapped(batch):
    base = build("llava").compress(STACK)
    expected = outputs(base, batch)
    model = wrap(base)
    first = outputs(model, batch)
    model.add_adapter("second", lora(r=2))
    model.set_adapter("second")
    assert not same(outputs(model, batch), first)
    model.set_adapter("default")
    assert same(outputs(model, batch), first)
    with model.disable_adapter():
        assert same(outputs(model, batch), expected)
    assert same(outputs(model.unload(), batch), expected)


@native
def test_adapters_of_transformers(batch):
    model = build("llava").compress(STACK)
    expected = outputs(model, batch)
    model.add_adapter(lora())
    model.eval()
    assert not same(outputs(model, batch), expected)
    model.disable_adapters()
    assert same(outputs(model, batch), expected)


@pytest.mark.parametrize("first", ["compress", "wrap"])
def test_a_trained_projector_beside_the_adapters(first, batch):
    """modules_to_save copies a module that the compression has hooks on."""
    model = build("llava")
    options = dict(modules_to_save=["multi_modal_projector"])
    model = wrap(model.compress("visionzip", ratio=0.5), **options) if first == "compress" else wrap(model, **options)
    if first == "wrap":
        model.compress("visionzip", ratio=0.5)
    plain = wrap(build("llava"))
    plain.compress("visionzip", ratio=0.5)
    assert sum(p.numel() for p in model.parameters()) < 1.5 * sum(p.numel() for p in plain.parameters())
    assert same(outputs(model, batch), outputs(plain, batch))
    train(model, batch)
    plain.decompress()
    assert not same(outputs(model, batch), outputs(plain, batch))
