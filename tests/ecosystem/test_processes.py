"""Two processes (gloo): every one gives for its rows what one process gives, and a step trains the same weights."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.ecosystem.cases import CONFIGS, logits, tokens
from tests.tiny import build, inputs, single

ROOT = Path(__file__).parents[2]


def rows():
    """The rows of the batch, one per process, with as many labels each: so a mean of means is the mean."""
    batch = inputs("llava", build("llava"))
    out = []
    for rank in range(2):
        row = single(batch, rank, "llava")
        row["labels"] = torch.full_like(row["input_ids"], -100)
        row["labels"][:, -1:] = row["input_ids"][:, -1:]
        out.append(row)
    return out


def step(forward, model, batches):
    """One step of SGD on the mean loss; returns it and the weights."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = sum(forward(**batch).loss for batch in batches) / len(batches)
    loss.backward()
    optimizer.step()
    model.eval()
    return loss.detach(), {k: p.detach().clone() for k, p in model.named_parameters()}


def work(folder):
    """What each of the two processes does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, found = torch.distributed.get_rank(), {}
    mine = rows()[rank]
    prompt = {k: v for k, v in mine.items() if k != "labels"}
    for name, config in CONFIGS.items():
        model = build("llava").compress(config)
        # the last layer of the tower feeds nothing, compressed or not
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        result = [logits(parallel, prompt), tokens(model, prompt), tokens(model, prompt, synced_gpus=True)]
        loss, weights = step(parallel, model, [mine])
        torch.distributed.all_reduce(loss)
        found[name] = [*result, loss / 2, weights, logits(parallel, prompt)]
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    data = rows()
    prompts = [{k: v for k, v in row.items() if k != "labels"} for row in data]
    plain = build("llava")
    before = step(plain, plain, data)
    for name, config in CONFIGS.items():
        model = build("llava").compress(config)
        first = [(logits(model, p), tokens(model, p)) for p in prompts]
        loss, weights = step(model, model, data)
        assert abs(loss - before[0]) > 1e-3 or name == "cache"  # a cache method leaves training alone
        for rank in range(2):
            forward, generated, synced, mean, after, later = found[rank][name]
            torch.testing.assert_close(forward, first[rank][0], atol=5e-5, rtol=0)
            assert torch.equal(generated, first[rank][1])
            assert torch.equal(synced, first[rank][1])
            torch.testing.assert_close(mean, loss, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
            assert after.keys() == weights.keys()
            for key, weight in weights.items():
                torch.testing.assert_close(after[key], weight, atol=1e-5, rtol=1e-4, msg=f"{name}: {key}")
            torch.testing.assert_close(later, logits(model, prompts[rank]), atol=2e-4, rtol=0)
        assert all(torch.equal(found[0][name][4][key], found[1][name][4][key]) for key in weights)


if __name__ == "__main__":
    work(sys.argv[1])
