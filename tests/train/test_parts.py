"""Parts of a compressed model that are trained, and distillation from the same model without its compression."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as T

from hf_compress.train import Distill
from tests.ecosystem.test_bitsandbytes import checkpoint, load  # noqa: F401 - a fixture
from tests.ecosystem.toys import Resampler, registered
from tests.tiny import build, inputs


@pytest.fixture(autouse=True)
def _known():
    with registered(resampler=Resampler):
        yield


def labelled(batch):
    hidden = (batch["input_ids"] >= 80) | (batch["attention_mask"] == 0)
    hidden |= batch["attention_mask"].cumsum(1) == 1
    return batch | {"labels": batch["input_ids"].masked_fill(hidden, -100)}


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3", "internvl"])
@pytest.mark.parametrize("what", ["compressor", "compressor+projector", "all"])
def test_only_the_named_parts_are_trained(name, what):
    model = build(name)
    first = next(model.parameters())
    first.requires_grad_(False)  # as the caller left it
    before = trained_names(model)
    model.compress("resampler", ratio=0.5, trainable=what)
    found = trained_names(model)
    own = {n for n in found if n.startswith("compressor.")}
    projector = {n for n in found if any(p in n for p in ("projector", "merger", "connector"))}
    assert own and bool(projector) == (what != "compressor")
    assert found == (own | projector if what != "all" else {n for n, _ in model.named_parameters()})
    model.train()
    model(**labelled(inputs(name, model))).loss.backward()
    assert all((p.grad is not None) <= p.requires_grad for p in model.parameters())
    assert all(model.get_parameter(n).grad.abs().sum() > 0 for n in own if "query" not in n)
    model.decompress()
    assert trained_names(model) == before and not first.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_frozen_parts_with_checkpointing(reentrant):
    """Gradients of what is trained are those without checkpointing, though the embeddings are frozen."""
    model, found = build("llava"), []
    model.compress("resampler", ratio=0.5, trainable="compressor")
    with torch.no_grad():
        model.compressor.vision.out.weight.normal_()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train().zero_grad()
        model(**labelled(inputs("llava", model))).loss.backward()
        found.append([p.grad.clone() for p in model.compressor.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) and a.any() for a, b in zip(*found))


def test_parts_that_are_not_there(checkpoint):  # noqa: F811
    wrong = [
        (build("llava"), "visionzip", "projector", "must be one of"),
        (build("llava"), "visionzip", "compressor", "train no module; these do"),
        (load(checkpoint, "nf4"), "visionzip", "all", "4 or 8 bits.*llm_int8_skip_modules.*LoRA"),
        (load(checkpoint, "nf4"), "resampler", "compressor+projector", "4 or 8 bits.*llm_int8_skip_modules.*LoRA"),
    ]
    for model, method, what, message in wrong:
        before = trained_names(model)
        with pytest.raises(ValueError, match=message):
            model.compress(method, ratio=0.5, trainable=what)
        assert model.compression is None and trained_names(model) == before and not hasattr(model, "compressor")
    text = build("llama")
    with pytest.raises(ValueError, match="has no projector"):
        text.compress("snapkv", ratio=0.5, trainable="compressor+projector")


def expected(model, teacher, batch, temperature=1.0, items=None):
    """The divergence, token by token."""
    with torch.no_grad():
        right = teacher.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits
    said = model(**batch).logits  # with labels, which are not asked what stays
    total, count = 0.0, 0
    for b, t in (batch["labels"] != -100).nonzero().tolist():
        p = F.softmax(right[b, t - 1] / temperature, -1)
        q = F.softmax(said[b, t - 1] / temperature, -1)
        total, count = total + (p * (p.log() - q.log())).sum(), count + 1
    return temperature**2 * total / (count if items is None else items)


@pytest.mark.parametrize(("method", "options"), [("visionzip", {}), ("tome", {}), ("fastv", {"layer": 1})])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_divergence_is_added_to_the_loss(name, method, options):
    if method == "visionzip" and name != "llava":
        method = "random"
    ratio, batch = 0.4, labelled(inputs(name, build(name)))
    plain = build(name).compress(method, ratio=ratio, **options).train()
    model = build(name).compress(method, ratio=ratio, distill=Distill(0.5, 2.0), **options).train()
    extra = expected(plain, build(name), batch, 2.0)
    assert extra > 0.01
    out = model(**batch)
    torch.testing.assert_close(out.loss, plain(**batch).loss + 0.5 * extra, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(**batch, return_dict=False)[0], out.loss)
    counted = model(**batch, num_items_in_batch=torch.tensor(7)).loss
    wanted = plain(**batch, num_items_in_batch=torch.tensor(7)).loss + 0.5 * expected(plain, build(name), batch, 2.0, 7)
    torch.testing.assert_close(counted, wanted, atol=1e-3, rtol=1e-4)
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model.eval()(**batch).loss, plain.eval()(**batch).loss)  # of training alone


def test_its_gradient_is_that_of_the_student_alone():
    batch = labelled(inputs("llava", build("llava")))
    model = build("llava").compress("visionzip", ratio=0.75, distill=1.0).train()
    plain = build("llava").compress("visionzip", ratio=0.75).train()
    model(**batch).loss.backward()
    (plain(**batch).loss + expected(plain, build("llava"), batch)).backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters()):
        if a.grad is not None or b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_the_teacher_has_no_adapter():
    model = build("llava")
    batch = labelled(inputs("llava", model))
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules=r".*language_model.*(q|v)_proj", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora)
    plain = copy.deepcopy(wrapped)
    wrapped.compress("visionzip", ratio=0.75, distill=1.0)
    plain.compress("visionzip", ratio=0.75)
    before = trained_names(wrapped)
    wrapped.train(), plain.train()
    loss = wrapped(**batch).loss
    torch.testing.assert_close(loss, plain(**batch).loss + expected(plain, build("llava"), batch), atol=1e-4, rtol=1e-4)
    loss.backward()
    assert trained_names(wrapped) == before
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)


def test_wrong_lessons():
    for value in ("yes", True, -1.0):
        with pytest.raises(ValueError, match=r"distill|weight"):
            build("llava").compress("visionzip", ratio=0.5, distill=value)
    with pytest.raises(ValueError, match="temperature"):
        Distill(temperature=0)
    model = build("llava").compress("visionzip", ratio=0.5, distill=1.0).train()
    batch = labelled(inputs("llava", model))
    cache = T.DynamicCache(config=model.config.get_text_config())
    model.model.language_model.config.use_cache = True
    with torch.no_grad():
        model(**{k: v for k, v in batch.items() if k != "labels"}, past_key_values=cache)
    with pytest.raises(ValueError, match="train without a cache"):
        model(input_ids=batch["input_ids"][:, -1:], labels=batch["input_ids"][:, -1:], past_key_values=cache)
