"""The kernels in Triton's interpreter, which reads its switch when Triton is imported: in a process of their own."""

import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_compress
from hf_compress import kernels
from hf_compress.engine.attention import TAP
from tests.invariants.reference import fresh

CASES = Path(__file__).with_name("decode.py")


@pytest.mark.skipif(
    platform.system() != "Linux" and importlib.util.find_spec("triton") is None, reason="Triton runs on Linux"
)
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=CASES.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed in", done.stdout.splitlines()[-1]), done.stdout  # and nothing skipped


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is served")
def test_without_a_device_nothing_changes():
    model = fresh("llama")
    hf_compress.compress(model, "kivi", bits=4, group=4, residual=4)
    assert not kernels.available() and not kernels.usable(torch.device("cpu"))
    assert not any(TAP in layer.self_attn.__dict__ for layer in model.model.layers)
