"""bvllm: the numbers of its card, lists of members step by step, and what no budget may break."""

import re

import pytest
import torch
import torch.nn.functional as F

from hf_compress.methods.vision.bvllm import BVLLM, likeness, linked
from tests.invariants.reference import fresh
from tests.methods.test_vision_trained import bipartite_by_loop
from tests.methods.test_vision_videos import FakeVideo, cosine, drawn, split


def test_card():
    rows = F.normalize(torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 1]]), dim=-1)
    similar = ((rows @ rows.T + 1) / 2).tolist()
    found = [similar[i][j] for i, j in ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))]
    assert found == pytest.approx([0.997, 0.500, 0.555, 0.550, 0.604, 0.9975], abs=5e-4)
    assert linked(similar, 0.75, 1) == [0, 0, 1, 1]
    assert linked(similar, 0.75, 3) == [0, 1, 2, 2]  # the strongest link alone
    assert linked(similar, 1.0, 1) == [0, 1, 2, 3]


def test_a_chain_is_one_group():
    """2 is like 1 and 1 like 0, though 2 is not like 0."""
    assert linked([[1, 0.9, 0.1], [0.9, 1, 0.8], [0.1, 0.8, 1]], 0.75, 1) == [0, 0, 0]


def test_equal_frames_become_one():
    x = torch.randn(1, 1, 6, 4).expand(-1, 5, -1, -1).flatten(1, 2)
    answer = BVLLM(frames=4).assign(FakeVideo(x, 5, (2, 3)), 6)
    assert answer.kept.tolist() == [list(range(6))]  # of frames 0, 1, 3 and 4, evenly spaced
    torch.testing.assert_close(answer.apply(x), x[:, :6])
    assert (answer.groups[0, 12:18] == -1).all()


@pytest.mark.parametrize("seed", range(20))
def test_frame_by_frame(seed):
    g, x, T, (h, w) = drawn(seed, most=9)
    N, few = h * w, int(torch.randint(1, 6, (), generator=g))
    keep, threshold = int(torch.randint(1, T * N + 1, (), generator=g)), float(torch.rand((), generator=g))
    answer = BVLLM(frames=few, threshold=threshold).assign(FakeVideo(x, T, (h, w)), keep)
    assert answer.kept.shape == (len(x), keep)
    if keep == T * N:
        return
    least = -(-keep // N)
    count = min(T, keep, max(few, least))
    taken = [(2 * i + 1) * T // (2 * count) for i in range(count)]
    for i in range(len(x)):
        frames = [x[i, t * N : (t + 1) * N] for t in taken]
        means = [f.mean(0) - x[i].unflatten(0, (T, N))[taken].mean((0, 1)) for f in frames]
        links = []
        for b in range(1, count):
            score = [(cosine(means[a], means[b]) + 1) / 2 for a in range(b)]
            a = max(range(b), key=score.__getitem__)
            if score[a] > threshold:
                links.append((score[a], a, b))
        groups = [[f] for f in range(count)]
        for _, a, b in sorted(sorted(links, reverse=True)[: count - least], key=lambda link: link[2]):
            one, other = (next(s for s in groups if f in s) for f in (a, b))
            groups.remove(other)
            one += other
        expected = []
        for same, share in zip(groups, split(keep, len(groups))):
            mean = torch.stack([frames[f] for f in same]).mean(0)
            for cells in bipartite_by_loop(mean, [1] * N, share):
                expected.append(sorted(taken[f] * N + c for f in same for c in cells))
        found = [(answer.groups[i] == k).nonzero().flatten().tolist() for k in range(keep)]
        assert sorted(found) == sorted(expected) and answer.kept[i].tolist() == [mine[0] for mine in found]


def test_likeness_of_frames():
    x = torch.randn(4, 5)
    x[2] = x[0]
    s = likeness(x)
    assert s[0, 2] == s[2, 0] == s[3, 3] == 1
    centred = x - x.mean(0)
    assert float(s[1, 3]) == pytest.approx((cosine(centred[1], centred[3]) + 1) / 2, abs=1e-5)


@pytest.mark.parametrize(("knob", "value"), [("frames", 0), ("threshold", 1.5)])
def test_knobs(knob, value):
    with pytest.raises(ValueError, match=rf"{knob}={re.escape(repr(value))} must be"):
        fresh("qwen2_5_vl").compress("bvllm", ratio=0.5, **{knob: value})
