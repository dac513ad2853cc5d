"""PPLLaVA: plain means without a preference, the token that stands out with one, and windows by hand."""

import pytest
import torch

from hf_compress.methods.vision.ppllava import Likeness, PPLLaVA
from hf_compress.signals import Assignment
from hf_compress.tensors.cells import cells, windows
from hf_compress.tensors.merge import group_softmax
from tests.invariants.reference import fresh
from tests.methods.test_vision_compressors import Shown, check_gradients, stir


def shown(x, question, grids, module):
    out = Shown(x, grids[0], module)
    out.grids, out.count = grids, x.shape[1]
    out.question = question[:, None], torch.ones(len(x), 1, dtype=torch.bool)
    return out


def test_windows_of_the_card():
    """32 frames of 24 x 24 in windows of 2 x 3 x 3 are 16 * 8 * 8; every window is a box."""
    layout = windows(32, 24, 24, 1024, 2)
    assert layout.centres.shape == (1024,) and torch.equal(torch.bincount(layout.groups), torch.full((1024,), 18))
    box = layout.groups.view(32, 24, 24)
    assert torch.equal(box[:2, :3, :3], torch.zeros(2, 3, 3).long()) and int(box[2, 0, 0]) == 64


@pytest.mark.parametrize(("frames", "k", "depth"), [(1, 5, 2), (4, 4, 2), (4, 1, 2), (5, 3, 1), (4, 22, 4), (4, 24, 2)])
def test_windows_are_disjoint_and_hold_their_middle(frames, k, depth):
    layout = windows(frames, 2, 3, k, depth)
    assert sorted(set(layout.groups.tolist())) == list(range(k)) and len(layout.groups) == frames * 6
    assert torch.equal(layout.groups[layout.centres], torch.arange(k)) and (layout.centres.diff() > 0).all()
    if frames == 1:
        assert torch.equal(layout.groups, cells(2, 3, k).groups)


def test_shares_of_groups_by_loop():
    logits, groups = torch.randn(2, 9, 3), torch.tensor([[0, 2, 2, -1, 0, 1, 2, 0, -1]]).repeat(2, 1)
    share = group_softmax(logits, groups, 3)
    for g in range(3):
        mine = groups[0] == g
        torch.testing.assert_close(share[:, mine], logits[:, mine].softmax(1))
    assert not share[:, groups[0] < 0].any()


def test_card():
    """Without a preference plain means; one outstanding token is its window."""
    x, question, grids = torch.randn(2, 24, 8), torch.randn(2, 8), [(3, 4)] * 2
    module = Likeness(8)
    tokens = shown(x, question, grids, module)
    answer = PPLLaVA().assign(tokens, 3)
    plain = PPLLaVA().make(tokens, answer)
    torch.testing.assert_close(plain, Assignment(answer.kept, answer.groups).apply(x))
    stir(module)
    module.scale.data.fill_(20.0)  # the one token that is most like the question has all of p
    best = module(x, question).argmax(1)
    out = PPLLaVA(temperature=1e-4).make(tokens, answer)
    for row, at in enumerate(best.tolist()):
        torch.testing.assert_close(out[row, answer.groups[row, at]], x[row, at], atol=1e-3, rtol=1e-3)


def test_by_loop():
    x, question, grids = torch.randn(1, 12, 8), torch.randn(1, 8), [(2, 3)] * 2
    module = stir(Likeness(8))
    tokens, method = shown(x, question, grids, module), PPLLaVA(temperature=0.05)
    answer = method.assign(tokens, 4)
    out = method.make(tokens, answer)
    norm = torch.nn.functional.normalize
    e, g = norm(module.match(x[0]), dim=-1), norm(module.look(question[0]), dim=-1)
    p = torch.stack([100 * module.scale[0] * (row * g).sum() for row in e]).softmax(0)
    for k in range(4):
        mine = (answer.groups[0] == k).nonzero()[:, 0].tolist()
        weight = torch.stack([p[i] / 0.05 for i in mine]).softmax(0)
        torch.testing.assert_close(out[0, k], sum(w * x[0, i] for w, i in zip(weight, mine)))


def test_gradients_are_those_of_finite_differences():
    check_gradients(Likeness(8), torch.randn(2, 6, 8), torch.randn(2, 8))


@pytest.mark.parametrize(("knob", "value"), [("depth", 0), ("temperature", 0)])
def test_knobs(knob, value):
    with pytest.raises(ValueError, match=f"{knob}={value} must be"):
        fresh("llava").compress("ppllava", ratio=0.5, **{knob: value})
