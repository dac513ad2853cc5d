"""Two processes (gloo): steps of `Trainer` under a sampled schedule, with DDP and FSDP2, and tensor parallelism."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_compress.train import CompressionCallback, Sampled
from tests.tiny import IMG, build, inputs, single

ROOT = Path(__file__).parents[2]
STEPS, RATE = 4, 2e-3
SCHEDULE = Sampled((0.0, 0.5, 0.75), seed=1)


class Counts(TrainerCallback):
    """Visual tokens of an image at every step."""

    def __init__(self):
        self.kept = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept.append(len(getattr(model, "module", model).compression.last.visual_kept[0][0]))


def rows():
    """A row per process, with other numbers of labels."""
    batch, out = inputs("llava", build("llava"), side="right"), []
    for row, last in enumerate((2, 1)):
        one = single(batch, row, "llava")
        real = int(one["attention_mask"].sum())
        learnt = torch.zeros_like(one["input_ids"], dtype=torch.bool)
        learnt[:, real - last : real] = True
        out.append(one | {"labels": one["input_ids"].masked_fill(~learnt | (one["input_ids"] == IMG), -100)})
    return out


def train(folder, accumulate, **options):
    """Losses, counts of tokens and weights after four steps on both rows."""
    model, counts = build("llava").compress("fastervlm", ratio=0.5, distill=0.5), Counts()
    arguments = TrainingArguments(
        output_dir=str(folder),
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulate,
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,  # the last layer of the tower feeds nothing, compressed or not
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    callbacks = [CompressionCallback(SCHEDULE), counts]
    run = Trainer(model, arguments, train_dataset=rows(), data_collator=lambda found: found[0], callbacks=callbacks)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    full = {k: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for k, p in model.named_parameters()}
    return losses, counts.kept, full


def sharded():
    """One step of FSDP2 by hand: every process its row, the mean of the sums over all labels."""
    from torch.distributed.fsdp import fully_shard

    rank, data = torch.distributed.get_rank(), rows()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    model = build("llava").compress("fastervlm", ratio=0.75).train()
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = model(**data[rank], num_items_in_batch=torch.tensor(LABELS)).loss
    loss.backward()
    torch.distributed.all_reduce(loss := loss.detach().clone())
    grads = {k: p.grad.full_tensor() * 2 for k, p in model.named_parameters() if p.grad is not None}
    return loss, grads


def parallel(folder):
    """One step of tensor parallelism: both processes the same rows, every layer half of its heads and channels."""
    from transformers import AutoModelForImageTextToText

    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = AutoModelForImageTextToText.from_pretrained(f"{folder}/model", tp_plan="auto", device_mesh=mesh)
    held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
    assert held < sum(p.numel() for p in build("llava").parameters())
    model.compress("fastervlm", ratio=0.75).train()
    loss = sum(model(**row, num_items_in_batch=torch.tensor(LABELS)).loss for row in rows())
    loss.backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {k: g.full_tensor() if hasattr(g, "full_tensor") else g for k, g in grads.items()}


LABELS = 3  # of both rows


def whole():
    """The same step in one process."""
    model = build("llava").compress("fastervlm", ratio=0.75).train()
    loss = sum(model(**row, num_items_in_batch=torch.tensor(LABELS)).loss for row in rows())
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += [
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--rdzv_backend",
    "c10d",
    "--main_process_port",
    "0",
]


def launch(kind, folder, launcher=TORCHRUN):
    command = [sys.executable, "-m", *launcher, __file__]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, kind, str(folder)], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate launch"])
def test_ddp(tmp_path, launcher):
    """Both draw the same ratios, and four steps are those of one process that accumulates the two rows."""
    found = launch("ddp", tmp_path, launcher)
    losses, kept, weights = train(tmp_path / "one", 2)
    assert len(set(kept)) > 1
    for _, counts, after in found:
        assert counts == kept
        for name, weight in weights.items():
            torch.testing.assert_close(after[name], weight, atol=1e-5, rtol=1e-4, msg=name)
    assert found[0][0] == pytest.approx(losses, rel=1e-5)


def test_fsdp2(tmp_path):
    loss, grads = whole()
    for mine, found in launch("fsdp", tmp_path):
        torch.testing.assert_close(mine, loss, atol=1e-5, rtol=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-4, msg=name)


def test_tensor_parallelism(tmp_path):
    build("llava").save_pretrained(tmp_path / "model")
    loss, grads = whole()
    for mine, found in launch("tp", tmp_path):
        torch.testing.assert_close(mine, loss, atol=1e-5, rtol=1e-5)
        for name, grad in found.items():
            if grad.shape == grads[name].shape:
                torch.testing.assert_close(grad, grads[name], atol=1e-5, rtol=1e-4, msg=name)


def work(kind, folder):
    """What each of the two processes does."""
    torch.set_num_threads(1)
    if kind == "ddp":
        found = train(f"{folder}/two", 1, ddp_backend="gloo")
    else:
        torch.distributed.init_process_group("gloo")
        found = sharded() if kind == "fsdp" else parallel(folder)
    torch.save(found, f"{folder}/{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    work(*sys.argv[1:])
