"""What every test runs under: one thread, fixed seeds, no network, no progress bars."""

import os

for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ[variable] = "1"  # before transformers and datasets are imported: they read them once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import random
import zlib

import datasets
import hypothesis
import numpy as np
import pytest
import torch
import transformers

torch.set_num_threads(1)  # the tests run in parallel processes; sums in one order on every machine
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()
# No deadline (shared machines stall) and the same examples in every run.
hypothesis.settings.register_profile("repo", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repo")


# Method x architecture matrices: one case in so many, always the first of each test, the rest by a fixed rule.
SAMPLED = {"tests/architectures/": 8, "tests/invariants/": 4, "tests/ecosystem/": 2, "tests/test_tiny.py": 6}


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="every case of the matrices, not the fixed sample of them")


def pytest_report_header(config):
    if not config.getoption("all"):
        return f"sample of the matrices (--all runs them whole): one case in {SAMPLED}"


def pytest_collection_modifyitems(config, items):
    """The fixed sample: the same on every machine and in every worker."""
    if config.getoption("all"):
        return
    kept, left, seen = [], [], set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        part = next((n for start, n in SAMPLED.items() if item.nodeid.startswith(start)), 1)
        chosen = test not in seen or zlib.crc32(item.nodeid.encode()) % part == 0
        seen.add(test)
        (kept if chosen else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo():
    """What `hf_compress.load_demo("llava")` returns. Shared by the session: leave the model as it was."""
    import hf_compress

    return hf_compress.load_demo("llava")
