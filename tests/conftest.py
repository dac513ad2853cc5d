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


# Where tests are method x architecture matrices.
MATRICES = ("tests/architectures/", "tests/invariants/", "tests/ecosystem/", "tests/test_tiny.py")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="every case of the matrices, not the fixed sample of them")


def pytest_report_header(config):
    if not config.getoption("all"):
        return "sample of the matrices: every test meets every method and every architecture (--all: every pair)"


def pytest_collection_modifyitems(config, items):
    """The fixed sample: the same on every machine and in every worker.

    Of the cases of a test, in a fixed order of no meaning, those that bring a value of some parameter that the test
    has not met: every method, every architecture, every kind of batch at least once.
    """
    if config.getoption("all"):
        return
    met, kept = {}, set()
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        seen = met.setdefault(item.nodeid.partition("[")[0], set())
        values = {(key, repr(value)) for key, value in parameters(item).items()}
        if not item.nodeid.startswith(MATRICES) or not values or values - seen:
            kept.add(item)
        seen |= values
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def parameters(item):
    """What a case is parametrised with."""
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _new_modules_run():
    """Modules that need weights run as drawn: most tests ask what becomes of their vectors, not whether these are any
    good. That they are refused: tests/ecosystem/test_trained.py."""
    from hf_compress.engine import trained

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained, "check_trained", lambda model, stages, known: None)
        yield


@pytest.fixture(scope="session")
def demo():
    """What `hf_compress.load_demo("llava")` returns. Shared by the session: leave the model as it was."""
    import hf_compress

    return hf_compress.load_demo("llava")
