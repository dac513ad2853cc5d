"""PVC: frames know earlier ones only, copies of an image become different tokens, and the layers by hand."""

import pytest
import torch

from hf_compress.methods.vision.pvc import PVC, Past, Progress, clock
from hf_compress.tensors.cells import cells, means
from tests.invariants.reference import fresh
from tests.methods.test_ppllava import shown
from tests.methods.test_vision_compressors import check_gradients, stir


def tokens_of(x, grid, module):
    frames = x.shape[1] // (grid[0] * grid[1])
    return shown(x, torch.zeros(len(x), x.shape[2]), [grid] * frames, module)


def made(tokens, keep, **knobs):
    method = PVC(**knobs)
    answer = method.assign(tokens, keep)
    return answer.kept[0].tolist(), method.make(tokens, answer)


def test_begins_as_means():
    x = torch.randn(2, 24, 8)
    kept, out = made(tokens_of(x, (2, 3), Progress(8, 2)), 8)
    assert kept == [6 * t + at for t in range(4) for at in cells(2, 3, 2).centres.tolist()]
    torch.testing.assert_close(out, torch.cat([means(f, cells(2, 3, 2)) for f in x.split(6, 1)], 1))


def test_card_causality():
    """What comes later changes nothing, what came before does."""
    module, x = stir(Progress(8, 2)), torch.randn(1, 4, 6, 8)
    other = x.clone()
    other[0, 2, 3] = torch.randn(8)
    changed = (module(other) - module(x)).abs().amax(-1)[0] > 1e-6
    assert not changed[:2].any() and changed[2:, 3].all() and not changed[:, [0, 1, 2, 4, 5]].any()


def test_card_copies():
    """Equal frames: equal tokens at the start, different ones when time means something; K is shared over them."""
    x, module = torch.randn(1, 12, 8), Progress(8, 2)
    kept, out = made(tokens_of(x, (3, 4), module), 8)
    assert kept == cells(3, 4, 8).centres.tolist()
    torch.testing.assert_close(out, means(x, cells(3, 4, 2)).repeat(1, 4, 1))
    stir(module)
    _, out = made(tokens_of(x, (3, 4), module), 8)
    parts = out[0].view(4, 2, 8)
    assert all((parts[i] - parts[j]).abs().amax() > 1e-3 for i in range(4) for j in range(i))
    for keep in (1, 3, 7, 11):
        assert made(tokens_of(x, (3, 4), module), keep)[1].shape == (1, keep, 8)


def test_by_loop():
    """Two heads, place by place."""
    layer, x, time = stir(Past(128)).double(), torch.randn(3, 4, 128).double(), clock(torch.linspace(0, 1, 4)).double()
    out = layer(x, time)
    for place in range(3):
        scale, shift, gate = layer.time(time).chunk(3, -1)
        normed = torch.stack([layer.norm(x[place, t]) * (1 + scale[t]) + shift[t] for t in range(4)])
        q, k, v = layer.query_key_value(normed).chunk(3, -1)
        for t in range(4):
            read = []
            for part in (slice(0, 64), slice(64, 128)):
                share = torch.stack([(q[t, part] * k[s, part]).sum() / 8 for s in range(t + 1)]).softmax(0)
                read.append(sum(p * v[s, part] for s, p in enumerate(share)))
            torch.testing.assert_close(out[place, t], x[place, t] + gate[t] * layer.out(torch.cat(read)))


def test_times_are_told_apart():
    at = clock(torch.linspace(0, 1, 96))
    assert at.shape == (96, 256) and (torch.cdist(at, at) + torch.eye(96) * 9).min() > 0.5


def test_gradients_are_those_of_finite_differences():
    check_gradients(Progress(8, 2), torch.randn(2, 3, 2, 8))


@pytest.mark.parametrize("knob", ["copies", "layers"])
def test_knobs(knob):
    with pytest.raises(ValueError, match=f"{knob}=0 must be"):
        fresh("llava").compress("pvc", ratio=0.5, **{knob: 0})
