"""Methods that pick tokens which differ from each other: the numbers of their cards, and slow references."""

from __future__ import annotations

import math

import pytest
import torch

from hf_compress.methods.vision import vispruner
from hf_compress.methods.vision.agilepruner import AgilePruner
from hf_compress.methods.vision.scope_cov import ScopeCov
from hf_compress.methods.vision.vispruner import VisPruner
from hf_compress.tensors import diversity
from tests.methods.test_vision_methods import X, f6, some
from tests.test_diversity import slow_coverage


# ---- scope_cov
def test_scope_cov_card():
    kept = lambda k, alpha=1.0: ScopeCov(alpha=alpha).assign(f6(), k).kept[0].tolist()
    order = lambda alpha: [(set(kept(k, alpha)) - set(kept(k - 1, alpha) if k > 1 else [])).pop() for k in range(1, 5)]
    assert order(1) == [1, 5, 0, 4] and order(0) == [4, 3, 5, 0] and order(2) == [0, 1, 5, 4]
    assert kept(4) == [0, 1, 4, 5]


@pytest.mark.parametrize("alpha", [0.5, 1, 3.0])
def test_scope_cov_against_loops(alpha):
    images = some(5, 6, n=3)
    for keep in (1, 4, 15, 29):
        found = ScopeCov(alpha=alpha).assign(images, keep).kept.tolist()
        for mine, x, row in zip(found, images.embeddings_, images.rows[0].mean(1)):
            assert mine == sorted(slow_coverage(x, row**alpha, keep))


# ---- vispruner, agilepruner
def test_vispruner_card():
    assert VisPruner().assign(f6(), 4).kept.tolist() == [[0, 1, 2, 5]]
    assert VisPruner(important=0.4, step=1).assign(f6(), 3).kept.tolist() == [[0, 4, 5]]  # 1, 2, 3 go


def slow_vispruner(x, row, keep, important, step):
    """The authors' loop over lists, with cosines in double precision."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    cos = (unit @ unit.T).tolist()
    order = sorted(range(len(x)), key=lambda i: -float(row[i]))
    rest = order[important:]
    while len(rest) > keep - important:
        even, odd = rest[::2], rest[1::2]
        most = {i: max(cos[i][j] for j in odd) for i in even}
        falling = sorted(even, key=lambda i: -most[i])
        rest = falling[min(step, len(rest) - (keep - important)) :] + odd
    return sorted(order[:important] + rest)


@pytest.mark.parametrize("important,step", [(0.5, 8), (0.0, 1), (0.75, 3), (0.2, 50)])
@pytest.mark.parametrize("chunk", [2**24, 100])
def test_vispruner_against_lists(monkeypatch, important, step, chunk):
    monkeypatch.setattr(diversity, "CHUNK", chunk)
    images = some(5, 7, n=3)
    for keep in (1, 2, 9, 20, 34):
        found = VisPruner(important=important, step=step).assign(images, keep).kept.tolist()
        for mine, x, row in zip(found, images.embeddings_, images.rows[0].mean(1)):
            assert mine == slow_vispruner(x, row, keep, int(keep * important), step)


def test_more_repetitions_go_in_a_round_of_a_large_image(monkeypatch):
    steps = []
    monkeypatch.setattr(vispruner, "unrepeated", lambda x, order, k, step: steps.append(step) or order[:, :k])
    for h, w in ((5, 7), (24, 24), (24, 48), (48, 72)):
        VisPruner().assign(some(h, w, n=1), 9)
    assert steps == [8, 8, 16, 48]


def test_agilepruner_card():
    """H = .9130 of the fixture: a share of .29, one important token of four."""
    assert AgilePruner().assign(f6(), 4).kept[0].tolist() == slow_vispruner(X, f6().rows[0][0].mean(0), 4, 1, 8)


def test_agilepruner_shares_by_image():
    images, keep = some(5, 7, n=6), 20
    images.rows[0] = 0.6 * (images.rows[0].log() * torch.tensor([0.1, 0.5, 1, 1.5, 2, 4])[:, None, None]).softmax(-1)
    found, met = AgilePruner().assign(images, keep).kept.tolist(), set()
    for mine, x, row in zip(found, images.embeddings_, images.rows[0].mean(1).double()):
        share = [float(a / row.sum()) for a in row]
        entropy = -sum(a * math.log(a) for a in share) / math.log(35)
        important = int(keep * min(0.9, max(0.1, 1 - (entropy - 0.7) / 0.3)))
        assert mine == slow_vispruner(x, row, keep, important, 8)
        met.add(important)
    assert min(met) == 2 and max(met) == 18 and len(met) > 2


# ---- knobs
@pytest.mark.parametrize(
    "cls,knob,bad",
    [
        (ScopeCov, "alpha", -1),
        (ScopeCov, "alpha", "1"),
        (ScopeCov, "alpha", float("inf")),
        (VisPruner, "important", 1),
        (VisPruner, "step", 0),
        (AgilePruner, "focused", 1.0),
        (AgilePruner, "step", 1.5),
    ],
)
def test_bad_knobs_are_refused(cls, knob, bad):
    with pytest.raises(ValueError, match=f"{knob}="):
        cls(**{knob: bad})
