"""Methods over the frames of a video: the numbers of their cards, slow references, and clips in which little moves."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from hf_compress import budget
from hf_compress.methods.vision.dycoke import DyCoke
from hf_compress.methods.vision.evs import EVS
from hf_compress.methods.vision.fastvid import FastVID, plan
from hf_compress.methods.vision.frames import FewerFrames
from hf_compress.methods.vision.strided import Strided
from hf_compress.methods.vision.vidcom2 import VidCom2, closeness, steady
from hf_compress.tensors.frames import cell_cosines, scenes, transitions
from tests import tiny
from tests.architectures.helpers import next_turn
from tests.invariants.reference import alone, batch_of, close, greedy, shared
from tests.methods.test_vision_cards import FakeParts, generator


class FakeVideo(FakeParts):
    """A video (n, T * N, D) of T frames of one grid, and what its tower attends to (n, H, T * N)."""

    def __init__(self, x, frames, grid, attention=None):
        super().__init__(x, grids=[grid] * frames)
        self.given = attention

    def attention(self, back=0, *, rows="cls", surrogate=None, logits=False):
        assert not logits and rows == "cls" and surrogate == "all" and self.given is not None
        return self.given


def drawn(seed, most=7, least=1):
    """A generator, and n videos of T frames of an (h, w) grid, drawn by it."""
    g = generator(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))
    n, T, h, w = draw(1, 4), draw(least, most), draw(1, 4), draw(1, 4)
    return g, torch.randn(n, T * h * w, 6, generator=g), T, (h, w)


def cosine(a, b):
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def split(total, parts):
    """`total` shared evenly, the earlier ones get what is left over."""
    return [total // parts + (i < total % parts) for i in range(parts)]


# -- tensors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(10))
def test_frames_against_loops(seed):
    g, x, T, (h, w) = drawn(seed)
    x = x.unflatten(1, (T, h * w))
    reference = torch.randint(0, T, (T,), generator=g).tolist()
    found, between = cell_cosines(x, reference), transitions(x)
    assert found.shape == x.shape[:3] and between.shape == (len(x), T - 1)
    threshold, least = float(torch.rand((), generator=g)) - 0.5, int(torch.randint(1, 6, (), generator=g))
    cut = scenes(between, threshold, least)
    for i in range(len(x)):
        for t in range(T):
            for j in range(h * w):
                assert found[i, t, j] == pytest.approx(cosine(x[i, t, j], x[i, reference[t], j]), abs=1e-5)
        s = [cosine(x[i, t].mean(0), x[i, t + 1].mean(0)) for t in range(T - 1)]
        assert between[i].tolist() == pytest.approx(s, abs=1e-5)
        ends = {t for t in range(T - 1) if s[t] < threshold} | {*sorted(range(T - 1), key=lambda t: s[t])[: least - 1]}
        assert cut[i].tolist() == [sum(e < t for e in ends) for t in range(T)]


# -- controls ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(20))
def test_controls_of_videos(seed):
    """Whole frames and at most one in part; every cell as often as any other but for one, at moments far apart."""
    g, x, T, (h, w) = drawn(seed, most=9)
    N = h * w
    keep = int(torch.randint(1, T * N + 1, (), generator=g))
    video = FakeVideo(x, T, (h, w))
    frames, strided = (method.assign(video, keep).kept.tolist() for method in (FewerFrames(), Strided()))
    for found in (frames, strided):
        assert len(found) == len(x) and all(row == sorted(set(row)) and len(row) == keep for row in found)
    whole = [sum(j // N == t for j in frames[0]) for t in range(T)]
    assert sorted(n for n in whole if n) == sorted([N] * (keep // N) + [keep % N] * (keep % N > 0))
    if T > 1:
        often = [[j // N for j in strided[0] if j % N == cell] for cell in range(N)]
        assert max(map(len, often)) - min(map(len, often)) <= 1
        for cell, moments in enumerate(often):  # around the turned circle of moments
            turned = sorted((t - cell // w - cell % w) % T for t in moments)
            assert all(b - a >= T * N // keep for a, b in itertools.pairwise(turned))
        assert keep < N or len({j // N for j in strided[0]}) >= min(T, h + w - 1)
    else:
        assert frames == strided == EVS().assign(video, keep).kept.tolist()


def test_controls_of_videos_by_hand():
    """Four frames of 2 x 2: half of the tokens are two frames, or a chessboard that turns from frame to frame."""
    video = FakeVideo(torch.zeros(1, 16, 4), 4, (2, 2))
    assert FewerFrames().assign(video, 8).kept.tolist() == [[4, 5, 6, 7, 12, 13, 14, 15]]
    assert FewerFrames().assign(video, 6).kept.tolist() == [[4, 5, 6, 7, 14, 15]]
    assert Strided().assign(video, 8).kept.tolist() == [[1, 2, 4, 7, 9, 10, 12, 15]]


# -- fastvid -----------------------------------------------------------------------------------------------------------
def test_fastvid_card():
    s = torch.tensor([[0.99, 0.95, 0.80, 0.97, 0.98, 0.70, 0.96]])
    assert scenes(s, 0.9, 3).tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]
    share = FastVID(context=0.4)
    found = {1: {0: 7}, 3: {2: 21}, 4: {3: 28}, 5: {0: 18, 4: 17}, 8: {3: 28, 7: 28}}  # 5: all 35, where 34 are kept
    for length, anchors in found.items():
        salient, context = plan([length], 196, 19 * length, Fraction(2, 5), share.step)
        assert salient == [12] * length and {f: c for f, c in enumerate(context) if c} == anchors


def fastvid_by_loops(x, attention, T, N, keep, method):
    """{kept token: vector} of one video."""
    s = [cosine(x[t * N : (t + 1) * N].mean(0), x[(t + 1) * N : (t + 2) * N].mean(0)) for t in range(T - 1)]
    ends = {t for t in range(T - 1) if s[t] < method.threshold}
    ends |= {*sorted(range(T - 1), key=lambda t: s[t])[: method.least - 1]}
    each = split(keep, T)
    context = [math.floor(n * method.context + 1e-9) for n in each]
    salient, out = [n - c for n, c in zip(each, context)], {}
    start = 0
    for end in [*sorted(ends), T - 1]:
        scene = list(range(start, end + 1))
        at = sorted(range(end, start - 1, -method.step))
        want, anchors = sum(context[t] for t in scene), dict.fromkeys(at, 0)
        rest = [t for t in scene if t not in at]
        while want:  # one by one, evenly
            free = [t for t in at if anchors[t] + salient[t] < N]
            if not free:
                break
            anchors[min(free, key=lambda t: (anchors[t], t))] += 1
            want -= 1
        extra = dict.fromkeys(rest, 0)
        while want:
            extra[min((t for t in rest if salient[t] + extra[t] < N), key=lambda t: (extra[t], t))] += 1
            want -= 1
        loose = []
        for t in scene:
            mine = sorted(range(t * N, (t + 1) * N), key=lambda j: -float(attention[j]))
            first = mine[: salient[t] + extra.get(t, 0)]
            out |= {j: x[j].double() for j in first}
            loose += sorted(set(mine) - set(first))
        for t in at:
            mine = [j for j in loose if j // N == t]
            dist = [[float((x[a] - x[b]).double().norm()) / x.shape[1] ** 0.5 for b in mine] for a in mine]
            density = [math.exp(-sum(d * d for d in sorted(row)[:4]) / len(sorted(row)[:4])) for row in dist]
            peak = {}
            for i, a in enumerate(mine):
                denser = [dist[i][k] for k in range(len(mine)) if density[k] > density[i]]
                peak[a] = density[i] * (min(denser) if denser else max(max(row) for row in dist))
            chosen = sorted(sorted(mine, key=lambda j: -peak[j])[: anchors[t]])
            if chosen:
                groups = {a: [] for a in chosen}
                for j in loose:
                    groups[j if j in groups else max(chosen, key=lambda a: cosine(x[j], x[a]))].append(j)
                for a, members in groups.items():
                    own = max(1 / (len(members) + 1), method.own)
                    out[a] = own * x[a].double() + (1 - own) * x[members].double().mean(0)
        start = end + 1
    return out


@pytest.mark.parametrize("seed", range(25))
def test_fastvid_against_loops(seed):
    g, x, T, grid = drawn(seed, most=11)
    N = grid[0] * grid[1]
    x = x + 2 * torch.randn(len(x), T, 1, 6, generator=g).repeat_interleave(N, 1).view_as(x)  # frames differ
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))
    method = FastVID(least=draw(1, 4), threshold=draw(-9, 9) / 10, step=draw(1, 5), own=[0, 0.3, 0.6][draw(0, 3)])
    attention = torch.rand(len(x), 2, T * N, generator=g)
    keep = draw(1, T * N + 1)
    answer = method.assign(FakeVideo(x, T, grid, attention), keep)
    found = answer.apply(x)
    for i in range(len(x)):
        if keep == T * N:
            assert torch.equal(found[i], x[i])
            continue
        expected = fastvid_by_loops(x[i], attention[i].mean(0), T, N, keep, method)
        assert answer.kept[i].tolist() == sorted(expected)
        wanted = torch.stack([expected[j] for j in sorted(expected)])
        torch.testing.assert_close(found[i].double(), wanted, atol=1e-5, rtol=1e-5)


def test_fastvid_anchors_of_every_scene():
    """Scenes of one colour each: every scene has an anchor in its last frame, whatever the attention."""
    colours = torch.eye(3)[[0, 0, 1, 1, 1, 2]] * 5
    x = (colours[:, None] + 0.01 * torch.randn(6, 9, 3, generator=generator(0))).view(1, 54, 3)
    answer = FastVID(least=1, threshold=0.9).assign(FakeVideo(x, 6, (3, 3), torch.rand(1, 1, 54)), 18)
    mixed = {int(j) // 9 for j, row in zip(answer.kept[0], answer.dense[0]) if int((row != 0).sum()) > 1}
    assert mixed == {1, 4, 5}
    torch.testing.assert_close(answer.apply(x)[0].argmax(-1), colours.argmax(-1)[answer.kept[0] // 9])


# -- vidcom2 -----------------------------------------------------------------------------------------------------------
CLIP = [
    [[1, 0.2, 2, 0], [1, 0.6, 0, 1], [1, -0.1, 0, 0], [0.8, 0.3, 1, 0]],
    [[1, 0.25, 2, 0], [1, 0.5, 0, 1], [1, 0, 0, 0], [0.9, 0.3, 1, 0]],
    [[1, 0.9, 2, 0], [0.7, 0.9, 0, 1], [1, 0.1, 0, 0], [0.9, 0.35, 1, 0]],
]


def test_vidcom2_card():
    x = torch.tensor(CLIP).view(1, 12, 4)
    assert x[0].var(0, correction=0).tolist() == pytest.approx([0.0091, 0.0928, 0.6875, 0.1875], abs=5e-5)
    unit = steady(x)
    torch.testing.assert_close(unit, F.normalize(x[..., :2], dim=-1))
    unit = unit.unflatten(1, (3, 4))
    score = -closeness(unit, unit.mean((1, 2), keepdim=True)).mean(-1)
    assert score[0].tolist() == pytest.approx([-4.5979, -4.7564, -4.2510], abs=5e-5)
    kept = VidCom2().assign(FakeVideo(x, 3, (2, 2)), 5).kept[0].tolist()  # shares of 10/9, 10/9 and 25/9
    assert kept == [2, 4 + 2, 8 + 0, 8 + 1, 8 + 2]
    one_more = VidCom2().assign(FakeVideo(x, 3, (2, 2)), 6).kept[0].tolist()  # 4/3, 4/3, 10/3: equal but for rounding
    assert set(kept) < set(one_more) and len(one_more) == 6


@pytest.mark.parametrize("seed", range(20))
def test_vidcom2_against_loops(seed):
    g, x, T, grid = drawn(seed)
    N, D = grid[0] * grid[1], x.shape[-1]
    keep = int(torch.randint(1, T * N + 1, (), generator=g))
    kept = VidCom2(temperature=0.5).assign(FakeVideo(x, T, grid), keep).kept
    for i in range(len(x)):
        few = sorted(sorted(range(D), key=lambda c: float(x[i, :, c].double().var(correction=0)))[: D // 2])
        unit = torch.stack([v[few].double() / v[few].double().norm() for v in x[i]])
        near = lambda a, b: sum(math.exp(-float((a - b) @ (a - b)) / (2 * 2.0**e)) for e in range(-3, 2))
        video = [near(v, unit.mean(0)) for v in unit]
        both = [video[j] + near(unit[j], unit[j // N * N : (j // N + 1) * N].mean(0)) for j in range(T * N)]
        lonely = [math.exp(-sum(video[t * N : (t + 1) * N]) / N / 0.5) for t in range(T)]
        p = [v / sum(lonely) for v in lonely]
        part = [min(1.0, keep / (T * N) * (1 + v - 1 / T)) for v in p]
        found = [sum(int(j) // N == t for j in kept[i]) for t in range(T)]
        assert sum(found) == keep
        if max(part) < 1:
            assert all(abs(found[t] - part[t] * N) < 1 for t in range(T))
        for t in range(T):
            mine = sorted(range(t * N, (t + 1) * N), key=lambda j: both[j])[: found[t]]
            assert [int(j) for j in kept[i] if int(j) // N == t] == sorted(mine)


# -- dycoke ------------------------------------------------------------------------------------------------------------
def test_dycoke_card():
    """Eight frames of ten tokens, three of each cut frame: the third one of the last group is cut, too."""
    x = torch.randn(1, 80, 4, generator=generator(0))
    kept = DyCoke().assign(FakeVideo(x, 8, (2, 5)), 38).kept[0] // 10
    assert torch.bincount(kept).tolist() == [10, 3, 3, 3, 10, 3, 3, 3]


@pytest.mark.parametrize("seed", range(20))
def test_dycoke_against_loops(seed):
    g, x, T, grid = drawn(seed, most=11, least=2)
    N = grid[0] * grid[1]
    firsts = [t for t in range(T) if t % 4 == 0]
    keep = int(torch.randint(len(firsts) * N, T * N + 1, (), generator=g))
    kept = DyCoke().assign(FakeVideo(x, T, grid), keep).kept.tolist()
    counts = dict(zip([t for t in range(T) if t % 4], split(keep - len(firsts) * N, max(1, T - len(firsts)))))
    for i in range(len(x)):
        stays = [t * N + j for t in firsts for j in range(N)]
        for t, count in counts.items():
            other = t - 2 if t % 4 == 2 else t - 1
            order = sorted(range(N), key=lambda j: cosine(x[i, t * N + j], x[i, other * N + j]))
            stays += [t * N + j for j in order[:count]]
        assert kept[i] == sorted(stays)


def test_dycoke_keeps_first_frames_whole_and_images_evenly():
    x = torch.randn(1, 30, 4, generator=generator(0))
    with pytest.raises(ValueError, match=r"2 of 5 frames whole, and keep=11 does not hold their 12.*0\.6 can be rem"):
        DyCoke().assign(FakeVideo(x, 5, (2, 3)), 11)
    image = FakeVideo(x, 1, (5, 6))
    assert DyCoke().assign(image, 4).kept.tolist() == EVS().assign(image, 4).kept.tolist()


# -- clips in which little moves ---------------------------------------------------------------------------------------
def moving(seed, frames=8, side=4, D=16):
    """A still background, all of its cells alike but for noise, with one patch that moves; where that is, per frame."""
    g = generator(seed)
    x = torch.randn(D, generator=g) + 0.3 * torch.randn(side * side, D, generator=g).expand(frames, -1, -1).clone()
    x = x + 0.01 * torch.randn(frames, side * side, D, generator=g)
    at = [(3 * t + seed) % (side * side) for t in range(frames)]
    x[range(frames), at] = 2 * torch.randn(D, generator=g)
    return x.view(1, -1, D), at


@pytest.mark.parametrize(("method", "keep"), [(EVS(), 40), (DyCoke(), 44), (VidCom2(), 16)])
def test_what_moves_stays(method, keep):
    """The patch of a frame stays more often than by chance, which keeps it as often as any other cell."""
    hits = total = 0
    for seed in range(20):
        x, at = moving(seed)
        kept = set(method.assign(FakeVideo(x, 8, (4, 4)), keep).kept[0].tolist())
        hits += sum(t * 16 + j in kept for t, j in enumerate(at))
        total += len(at)
    assert hits / total > 0.85 > 2 * keep / 128


# -- models ------------------------------------------------------------------------------------------------------------
METHODS = {
    **{"fastvid": {"least": 2}, "vidcom2": {}, "dycoke": {}, "holitom": {}, "prunevid": {}},
    **{"frames": {}, "strided": {}, "flashvid": {"least": 2}},
}


@pytest.mark.parametrize("name", tiny.VIDEO)
@pytest.mark.parametrize("method", METHODS)
def test_whole_videos_share_a_budget(method, name):
    """Exact over all frames, beside images; the same alone and in a batch, and by beams."""
    model, batch = shared(name), batch_of(name, "both")
    with model.compressed(method, 0.4, **METHODS[method]):
        run, last = greedy(model, batch), model.compression.last
        assert last.visual_left == [[budget.kept(n, 0.4) for n in row] for row in last.visual_tokens]
        model.generate(**batch, max_new_tokens=2, num_beams=2, do_sample=False)
        assert model.compression.last.visual_kept == [mine for mine in last.visual_kept for _ in range(2)]
        for row in range(2):
            close(greedy(model, alone(name, batch, row)).logits[0], run.logits[row])
            assert model.compression.last.visual_kept == [last.visual_kept[row]]


@pytest.mark.parametrize("name", [name for name in tiny.VIDEO if name not in tiny.HYBRIDS])  # those refuse ragged parts
@pytest.mark.parametrize("method", METHODS)
def test_chunks_and_second_turns(method, name):
    model, batch = shared(name), batch_of(name, "both")
    with model.compressed(method, 0.4, **METHODS[method]):
        run, second = greedy(model, batch), turns(model, batch)
        assert torch.equal(greedy(model, batch, prefill_chunk_size=17).tokens, run.tokens)
        for row in range(2):
            assert torch.equal(turns(model, alone(name, batch, row))[0], second[row])


def turns(model, batch):
    run = greedy(model, batch)
    turn = next_turn(batch, run.out, [7, 8])
    return model.generate(**turn, past_key_values=run.cache, max_new_tokens=3, do_sample=False)[:, -3:]


@pytest.mark.parametrize("method", METHODS)
def test_methods_of_videos_want_videos(method):
    with pytest.raises(ValueError, match=rf"{method}.*needs videos"):
        shared("llava").compress(method, 0.5)
