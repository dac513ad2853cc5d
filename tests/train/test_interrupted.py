"""Trainings that break off and go on: nothing of a step outlasts it, and checkpoints say how a model is trained."""

import warnings

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

from hf_compress.train import CompressionCallback, Distill, Fixed
from tests.ecosystem.cases import logits
from tests.ecosystem.toys import Resampler, registered
from tests.tiny import build, inputs
from tests.train.test_schedules import rows

ASKED, STEP = 0.5, 0.75  # ratios of `compress`, and of a step


@pytest.fixture(autouse=True)
def _known():
    with registered(resampler=Resampler):
        yield


class Broken(Exception):
    """Somebody has pulled the plug."""


class Plug(TrainerCallback):
    """Breaks the second step off: in the forward, in backward, or before the optimiser."""

    def __init__(self, where):
        self.where, self.handles = where, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step != 1:
            return
        last = model.lm_head
        if self.where == "forward":
            self.handles.append(last.register_forward_hook(self.pull))
        if self.where == "backward":
            self.handles.append(last.register_full_backward_hook(self.pull))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.where == "optimizer" and state.global_step == 1:
            self.pull()

    def pull(self, *args):
        for handle in self.handles:
            handle.remove()
        raise Broken


def trainer(model, folder, *callbacks, **options):
    options = {"max_steps": 3, "save_strategy": "no"} | options
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        optim="sgd",
        learning_rate=1e-9,
        logging_steps=1,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    data = {"train_dataset": rows(model), "data_collator": lambda found: found[0]}
    return Trainer(model, arguments, **data, callbacks=list(callbacks))


def tokens(model):
    """Of an image of the last prompt."""
    return len(model.compression.last.visual_kept[0][0])


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
@pytest.mark.parametrize(("method", "options"), [("fastervlm", {}), ("fastv", {"layer": 1, "ratio": 0.3})])
def test_a_step_that_breaks_off(tmp_path, where, method, options):
    """Evaluated, saved, reported and trained on, the model is the one that was asked for."""
    model, ratio = build("llava"), options.pop("ratio", ASKED)
    model.compress(method, ratio=ratio, **options).eval()
    before, config = logits(model, inputs("llava", model)), model.compression.config
    with pytest.raises(Broken):
        trainer(model, tmp_path, CompressionCallback(Fixed(ratio / 2)), Plug(where)).train()
    model.eval()
    torch.testing.assert_close(logits(model, inputs("llava", model)), before, atol=1e-5, rtol=0)
    assert model.compression.config is config and f"ratio={ratio}" in repr(model.compression)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert again.compression.config == config
    run = trainer(model, tmp_path, CompressionCallback(Fixed(ratio / 2)))  # the same model, once more
    run.train()
    assert [log["compression_ratio"] for log in run.state.log_history if "loss" in log] == [ratio / 2] * 3
    model.train()(**rows(model)[0])
    other = build("llava").compress(method, ratio=ratio, **options).train()
    other(**rows(model)[0])
    assert model.compression.last.layer_index == other.compression.last.layer_index


def test_a_failed_forward_takes_the_ratio_of_its_step_along():
    model = build("llava").compress("fastervlm", ratio=ASKED).train()
    whole = 2 * (model(**rows(model)[0]) and tokens(model))
    model.compression.lend(STEP)
    model(**rows(model)[0])
    assert tokens(model) == whole // 4
    model.eval()(**rows(model)[0])  # whoever evaluates in mid-step
    assert tokens(model) == whole // 2
    with pytest.raises(ValueError, match="labels"):
        model.train()(**rows(model)[0] | {"labels": rows(model)[0]["input_ids"]})
    model(**rows(model)[0])
    assert tokens(model) == whole // 2
    model.compression.lend(STEP)
    model.compression.set_budget(0.25)  # from now on
    model(**rows(model)[0])
    model.compression.take_back()
    assert tokens(model) == 3 * whole // 4


@pytest.mark.parametrize("what", ["compressor", "compressor+projector", "all"])
def test_what_is_trained_is_saved(tmp_path, what):
    model = build("llava").compress("resampler", ratio=ASKED, trainable=what, distill=Distill(0.5, 2.0))
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.compression.config == model.compression.config and again.compression.context.distill.temperature == 2
    trained, now = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (model, again))
    assert trained == now and trained
    batch = rows(model)[0]
    torch.testing.assert_close(again.train()(**batch).loss, model.train()(**batch).loss)
    again.compression.set_budget(STEP)
    assert again.compression.config.trainable == what
    again.decompress()
    assert all(p.requires_grad for p in again.parameters())
    bare = AutoModelForImageTextToText.from_pretrained(tmp_path, compression_config=False)
    assert all(p.requires_grad for p in bare.parameters())


def test_what_is_passed_counts_more_than_what_was_saved():
    model = build("llava").compress("resampler", ratio=ASKED, trainable="compressor", distill=0.5)
    config = model.compression.config
    other = build("llava").compress(config, trainable="all", distill=2.0)
    assert (other.compression.config.trainable, other.compression.context.distill.weight) == ("all", 2.0)
    assert (config.trainable, config.distill) == ("compressor", {"weight": 0.5, "temperature": 1.0})
    plain = build("llava").compress("visionzip", ratio=ASKED).compression.config.to_dict()
    assert plain.keys() == {"methods", "version"}
    for wrong in ({"distill": {"wait": 1}}, {"distill": {"weight": -1}}, {"trainable": "some"}):
        with pytest.raises(ValueError, match=r"distill|weight|trainable"):
            build("llava").compress(plain | wrong)


def test_a_checkpoint_is_served_in_4_bits(tmp_path):
    """What it was trained by says nothing of how it is loaded."""
    build("llava").compress("visionzip", ratio=ASKED, trainable="all").save_pretrained(tmp_path)
    four = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.warns(UserWarning, match="trainable='all'"):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=four)
    assert model.compression.config.trainable is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.compression.config.trainable == "all"


def test_a_resumed_training_is_taught_as_before(tmp_path):
    """From its checkpoint, to the losses that it would have had."""
    model = build("llava").compress("fastervlm", ratio=ASKED, distill=0.5, trainable="all")
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(model, tmp_path, CompressionCallback(Fixed(STEP)), **options)
    whole.train()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-2")
    later = trainer(again, tmp_path / "again", CompressionCallback(Fixed(STEP)), **options)
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in (whole, later)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
