"""Sweeps of two real processes, by what users start them with, where there is no accelerator."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_compress.evaluate import processes, sweep
from hf_compress.evaluate.results import Results

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
}
QUESTIONS, BATCH = 7, 2  # neither the questions nor the batches of a chunk need to be a multiple of two


@pytest.fixture(scope="module")
def alone(demo, tmp_path_factory):
    """What one process gives."""
    out = tmp_path_factory.mktemp("alone")
    options = dict(limit=QUESTIONS, batch_size=BATCH, timed=False, progress=False, device="cpu", processor=demo[1])
    sweep(demo[0], "demo:scenes", ["divprune", "fastv:layer=6"], [0.89], out=out, **options)
    return out


def lines(out):
    found = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    return sorted(found, key=lambda line: (line["run"], line["row"]))


def launched(launcher, out):
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "hf_compress.cli", "eval", "--model", "demo:llava"]
    command += ["--data", "demo:scenes", "--methods", "divprune,fastv:layer=6", "--ratios", ".89", "--no-time"]
    command += ["--limit", str(QUESTIONS), "--batch-size", str(BATCH), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("launcher", "done"), [("torchrun", 0.0), ("accelerate", 0.6)])
def test_two_processes_give_what_one_gives(launcher, done, alone, tmp_path):
    """No answer is lost or given twice, in a new folder and in one where a single process was stopped within a line."""
    out = tmp_path / "out"
    if done:
        out.mkdir()
        shutil.copy(alone / "settings.json", out)
        raw = (alone / "answers.jsonl").read_bytes()
        (out / "answers.jsonl").write_bytes(raw[: int(done * len(raw))])
    run = launched(launcher, out)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.count("wrote") == 1
    assert lines(out) == lines(alone)
    found, wanted = Results.read(out), Results.read(alone)
    assert found.rows == wanted.rows and found.settings == wanted.settings


class OneAccelerator:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)


def test_more_processes_than_accelerators_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(processes.torch, "accelerator", OneAccelerator)
    with pytest.raises(ValueError, match=r"2 processes for 1 accelerators: .*device='cpu'"):
        processes.join_processes()
