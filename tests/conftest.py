"""What every test runs under: one thread, fixed seeds, no network, no progress bars."""

import os

for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ[variable] = "1"  # before transformers and datasets are imported: they read them once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import random
import zlib
from collections import Counter, defaultdict

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


# Where tests are method x architecture matrices, and how many cases of each run: the suite keeps its length when
# methods are added.
MATRICES = ("tests/architectures/", "tests/invariants/", "tests/ecosystem/", "tests/test_tiny.py")
CASES = 24
_met: dict[str, Counter] = defaultdict(Counter)  # per file, how many of its tests meet a value of a parameter


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="every case of the matrices, not the fixed sample of them")


def pytest_report_header(config):
    if not config.getoption("all"):
        return f"sample of the matrices: {CASES} cases of a test, dealt so that its file meets all (--all: every pair)"


@pytest.hookimpl(trylast=True)  # behind pytest's own, which reads the marks
def pytest_generate_tests(metafunc):
    """The fixed sample: the same on every machine and in every worker, whatever is selected. It is taken before the
    cases become items: there are more than a hundred thousand of them."""
    test, cases = metafunc.definition.nodeid, metafunc._calls
    if metafunc.config.getoption("all") or not test.startswith(MATRICES):
        return
    named = {f"{test}[{case.id}]": case.params for case in cases if case.params}
    kept = sample(named, _met[test.split("::")[0]])
    cases[:] = [case for case in cases if not case.params or f"{test}[{case.id}]" in kept]


def sample(cases, met, most=CASES):
    """Which cases of a test run: those that bring a value of some parameter that it has not met, up to `most`.

    First come values that few tests of the file have met, so that its tests share all methods and architectures among
    them; where that is equal, an order of no meaning decides.

    Args:
        cases: name -> its parameters.
        met: (parameter, value) -> how many tests of the file meet it; this test is added.
    """
    values = {name: {(key, repr(value)) for key, value in params.items()} for name, params in cases.items()}
    here, kept = set(), set()
    for name in sorted(values, key=lambda name: (sum(met[value] for value in values[name]), zlib.crc32(name.encode()))):
        if values[name] - here and len(kept) < most:
            kept.add(name)
            here |= values[name]
    met.update(here)
    return kept


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


@pytest.fixture(scope="session")
def clip_processor():
    """Reads frames, and writes one mark for a video where the model of the scenes writes one for an image."""
    from hf_compress.demo import __file__ as package
    from hf_compress.demo.qwen_processor import ClipProcessor

    found = ClipProcessor.from_pretrained(os.path.join(os.path.dirname(package), "qwen"), backend="pil")
    image = "<|vision_start|><|image_pad|><|vision_end|>\n{% else %}"
    assert image in found.chat_template
    video = image.replace("image_pad", "video_pad").replace("{% else %}", "{% elif c['type'] == 'image' %}")
    found.chat_template = found.chat_template.replace("c['type'] == 'image'", "c['type'] == 'video'").replace(
        image, video + image
    )
    return found
