"""Steps of the plain `Trainer` on a compressed model are those of batches that were shortened by hand."""

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, Trainer, TrainerCallback, TrainingArguments

from tests.ecosystem.test_bitsandbytes import checkpoint, load  # noqa: F401 - a fixture
from tests.tiny import IMG, LLAVA_TOKENS, build, inputs

STEPS, RATE = 4, 2e-3
METHOD, RATIO = "fastervlm", 0.75  # keeps tokens as they are


def batches(model):
    """Two ragged batches of two rows, padded on either side, with other numbers of labels."""
    out = []
    for side, last in (("left", 4), ("right", 1)):
        batch = inputs("llava", model, side=side)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        behind = mask.flip(1).cumsum(1).flip(1)  # real tokens from here to the end
        learnt = (ids != IMG) & (mask == 1) & (behind <= last)
        out.append(batch | {"labels": ids.masked_fill(~learnt, -100)})
    return out


class Kept(TrainerCallback):
    """Which visual tokens stayed of each micro batch, by its number of labels."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, *args, **kwargs):
        self.steps.append([])

    def note(self, model, args, kwargs, out):
        if model.training:
            self.steps[-1].append((int((kwargs["labels"] != -100).sum()), model.compression.last.visual_kept))


def trainer(model, folder, kept, checkpointing=None, **options):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": STEPS} | options
    if checkpointing is not None:
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    arguments = TrainingArguments(
        output_dir=str(folder),
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        save_steps=2,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    found = model.get_base_model() if hasattr(model, "get_base_model") else model
    found.register_forward_hook(kept.note, with_kwargs=True)
    return Trainer(model, arguments, train_dataset=batches(found), data_collator=lambda rows: rows[0], callbacks=[kept])


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def short_logits(model, batch, kept):
    """(n, V) logits of the rows before a label, (n,) labels: of a batch that has lost what is not `kept` by hand."""
    found, images = [], iter(model.model.get_image_features(batch["pixel_values"]).pooler_output)
    for row, ids in enumerate(batch["input_ids"]):
        x, where = model.get_input_embeddings()(ids), (ids == IMG).nonzero()[:, 0].split(LLAVA_TOKENS)
        stays = batch["attention_mask"][row].bool()
        for places, mine in zip(where, kept[row]):
            x = x.index_put((places,), next(images).to(x.dtype))
            stays[places] = False
            stays[places[list(mine)]] = True
        logits, labels = model(inputs_embeds=x[stays][None], use_cache=False).logits[0], batch["labels"][row][stays]
        at = (labels != -100).nonzero()[:, 0]
        found.append((logits[at - 1], labels[at]))
    return [torch.cat(part) for part in zip(*found)]


def shortened(model, batch, kept):
    """The loss summed over the labels of such a batch."""
    logits, labels = short_logits(model, batch, kept)
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def by_hand(model, steps):
    """The losses of steps of SGD on the shortened batches: sums over all labels of a step, by their number."""
    data = {int((batch["labels"] != -100).sum()): batch for batch in batches(model)}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    out = []
    model.train()
    for micro in steps:
        assert {n for n, _ in micro} == set(data)
        loss = sum(shortened(model, data[n], kept) for n, kept in micro) / sum(data)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_losses_of_a_training(tmp_path, checkpointing):
    model, kept = build("llava").compress(METHOD, ratio=RATIO), Kept()
    run = trainer(model, tmp_path, kept, checkpointing)
    run.train()
    expected = by_hand(build("llava"), kept.steps)
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert abs(expected[0] - expected[-1]) > 0.01


def test_losses_after_resuming(tmp_path):
    """The checkpoint brings the compression along."""
    model, kept = build("llava").compress(METHOD, ratio=RATIO), Kept()
    trainer(model, tmp_path, kept, max_steps=STEPS).train()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-2")
    assert again.compression.config == model.compression.config
    later = trainer(again, tmp_path / "again", Kept(), max_steps=STEPS)
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(later)[-2:] == pytest.approx(by_hand(build("llava"), kept.steps)[2:], rel=1e-5)


def lora(model):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*(q|v)_proj", init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("checkpointing", [None, False])
def test_losses_of_lora(tmp_path, checkpointing):
    model, kept = lora(build("llava")), Kept()
    model.compress(METHOD, ratio=RATIO)
    run = trainer(model, tmp_path, kept, checkpointing)
    run.train()
    assert losses(run) == pytest.approx(by_hand(lora(build("llava")).get_base_model(), kept.steps), rel=1e-5)


def test_losses_of_qlora(tmp_path, checkpoint):  # noqa: F811
    """Weights of 4 bits, adapters in fp32."""

    def build_it():
        return lora(peft.prepare_model_for_kbit_training(load(checkpoint, "nf4"), use_gradient_checkpointing=False))

    model, kept = build_it(), Kept()
    model.compress(METHOD, ratio=RATIO)
    run = trainer(model, tmp_path, kept)
    run.train()
    assert losses(run) == pytest.approx(by_hand(build_it().get_base_model(), kept.steps), rel=1e-5)


@pytest.mark.parametrize("before", [False, True])
def test_sft_trainer_of_trl(tmp_path, before):
    """It replaces the forward of the model, which must not be ours by then; too early is refused, not passed over."""
    from trl import SFTConfig, SFTTrainer

    model, kept = build("llava"), Kept()
    model.register_forward_hook(kept.note, with_kwargs=True)
    if before:
        model.compress(METHOD, ratio=RATIO)
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    import datasets

    from hf_compress import load_demo

    run = SFTTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_list([{"row": 0}, {"row": 1}]),
        data_collator=lambda rows: batches(model)[rows[0]["row"]],
        processing_class=load_demo("llava")[1],
        callbacks=[kept],
    )
    if before:
        with pytest.raises(RuntimeError, match="compress it after the trainer"):
            run.train()
        return
    model.compress(METHOD, ratio=RATIO)
    run.train()
    assert losses(run) == pytest.approx(by_hand(build("llava"), kept.steps), rel=1e-5)
