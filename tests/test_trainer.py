"""The plain `Trainer` fine-tunes a compressed model: nothing of it is subclassed, replaced or told."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

import hf_compress
from hf_compress.demo.dataset import load_scenes, prompt

STEPS, HALF = 8, 4


class Collator:
    """Left padding; labels of the caller's length, -100 on prompt, image and padding."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows):
        tokenizer = self.processor.tokenizer
        texts = [f"{prompt(r['question'])} {r['answer']}{tokenizer.eos_token}" for r in rows]
        batch = self.processor(images=[r["image"] for r in rows], text=texts, padding=True, return_tensors="pt")
        labels = torch.full_like(batch["input_ids"], -100)
        for i, row in enumerate(rows):
            n = len(tokenizer(row["answer"], add_special_tokens=False)["input_ids"]) + 1
            labels[i, -n:] = batch["input_ids"][i, -n:]
        return {**batch, "labels": labels}


@pytest.fixture(scope="module")
def data():
    """Four questions with the answers of one another, which the trained model does not give."""
    rows = list(load_scenes("test", images=4, questions=1, seed=1))
    assert len({r["answer"] for r in rows}) > 1
    return [dict(r, answer=rows[i - 1]["answer"]) for i, r in enumerate(rows)]


def metrics(prediction):
    said, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    counted = labels != -100
    assert said.shape == labels.shape
    return {"token_accuracy": float((said == labels)[counted].mean())}


def trainer(model, processor, data, folder):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=HALF,
        save_steps=HALF,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    return Trainer(
        model,
        arguments,
        data_collator=Collator(processor),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )


# What VLMs give beside logits. Of these `Trainer` cannot gather `image_outputs`, which came with transformers 5.24.
OTHERS = ["past_key_values", "cache", "image_hidden_states", "image_outputs"]


def train(data, folder, method, resume=None):
    """A fresh model, trained; resumed from a checkpoint if one is given."""
    model, processor = hf_compress.load_demo("llava")
    if method:
        model.compress(method, ratio=0.75)
    run = trainer(model, processor, data, folder)
    run.train(resume_from_checkpoint=resume, ignore_keys_for_eval=OTHERS)
    assert run.state.global_step == STEPS
    return run


def gap(a, b):
    """Largest difference of any weight."""
    theirs = b.state_dict()
    return max(float((p - theirs[name]).abs().max()) for name, p in a.state_dict().items())


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Per method (None: uncompressed): the uninterrupted and the resumed run."""
    out = {}
    for method in (None, "fastervlm"):
        folder = tmp_path_factory.mktemp(str(method))
        whole = train(data, folder / "whole", method)
        out[method] = whole, train(data, folder / "again", method, str(folder / "whole" / f"checkpoint-{HALF}"))
    return out


def test_loss_falls_and_metrics_are_there(runs):
    whole, _ = runs["fastervlm"]
    log = whole.state.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    evaluated = [entry for entry in log if "eval_loss" in entry]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    assert [entry["step"] for entry in evaluated] == [HALF, STEPS]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert all(0 <= entry["eval_token_accuracy"] <= 1 for entry in evaluated)


def test_it_was_compressed(runs):
    model = runs["fastervlm"][0].model
    last = model.compression.last
    assert all(len(image) == 49 for sample in last.visual_kept for image in sample)  # 196 / 4
    assert all(rows == [n - 147 for n in last.prompt_tokens] for rows in last.layer_tokens)


def test_every_trained_part_moved(runs):
    """Gradients reach the language model, the projector and the tower through the kept tokens."""
    before, _ = hf_compress.load_demo("llava")
    after = dict(runs["fastervlm"][0].model.named_parameters())
    moved = {n for n, p in before.named_parameters() if not torch.equal(p, after[n])}
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(part in name for name in moved), part


def test_resuming_is_as_close_as_for_the_plain_model(runs):
    """Both resume within rounding of the uninterrupted run; the plain model sets the measure."""
    plain, ours = (gap(whole.model, again.model) for whole, again in (runs[None], runs["fastervlm"]))
    assert ours <= max(2 * plain, 1e-6), (ours, plain)


def test_checkpoints_say_how_the_model_was_compressed(runs):
    """And only they: the config that the trained model goes on with says nothing."""
    for method, (whole, _) in runs.items():
        folder = Path(whole.args.output_dir, f"checkpoint-{HALF}")
        entry = json.loads((folder / "config.json").read_text()).get("compression_config")
        assert entry == (whole.model.compression.config.to_dict() if method else None)
        assert not hasattr(whole.model.config, "compression_config")
