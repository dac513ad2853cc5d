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


@pytest.hookimpl(trylast=True)  # behind pytest's own, which reads the marks
def pytest_generate_tests(metafunc):
    """The fixed sample: the same on every machine and in every worker.

    Of the cases of a test, in a fixed order of no meaning, those that bring a value of some parameter that the test
    has not met: every method, every architecture, every kind of batch at least once. It is taken before the cases
    become items: there are more than a hundred thousand of them.
    """
    test, cases = metafunc.definition.nodeid, metafunc._calls
    if metafunc.config.getoption("all") or not test.startswith(MATRICES):
        return
    met, kept = set(), []
    for case in sorted(cases, key=lambda case: zlib.crc32(f"{test}[{case.id}]".encode())):
        values = {(key, repr(value)) for key, value in case.params.items()}
        if values - met:
            kept.append(case)
        met |= values
    cases[:] = [case for case in cases if any(case is one for one in kept) or not case.params]


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
