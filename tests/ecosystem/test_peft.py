"""PEFT: adapters on a compressed model, and compression of a model with adapters; train, merge, save, load."""

import copy

import peft
import pytest
import torch
import transformers as T

from tests.ecosystem.cases import CONFIGS, STACK, outputs, same, tokens
from tests.tiny import build, inputs

DECODER = r".*language_model.*(q|k|v|o|gate|up|down)_proj"


def lora(**kwargs):
    """LoRA on the decoder with adapters that do something from the start."""
    options = dict(r=4, lora_alpha=16, target_modules=DECODER, init_lora_weights=False)
    return peft.LoraConfig(**options | kwargs)


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
    assert inner is model.get_base_model() and model.compression.model is inner
    compressed = outputs(model, batch)
    assert same(compressed, outputs(merged, batch), atol=2e-4)  # W x + B A x, and (W + B A) x
    assert not same(compressed, plain)
    assert torch.equal(tokens(inner, batch), tokens(model, batch))
    model.decompress()
    assert same(outputs(model, batch), plain)


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
    again = copy.deepcopy(merged).decompress()
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
    model = wrap(build("llava").compress(STACK))
    train(model, batch)
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()  # the compression belongs to the base model
    again = peft.PeftModel.from_pretrained(build("llava").compress(STACK), tmp_path / "adapter").eval()
    assert same(outputs(again, batch), expected)
    later = peft.PeftModel.from_pretrained(build("llava"), tmp_path / "adapter").eval()
    later.compress(STACK)
    assert same(outputs(later, batch), expected)

    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    restored = T.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert same(outputs(restored, batch), outputs(merged, batch))


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
