"""Ratios that follow a schedule: what is removed at every step, between steps, after resuming, and what is refused."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, Trainer, TrainerCallback, TrainingArguments

from hf_compress.train import CompressionCallback, Every, Fixed, Linear, Sampled, Stages
from hf_compress.train.schedules import NAMED
from tests.ecosystem.cases import logits
from tests.tiny import IMG, build, inputs, single

STEPS = 4


def test_stages_of_llavolta():
    """The table of its code: steps 0, 1300, 2600 and 3900 of 5197 begin a stage; layers 2 and 16 of 32."""
    cost = {1299: 2 + 30 / 8, 1300: 2 + 30 / 2, 2599: 2 + 30 / 2, 2600: 16 + 16 / 2, 3899: 16 + 16 / 2, 3900: 32}
    for step, layers in cost.items():
        assert NAMED["llavolta"].at(step, 5197) == pytest.approx(1 - layers / 32)


def test_the_others():
    assert [Linear(0.8, 0.2).at(i, 4) for i in range(4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert [Stages((0.5, 0.0), starts=(0, 3)).at(i, 9) for i in (0, 2, 3, 8)] == [0.5, 0.5, 0.0, 0.0]
    sampled = Sampled((0.25, 0.5, 0.75))
    drawn = [sampled.at(i, 99) for i in range(99)]
    assert set(drawn) == {0.25, 0.5, 0.75} and drawn == [Sampled((0.25, 0.5, 0.75)).at(i, 99) for i in range(99)]
    assert drawn != [Sampled((0.25, 0.5, 0.75), seed=1).at(i, 99) for i in range(99)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed(1.0), "ratio=1.0"),
        (lambda: Stages(()), "ratios="),
        (lambda: Stages(0.5), r"ratios=0\.5 must be a list"),
        (lambda: Sampled(0.5), r"ratios=0\.5 must be a list"),
        (lambda: Stages((0.5, 0.2), starts=(1, 2)), "starts="),
        (lambda: Sampled(()), "ratios="),
        (lambda: Every(()), "ratios="),
        (lambda: CompressionCallback("llavolter"), "llavolta"),
    ],
)
def test_wrong_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "ratios", "knobs"),
    [("visionzip", (0.25, 0.75, 0.0), {}), ("fastv", (0.2, 0.4, 0.0), {"layer": 1}), ("tome", (0.25, 0.4, 0.0), {})],
)
def test_a_new_budget_is_that_of_a_new_compression(method, ratios, knobs):
    model, batch = build("llava"), inputs("llava", build("llava"))
    bare = logits(model, batch)
    model.compress(method, ratio=0.5 if method != "fastv" else 0.3, **knobs)
    first = logits(model, batch)
    for ratio in ratios:
        model.compression.set_budget(ratio)
        changed, name = logits(model, batch), repr(model.compression)
        other = build("llava").compress(method, ratio=ratio, **knobs)
        torch.testing.assert_close(changed, logits(other, batch), atol=0, rtol=0)
        assert name == repr(other.compression) and not torch.equal(changed, first)
    torch.testing.assert_close(logits(model, batch), bare, atol=5e-5, rtol=0)
    model.decompress()
    assert torch.equal(logits(model, batch), bare)


def test_budgets_that_cannot_vary():
    for method, options in (("h2o", {"ratio": 0.5}), ("aim", {"ratio": 0.5})):
        compression = build("llava").compress(method, **options).compression
        with pytest.raises(ValueError, match=rf"'{method}'.*cannot vary"):
            compression.set_budget(0.25)
    for method, knobs in (("dymu", {"unmerge": True}), ("vmtc", {"hide": 0.4})):  # at ratio=0 nothing else is installed
        compression = build("llava").compress(method, ratio=0, **knobs).compression
        with pytest.raises(ValueError, match=rf"{method}\(ratio=0.25, .* acts in the stages \['vision', 'cache'\]"):
            compression.set_budget(0.25)
        assert compression.config.methods[0].ratio == 0
    compression = build("llava").compress(["visionzip", "fastv"], ratio=[0.5, 0.3], layer=[None, 1]).compression
    before = compression.config
    with pytest.raises(ValueError, match="name one of"):
        compression.set_budget(0.25)
    with pytest.raises(ValueError, match="none of"):
        compression.set_budget(0.25, method="tome")
    with pytest.raises(ValueError, match="reachable"):
        compression.set_budget(0.9, method="fastv")
    with pytest.raises(ValueError, match="exactly one"):
        compression.set_budget(method="fastv")
    assert compression.config is before


@pytest.mark.parametrize(("method", "beside"), [("skipdecode", "h2o"), ("token_sparse", "kivi"), ("zipvl", "snapkv")])
def test_a_budget_brings_what_does_not_go_with_another_method(method, beside):
    """At ratio=0 the decoder method does nothing, and stands beside any other: a new budget is asked as a first one."""
    with pytest.raises(ValueError) as first:
        build("llava").compress([method, beside], ratio=[0.25, 0.5])
    compression = build("llava").compress([method, beside], ratio=[0, 0.5]).compression
    before = compression.config
    for change in (compression.set_budget, compression.lend):
        with pytest.raises(ValueError) as again:
            change(0.25, method=method)
        assert str(again.value) == str(first.value)
    assert compression.config is before and compression.context.stages["decoder"].ratio == 0


class Seen(TrainerCallback):
    """Visual tokens of every step, and the budget outside."""

    def __init__(self):
        self.kept, self.between, self.logs = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept.append(len(model.compression.last.visual_kept[0][0]))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.between.append(model.compression.config.methods[0].ratio)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def trained(folder, schedule, method="visionzip", resume=None, checkpointing=False, alone=False, **options):
    if resume is None:
        model = build("llava").compress(method, **({"ratio": 0.5} | options))
    else:  # Trainer of transformers 5.24 passes over weights whose names the checkpoint writes in the older way
        model = AutoModelForImageTextToText.from_pretrained(resume)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
        optim="sgd",  # Adam would turn the rounding of gradients near zero into steps of full length
        learning_rate=0.05,
        logging_steps=2,
        save_steps=2,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    seen = Seen()
    run = Trainer(
        model,
        arguments,
        train_dataset=rows(model)[:1] * 2 if alone else rows(model),
        data_collator=lambda found: found[0],
        callbacks=[CompressionCallback(schedule), seen],
    )
    run.train(resume_from_checkpoint=resume)
    return run, seen


def rows(model):
    batch, out = inputs("llava", model, side="right"), []
    for row in range(2):
        one = single(batch, row, "llava")
        labels = one["input_ids"].masked_fill(one["input_ids"] == IMG, -100)
        labels[:, 0] = -100
        out.append(one | {"labels": labels.masked_fill(one["attention_mask"] == 0, -100)})
    return out


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_follows_it(tmp_path, checkpointing):
    schedule = Stages((0.75, 0.0, 0.25, 0.5))
    run, seen = trained(tmp_path, schedule, checkpointing=checkpointing)
    tokens = 4 * seen.kept[0]
    assert seen.kept == [tokens // 4, tokens, tokens * 3 // 4, tokens // 2]
    assert seen.between == [0.5] * STEPS and run.model.compression.config.methods[0].ratio == 0.5
    assert [log["compression_ratio"] for log in seen.logs if "loss" in log] == [0.375, 0.375]
    assert [log["compression_ratio"] for log in run.state.log_history if "loss" in log] == [0.375, 0.375]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_ratio_has_a_micro_batch(tmp_path, checkpointing):
    """The step is that of the mean of the losses at each ratio, here of one sample twice."""
    ratios = (0.75, 0.25)
    run, seen = trained(tmp_path, Every(ratios), checkpointing=checkpointing, alone=True)
    assert set(seen.kept) == {27}  # of the last micro batch, of 36
    assert [log["compression_ratio"] for log in seen.logs if "loss" in log] == [0.5, 0.5]
    model = build("llava").train()
    sample = rows(model)[0]
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (STEPS - step) / STEPS
        for ratio in ratios:
            with model.compressed("visionzip", ratio=ratio):
                (model(**sample).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (name, a), b in zip(run.model.named_parameters(), model.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0, msg=name)


def test_every_ratio_needs_a_micro_batch(tmp_path):
    with pytest.raises(ValueError, match=r"ratio for each of 3 micro batches .*gradient_accumulation_steps=2 is no"):
        trained(tmp_path, Every((0.75, 0.5, 0.25)))


def test_a_resumed_run_draws_what_it_would_have_drawn(tmp_path):
    schedule = Sampled((0.0, 0.25, 0.5, 0.75), seed=3)
    whole, seen = trained(tmp_path / "whole", schedule)
    again, later = trained(tmp_path / "again", schedule, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert len(set(seen.kept)) > 1 and later.kept == seen.kept[2:]
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0, msg=name)


def test_schedules_that_cannot_be_followed_are_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"schedule=.*'h2o'.*cannot vary"):
        trained(tmp_path, "llavolta", method="h2o")
    with pytest.raises(ValueError, match=r"schedule=Linear.*reachable"):
        trained(tmp_path, Linear(0.3, 0.9), method="fastv", ratio=0.3, layer=1)
    callback = CompressionCallback(0.5)
    with pytest.raises(ValueError, match=r"not compressed.*model\.compress"):
        callback.on_train_begin(None, None, None, model=build("llava"))
