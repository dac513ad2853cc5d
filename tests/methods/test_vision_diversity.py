"""Methods that pick tokens which differ from each other: the numbers of their cards, and slow references."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from hf_compress.methods.vision import vispruner
from hf_compress.methods.vision.agilepruner import AgilePruner
from hf_compress.methods.vision.scope_cov import ScopeCov
from hf_compress.methods.vision.todre import ToDRE, ToDREExit
from hf_compress.methods.vision.vispruner import VisPruner
from hf_compress.tensors import diversity
from hf_compress.tensors.diversity import farthest
from tests.invariants.language import FullLength
from tests.invariants.reference import batch_of, close, greedy, shared
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


# ---- todre
def test_todre_card():
    kept = lambda criterion, k: ToDRE(criterion=criterion).assign(f6(), k).kept[0].tolist()
    assert [kept("sum", k) for k in (1, 2, 3, 4)] == [[0], [0, 3], [0, 1, 3], [0, 1, 3, 5]]
    assert [kept("center", k) for k in (1, 2, 3, 4)] == [[0], [0, 3], [0, 3, 5], [0, 2, 3, 5]]
    x = torch.tensor([[[1, 0], [0.9, 0.1], [0, 1], [-1, 0.2], [0.5, 0.5]]])
    assert farthest(x, 3, torch.tensor([0]), total=True).tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("chunk", [2**24, 100])
@pytest.mark.parametrize("criterion,join", [("sum", sum), ("center", max)])
def test_todre_against_lists(monkeypatch, chunk, criterion, join):
    monkeypatch.setattr(diversity, "CHUNK", chunk)
    images = some(5, 7, n=3)
    for keep in (1, 2, 9, 34):
        found = ToDRE(criterion=criterion).assign(images, keep).kept.tolist()
        for mine, x, row in zip(found, images.embeddings_.double(), images.rows[0].mean(1)):
            unit = torch.nn.functional.normalize(x, dim=-1)
            picks = [int(row.argmax())]
            while len(picks) < keep:
                rest = [i for i in range(35) if i not in picks]
                picks.append(min(rest, key=lambda i: join([float(unit[i] @ unit[j]) for j in picks])))
            assert mine == sorted(picks)


class Attended:
    """Rows of one sample under a given attention (S, S)."""

    def __init__(self, a, visual):
        self.a, self.visual = torch.tensor(a)[None], torch.tensor(visual)[None]
        self.valid = self.prompt = torch.ones_like(self.visual)
        self.first = torch.arange(len(a))[None]
        self.removable, self.speaks = self.visual, self.first == len(a) - 1

    def received(self, weight, *, source):
        assert source == "own"
        return weight @ self.a


def test_todre_exit_card():
    a = [[1.0, 0, 0, 0], [0.6, 0.4, 0, 0], [0.8, 0.1, 0.1, 0], [0.7, 0.05, 0.05, 0.2]]
    view = Attended(a, [False, True, True, False])
    text, image = ~view.visual, view.visual
    for sinks, wanted in ((0, (0.05, 0.7)), (1, (1 / 3, 0))):
        method = ToDREExit(sinks=sinks)
        found = method.share(view, text, image), method.share(view, image, text)
        assert [float(x) for x in found] == pytest.approx(wanted, abs=1e-6)
        assert method.decide(view, None) is None
    assert ToDREExit(tau=0.7).decide(view, None) is None
    assert ToDREExit(tau=0.71).decide(view, None).kept.tolist() == [[0, 3]]
    assert [ToDREExit().plan(n, 9, Fraction(1, 2)) for n in (4, 28, 32)] == [{3: None}, {24: None}, {28: None}]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_all_visual_rows_leave_at_once(name):
    """Nothing is removed but the visual rows of the last layer; they stay where the threshold is not met."""
    model, batch = shared(name), batch_of(name)
    for tau, gone in ((2, True), (0, False)):
        with model.compressed("todre", 0.001, tau=tau):
            run, last = greedy(model, batch), model.compression.last
        full = FullLength(name, batch, run.tokens)
        close(run.logits, full.logits(full.survivors(last.layer_index)))
        for b, (text, visual) in enumerate(zip(batch["attention_mask"].sum(1).tolist(), map(sum, last.visual_tokens))):
            assert [n[b] for n in last.layer_tokens] == [text] * 3 + [text - gone * visual]


def test_todre_without_its_exit_is_a_selection():
    model = shared("llava")
    with model.compressed("todre", 0.5, exit=False):
        assert set(model.compression.context.stages) == {"vision"}
    with model.compressed("todre", 0.5):
        assert set(model.compression.context.stages) == {"vision", "decoder"}


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
        (ToDRE, "criterion", "max"),
        (ToDRE, "exit", 1),
        (ToDRE, "tau", -0.1),
        (ToDRE, "sinks", -1),
    ],
)
def test_bad_knobs_are_refused(cls, knob, bad):
    with pytest.raises(ValueError, match=f"{knob}="):
        cls(**{knob: bad})
