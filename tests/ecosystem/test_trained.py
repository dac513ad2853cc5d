"""A module that a method trains: gradients, optimisers, checkpoints, adapters, folders of its own; no trace after."""

import copy
import json
import pickle

import peft
import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_compress
from hf_compress.engine import trained as engine
from tests.ecosystem.cases import hooks, logits, outputs, same, tokens
from tests.ecosystem.toys import Resampler, Router, registered
from tests.invariants.reference import VLMS, alone, batch_of, close, greedy, image_embeddings, short_logits
from tests.tiny import build, inputs

NAME = "resampler"
CHECK = engine.check_trained  # as it is outside of the tests, see conftest.py
KEYS = {f"compressor.vision.{key}" for key in ("query", "out.weight", "out.bias", "scale")}


@pytest.fixture(autouse=True)
def _known():
    with registered(resampler=Resampler):
        yield


@pytest.fixture
def model():
    return trained(build("llava"))


def trained(model, **options):
    """A module that does something: at the start its vectors are near the tokens that they stand for."""
    torch.manual_seed(1)
    model.compress(NAME, **{"ratio": 0.5} | options)
    with torch.no_grad():
        model.compressor.vision.out.weight.normal_()
    return model


def with_labels(batch):
    return batch | {"labels": batch["input_ids"].masked_fill(batch["input_ids"] >= 80, -100)}


def load(path, **options):
    return T.AutoModelForImageTextToText.from_pretrained(path, **options).eval()


# -- what it does -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [n for n in VLMS if n in ("llava", "qwen2_5_vl", "internvl", "gemma3", "qwen3_vl")])
def test_its_vectors_stand_at_the_kept_tokens(name, side):
    """Against the bare language model on embeddings shortened and filled by hand, row by row."""
    model, batch = trained(build(name)), batch_of(name) if side == "left" else inputs(name, build(name), side=side)
    run = greedy(model, batch) if side == "left" else None
    given = logits(model, batch)
    kept, pool = model.compression.last.visual_kept, copy.deepcopy(model.compressor.vision)
    for row in range(2):
        sample = alone(name, batch, row)
        x = image_embeddings(name, sample)
        with torch.no_grad():
            vectors = [pool(e[k][None], e[None])[0] for e, k in zip(x, kept[row])]
        step = torch.tensor([5])
        new = run.tokens[row] if run is not None else step
        expected = short_logits(name, sample, new, kept[row], vectors=vectors)
        if run is not None:
            close(run.logits[row], expected)
        else:
            last = int(batch["attention_mask"][row].nonzero()[-1])
            close(given[row, last][None], expected[:1])


def test_the_gradient_is_that_of_finite_differences(model):
    """Along the gradient itself: losses are computed in fp32, where one weight alone moves them by little."""
    batch = with_labels(inputs("llava", model))
    model(**batch).loss.backward()
    weight = model.compressor.vision.out.weight
    length, losses = weight.grad.norm(), []
    with torch.no_grad():
        for step in (0.02, -0.02):
            weight += step * weight.grad / length
            losses.append(model(**batch).loss.item())
            weight -= step * weight.grad / length
    assert (losses[0] - losses[1]) / 0.04 == pytest.approx(length.item(), rel=0.02) and length > 0.01


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_moves_it_and_nothing_else(model, checkpointing):
    batch = with_labels(inputs("llava", model))
    for key, p in model.named_parameters():
        p.requires_grad_(key.startswith("compressor."))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03), []
    for _ in range(6):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.25
    assert {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])} == KEYS - {
        "compressor.vision.scale"
    }


def test_gradients_with_and_without_checkpointing_agree(model):
    batch, found = with_labels(inputs("llava", model)), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(**batch).loss.backward()
        found.append([p.grad.clone() for p in model.compressor.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) and a.any() for a, b in zip(*found))


def test_weights_changed_between_calls_count(model):
    """Also where the caller hands the features over, encoded once."""
    batch = inputs("llava", model)
    before = logits(model, batch)
    with torch.no_grad():
        model.compressor.vision.out.bias.add_(1)
    assert not same((before,), (logits(model, batch),))


def test_losses_of_the_method_are_added():
    batch = with_labels(inputs("llava", build("llava")))
    found = [trained(build("llava"), price=price)(**batch) for price in (0.0, 0.5)]
    assert found[1].loss > found[0].loss and torch.equal(found[0].logits, found[1].logits)
    model = trained(build("llava"), price=0.5)
    as_tuple = model(**batch, return_dict=False)[0]
    assert torch.allclose(as_tuple, found[1].loss)
    del batch["labels"]
    assert model(**batch).loss is None


def test_what_make_gives_is_checked(model):
    class Short(Resampler):
        """One vector too few."""

        def make(self, tokens, assignment):
            return super().make(tokens, assignment)[:, 1:]

    with registered(short=Short):
        wrong = build("llava").compress("short", ratio=0.5)
        with pytest.raises(ValueError, match=r"'short' made vectors of shape .*one per kept token, \(n, K, D\)"):
            wrong(**inputs("llava", wrong))


def test_a_whole_image_is_left_as_it_is():
    model = build("llava")
    batch = inputs("llava", model)
    plain = logits(model, batch)
    assert torch.equal(logits(model.compress(NAME, ratio=0), batch), plain)


def test_a_router_between_layers_learns(tmp_path):
    """Beside a vision method that trains too; in one checkpoint, and the loss holds what the gates cost."""
    with registered(stage="decoder", router=Router):
        model = build("llava").compress([NAME, "router"], ratio=0.5)
        batch = with_labels(inputs("llava", model))
        model.train()
        found = model(**batch)
        gates = found.loss - model.loss_function(found.logits, batch["labels"], vocab_size=100)
        assert 0 < gates < 2
        found.loss.backward()
        assert all(p.grad.any() for p in model.compressor.parameters())
        router, step = model.compressor.decoder, 0.01
        grad, losses = router.bias.grad.item(), []
        with torch.no_grad():
            for change in (step, -step):
                router.bias.add_(change)
                losses.append(model(**batch).loss.item())
                router.bias.sub_(change)
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(grad, rel=0.05, abs=1e-4)
        expected = logits(model.eval(), batch)
        model.save_pretrained(tmp_path)
        assert same((logits(load(tmp_path), batch),), (expected,))
        model.compression.save(tmp_path / "alone")
        model.decompress()
        model.compress([NAME, "router"], ratio=0.5, weights=tmp_path / "alone")
        assert same((logits(model, batch),), (expected,))


# -- the model it is part of ------------------------------------------------------------------------------------------
def test_it_leaves_no_trace():
    model = build("llava")
    batch = inputs("llava", model)
    plain, before, state = outputs(model, batch), hooks(model), {k: v.clone() for k, v in model.state_dict().items()}
    trained(model)
    assert set(model.state_dict()) - set(state) == KEYS
    model.decompress()
    assert hooks(model) == before and not hasattr(model, "compressor")
    assert set(model.state_dict()) == set(state)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, batch), plain))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_follows_the_embeddings(dtype):
    model = build("llava").to(getattr(torch, dtype))
    trained(model)
    assert {p.dtype for p in model.compressor.parameters()} == {getattr(torch, dtype)}
    assert not model.compressor.training and model.train().compressor.training
    loss = model(**with_labels(inputs("llava", model))).loss
    loss.backward()
    assert model.compressor.vision.out.weight.grad.isfinite().all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_their_own(model, copied):
    batch = inputs("llava", model)
    other = copied(model)
    expected = logits(model, batch)
    with torch.no_grad():
        model.compressor.vision.out.bias.add_(1)
    assert same((logits(other, batch),), (expected,))
    assert other.compressor is not model.compressor
    other.decompress()
    assert not hasattr(other, "compressor")


def test_a_name_that_is_taken_is_refused():
    model = build("llava")
    model.compressor = nn.Linear(2, 2)
    before = hooks(model)
    with pytest.raises(ValueError, match="has an attribute 'compressor' of its own"):
        model.compress(NAME, ratio=0.5)
    assert hooks(model) == before and model.compression is None


# -- methods that are of no use with new weights ----------------------------------------------------------------------
class Learnt(Resampler):
    """The same, of no use before it was trained."""

    needs_weights = True


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setattr(engine, "check_trained", CHECK)
    with registered(learnt=Learnt):
        yield


def test_new_modules_run_in_training_only(checked, tmp_path):
    model = build("llava").compress("learnt", ratio=0.5)
    batch = inputs("llava", model)
    for call in (lambda: model(**batch), lambda: model.generate(**batch, max_new_tokens=1)):
        with pytest.raises(ValueError, match=r"method='learnt'.*module is new.*weights=.*model\.train\(\)"):
            call()
    model.compression.save(tmp_path / "new")
    with pytest.raises(ValueError, match="module is new"):  # a file of new weights is no better
        build("llava").compress("learnt", ratio=0.5, weights=tmp_path / "new")(**batch)
    model.train()
    model(**with_labels(batch)).loss.backward()
    expected = logits(model.eval(), batch)
    model.compression.save(tmp_path / "alone")
    model.save_pretrained(tmp_path / "whole")
    for other in (
        load(tmp_path / "whole"),
        build("llava").compress("learnt", ratio=0.5, weights=tmp_path / "alone"),
        copy.deepcopy(model),
    ):
        assert same((logits(other, batch),), (expected,))
    logits(build("llava").compress("learnt", ratio=0), batch)  # nothing is asked of it


@pytest.mark.parametrize("named", [["compressor"], None])
def test_new_modules_are_known_inside_an_adapter(checked, named, tmp_path):
    model = build("llava").compress("learnt", ratio=0.5)
    batch = inputs("llava", model)
    wrapped = peft.get_peft_model(model, lora(modules_to_save=named))
    with pytest.raises(ValueError, match="module is new"):
        wrapped.eval()(**batch)
    wrapped.train()
    wrapped(**with_labels(batch)).loss.backward()
    expected = logits(wrapped.eval(), batch)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("llava"), tmp_path)
    assert same((logits(again.eval(), batch),), (expected,))


def test_new_modules_come_from_the_seed():
    """Whatever was drawn before; and what is drawn behind it is as without it."""
    found, models = [], [build("llava") for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1)):
        torch.manual_seed(seed)
        torch.rand(len(found) + 1)
        state = torch.get_rng_state()
        found.append(model.compress(NAME, ratio=0.5).compressor.vision.query)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*found[:2]) and not torch.equal(*found[1:])


def test_modules_of_a_compression_without_gradients_are_trained():
    """`compress` among what only infers."""
    model, batch = build("llava"), inputs("llava", build("llava"))
    with torch.inference_mode():
        model.compress("sts", ratio=0.5)
    model.train()(**with_labels(batch)).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.compressor.parameters())
    assert model.eval().generate(**batch, max_new_tokens=2) is not None


# -- checkpoints ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "llava_onevision", "idefics3"]
)
@pytest.mark.parametrize("shard", [None, "20KB"])
def test_checkpoints_hold_it(name, shard, tmp_path, recwarn):
    model = trained(build(name))
    batch = inputs(name, model)
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path, **({} if shard is None else {"max_shard_size": shard}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard is not None)
    again, info = T.AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert same(outputs(again.eval(), batch), expected)
    bare = load(tmp_path, compression_config=False)
    assert not hasattr(bare, "compressor")
    assert same(outputs(trained(bare), batch), expected)


def test_a_checkpoint_that_lost_it_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    save_file({k: v for k, v in whole.items() if k not in KEYS}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"out\.bias is missing.*compression_config=False"):
        load(tmp_path)
    assert load(tmp_path, compression_config=False).compression is None
    short = {k: v[:1] if k == "compressor.vision.query" else v for k, v in whole.items()}
    save_file(short, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"vision.query is \(1, 32\), the module has \(2, 32\)"):
        load(tmp_path)


def test_a_plain_checkpoint_may_start_it(model, tmp_path):
    build("llava").save_pretrained(tmp_path)
    config = {"methods": [{"method": NAME, "ratio": 0.5}]}
    assert load(tmp_path, compression_config=config).compressor.vision.query.shape == (2, 32)
    model.save_pretrained(tmp_path)
    other = load(tmp_path, compression_config={"methods": [{"method": NAME, "ratio": 0.75}]})
    assert torch.equal(other.compressor.vision.query, model.compressor.vision.query)


class Rows(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return i


def fit(model, folder, steps, resume=None):
    batch = with_labels(inputs("llava", model))
    for key, p in model.named_parameters():
        p.requires_grad_(key.startswith("compressor."))
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=3, learning_rate=0.03, lr_scheduler_type="constant", report_to="none",
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False, per_device_train_batch_size=2, logging_steps=1,
    )  # fmt: skip
    run = Trainer(model, arguments, data_collator=lambda rows: batch, train_dataset=Rows(batch))
    run.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_trainer_saves_and_resumes_it(tmp_path):
    losses = fit(trained(build("llava")), tmp_path / "whole", 6)
    assert losses[-1] < losses[0]
    resumed = fit(trained(build("llava")), tmp_path / "again", 6, str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed == pytest.approx(losses, rel=1e-3)
    batch = inputs("llava", build("llava"))
    halves = [load(tmp_path / "whole" / f"checkpoint-{n}") for n in (3, 6)]
    assert not same((logits(halves[0], batch),), (logits(halves[1], batch),))


# -- a folder of its own ----------------------------------------------------------------------------------------------
def test_exported_alone(model, tmp_path):
    batch = inputs("llava", model)
    expected = outputs(model, batch)
    model.compression.save(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"compressor.safetensors", "compression.json"}
    about = json.loads((tmp_path / "compression.json").read_text())
    assert about["methods"] == {"vision": NAME} and about["shapes"]["vision.query"] == [2, 32]
    other = build("llava").compress(NAME, ratio=0.5, weights=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(outputs(other, batch), expected))
    with hf_compress.compressed(build("llava"), NAME, 0.5, weights=tmp_path) as third:
        assert same(outputs(third, batch), expected)


def missing(folder):
    (folder / "compressor.safetensors").unlink()


def truncated(folder):
    file = folder / "compressor.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def one_less(folder):
    tensors = load_file(folder / "compressor.safetensors")
    tensors.pop("vision.query")
    save_file(tensors, folder / "compressor.safetensors")


def of_another_model(folder):
    about = json.loads((folder / "compression.json").read_text())
    (folder / "compression.json").write_text(json.dumps(about | {"model_type": "qwen2_vl", "base": "some/qwen"}))


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (missing, {}, "there is no compressor.safetensors with a compression.json"),
        (truncated, {}, "is damaged"),
        (one_less, {}, "vision.query is missing"),
        (of_another_model, {}, "are of model_type 'qwen2_vl' .here 'llava'., trained on 'some/qwen'"),
        (lambda folder: None, {"heads": 3}, r"vision.query is \(2, 32\), the module has \(3, 32\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(damage, options, message, model, tmp_path):
    model.compression.save(tmp_path)
    damage(tmp_path)
    other = build("llava")
    before = hooks(other)
    with pytest.raises(ValueError, match=f"{message}.*name a folder that model.compression.save wrote"):
        other.compress(NAME, ratio=0.5, weights=tmp_path, **options)
    assert hooks(other) == before and other.compression is None and not hasattr(other, "compressor")


@pytest.mark.parametrize("weights", [3, {"a": 1}, True])
def test_weights_must_be_a_folder(weights):
    with pytest.raises(ValueError, match="must be a folder that"):
        build("llava").compress(NAME, ratio=0.5, weights=weights)


def test_weights_from_nowhere_are_refused(model, tmp_path):
    model.compression.save(tmp_path)
    other = build("llava")
    before = hooks(other)
    for place in (tmp_path / "none", tmp_path / "compressor.safetensors"):
        with pytest.raises(ValueError, match=r"no such folder.*name a folder that model.compression.save wrote"):
            other.compress(NAME, ratio=0.5, weights=place)
    assert hooks(other) == before and not hasattr(other, "compressor")
    with pytest.raises(ValueError, match=r"folder=.*compression.json' is a file; name a folder"):
        model.compression.save(tmp_path / "compression.json")


def test_methods_that_train_nothing_have_nothing_to_save(tmp_path):
    model = build("llava")
    with pytest.raises(ValueError, match="these methods train nothing"):
        model.compress("random", ratio=0.5, weights=tmp_path)
    with pytest.raises(ValueError, match="trains nothing"):
        model.compress("random", ratio=0.5).compression.save(tmp_path)


# -- PEFT -------------------------------------------------------------------------------------------------------------
def lora(**options):
    return peft.LoraConfig(r=2, target_modules=["q_proj"], **options)


@pytest.mark.parametrize("named", [["compressor"], None])
def test_an_adapter_brings_it_along(model, named, tmp_path):
    """Trained by PEFT where `modules_to_save` names it; beside the adapter in any case."""
    batch = inputs("llava", model)
    wrapped = peft.get_peft_model(model, lora(modules_to_save=named))
    wanted = {k for k, p in wrapped.named_parameters() if p.requires_grad and "compressor" in k}
    assert len(wanted) == (3 if named else 0)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    start = [p.detach().clone() for k, p in wrapped.named_parameters() if k in wanted]
    for _ in range(2):
        wrapped(**with_labels(batch)).loss.backward()
        optimizer.step()
    end = [p for k, p in wrapped.named_parameters() if k in wanted]
    assert not any(torch.equal(a, b) for a, b in zip(start, end))
    expected = logits(wrapped.eval(), batch)
    wrapped.save_pretrained(tmp_path)
    for base in (build("llava"), trained(build("llava"))):
        again = peft.PeftModel.from_pretrained(base, tmp_path)
        assert same((logits(again, batch),), (expected,))


def test_an_adapter_does_not_lose_it_silently(model, tmp_path):
    wrapped = peft.get_peft_model(model, lora(modules_to_save=["compressor"]))
    wrapped.save_pretrained(tmp_path)
    (tmp_path / "compressor.safetensors").unlink()
    with pytest.raises(ValueError, match="is missing"):
        peft.PeftModel.from_pretrained(build("llava"), tmp_path)
    (tmp_path / "compression_config.json").unlink()
    with pytest.raises(ValueError, match="holds a trained compressor, which PEFT would leave out"):
        peft.PeftModel.from_pretrained(build("llava"), tmp_path)
    assert peft.PeftModel.from_pretrained(build("llava"), tmp_path, compression_config=False)


def test_merged_adapters_are_saved_with_it(model, tmp_path):
    wrapped = peft.get_peft_model(model, lora(modules_to_save=["compressor"]))
    with torch.no_grad():
        wrapped.base_model.model.compressor.modules_to_save["default"].vision.out.bias.add_(1)
    batch = inputs("llava", model)
    expected = logits(wrapped.eval(), batch)
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert same((logits(load(tmp_path), batch),), (expected,))
    assert tokens(merged, batch).shape[1] == 5
