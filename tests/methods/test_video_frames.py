"""quota, date, dcode and ts_llava: frames and tokens of a video, by the numbers of their cards and slow references."""

import math

import pytest
import torch

from hf_compress import budget
from hf_compress.methods.vision.date import DATE, spread
from hf_compress.methods.vision.dcode import DCoDe, absorbed, unlike
from hf_compress.methods.vision.evs import EVS
from hf_compress.methods.vision.quota import QuoTA
from hf_compress.methods.vision.ts_llava import TSLLaVA, linspaced
from hf_compress.methods.vision.uniform import Uniform
from hf_compress.tensors.cells import cells
from tests.invariants.reference import batch_of, greedy, shared
from tests.methods.test_vision_cards import generator
from tests.methods.test_vision_videos import FakeVideo, cosine, drawn, split


class Asked(FakeVideo):
    """A video with what the text behind it looks at (n, H, T * N), and states of its frames (n, T, D)."""

    def __init__(self, x, frames, grid, looked=None, whole=None):
        super().__init__(x, frames, grid)
        self.looked, self.vectors = looked, whole

    def looked_at(self, layer, rows="last"):
        assert (layer, rows) == (2, "text")
        return self.looked

    def whole(self, what, back=0):
        assert (what, back) == ("hidden", 0)
        return self.vectors


def asked(seed, most=7):
    g, x, T, grid = drawn(seed, most=most)
    N = grid[0] * grid[1]
    return g, x, T, grid, N, int(torch.randint(1, T * N + 1, (), generator=g))


# -- quota -------------------------------------------------------------------------------------------------------------
def test_quota_card():
    """p = .9 .5 .1 and 196 tokens a frame: weights .757 .2336 .0093, of which no frame takes more than it has."""
    p = torch.tensor([0.9, 0.5, 0.1])
    w = (100 * p) ** 2
    assert (w / w.sum()).tolist() == pytest.approx([0.757, 0.2336, 0.0093], abs=1e-4)
    assert (588 * w / w.sum()).int().tolist() == [445, 137, 5]
    looked = (p[:, None] / 196).expand(3, 196).reshape(1, 1, 588)
    video = Asked(torch.zeros(1, 588, 2), 3, (14, 14), looked)
    counts = lambda keep: torch.bincount(QuoTA().assign(video, keep).kept[0] // 196, minlength=3).tolist()
    assert counts(100) == [76, 23, 1] and counts(250) == [189, 59, 2]
    assert counts(400) == [196, 196, 8]  # the first two are full


def test_quota_of_a_high_power_has_one_frame():
    """Shares of .01 to the power of 60 are no floats."""
    looked = torch.tensor([0.01, 0.02, 0.015])[:, None].expand(3, 4).reshape(1, 1, 12)
    kept = QuoTA(power=60.0, resize="spaced").assign(Asked(torch.zeros(1, 12, 2), 3, (2, 2), looked), 3).kept
    assert (kept // 4).tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("resize", ["cells", "spaced"])
def test_quota_against_loops(resize, seed):
    g, x, T, (h, w), N, keep = asked(seed)
    looked = torch.rand(len(x), 2, T * N, generator=g)
    answer = QuoTA(resize=resize, power=1).assign(Asked(x, T, (h, w), looked), keep)
    found = answer.apply(x)
    for i in range(len(x)):
        mass = [float(looked[i, :, t * N : (t + 1) * N].sum()) for t in range(T)]
        counts, expected = budget.shares(keep, mass, [N] * T), {}
        for t, count in enumerate(counts):
            mine = x[i, t * N : (t + 1) * N]
            if count and resize == "cells":
                layout = cells(h, w, count)
                expected |= {t * N + int(c): mine[layout.groups == k].mean(0) for k, c in enumerate(layout.centres)}
            elif count:
                kept = Uniform().assign(FakeVideo(mine[None], 1, (h, w)), count).kept[0]
                expected |= {t * N + int(j): mine[j] for j in kept}
        assert answer.kept[i].tolist() == sorted(expected)
        torch.testing.assert_close(found[i], torch.stack([expected[j] for j in sorted(expected)]))


# -- date --------------------------------------------------------------------------------------------------------------
def test_date_card():
    """Every 5 seconds, apart 20 at first: halved until there are enough."""
    time = list(range(0, 60, 5))
    s = [0.10, 0.30, 0.32, 0.31, 0.12, 0.11, 0.28, 0.29, 0.10, 0.27, 0.26, 0.12]
    taken = {m: sorted(spread(s, time, m, 20)) for m in (2, 3, 4, 8)}
    assert taken[2] == [2, 7] and taken[3] == [2, 7, 9] and taken[4] == [2, 3, 7, 9]
    assert {1, 2, 3, 6, 7, 9, 10} <= set(taken[8]) and len(taken[8]) == 8
    assert spread(s, time, 3, 20) == [2, 7, 9]


@pytest.mark.parametrize("seed", range(15))
def test_date_keeps_whole_frames(seed):
    g, x, T, (h, w), N, keep = asked(seed, most=12)
    looked = torch.rand(len(x), 2, T * N, generator=g)
    kept = DATE(apart=4).assign(Asked(x, T, (h, w), looked), keep).kept
    for i in range(len(x)):
        counts = [sum(int(j) // N == t for j in kept[i]) for t in range(T)]
        assert sorted(c for c in counts if c) == sorted([N] * (keep // N) + [keep % N] * (keep % N > 0))
        if keep < T * N:
            score = looked[i].mean(0).view(T, N).sum(1).tolist()
            assert counts[score.index(max(score))] == min(keep, N)
    nothing = Asked(x, T, (h, w), torch.zeros(len(x), 2, T * N))
    assert DATE().assign(nothing, keep).kept.shape == kept.shape


# -- dcode -------------------------------------------------------------------------------------------------------------
def test_dcode_card():
    angles = torch.tensor([0, 0.1, 0.2, 1.5, 0.3, 0.4, 0.5, 0.6])
    assert unlike(torch.stack([angles.cos(), angles.sin()], 1), 4, 2) == [0, 1, 3, 7]
    x = torch.tensor([[[3, 0], [2, 0.1], [0, 1.5], [0.1, 0], [0, -1]]])
    answer = DCoDe().assign(Asked(x, 1, (1, 5), whole=torch.ones(1, 1, 2)), 3)
    # of three that stay the candidates are the three longest: nothing is merged; of the four of the card, .8:
    assert answer.kept.tolist() == [[0, 1, 2]]
    unit = torch.nn.functional.normalize(x[0, [0, 1, 2, 4]], dim=-1)
    assert absorbed(unit @ unit.T, 0.8, 1).tolist() == [0, 0, 2, 3]
    torch.testing.assert_close(x[0, :2].mean(0), torch.tensor([2.5, 0.05]))


@pytest.mark.parametrize("seed", range(20))
def test_dcode_against_loops(seed):
    g, x, T, grid, N, keep = asked(seed, most=9)
    whole = torch.randn(len(x), T, 4, generator=g)
    answer = DCoDe(even=0.5, alike=0.6).assign(Asked(x, T, grid, whole=whole), keep)
    found = answer.apply(x)
    if keep == T * N:
        assert torch.equal(found, x)
        return
    some = max(math.ceil(keep / N), min(T, keep, round(T * math.sqrt(keep / (T * N)))))
    evenly = max(1, some // 2)
    for i in range(len(x)):
        frames = [int(t * (T - 1) / max(1, evenly - 1)) for t in range(evenly)]
        while len(frames) < some:
            left = [t for t in range(T) if t not in frames]
            frames.append(min(left, key=lambda t: sum(cosine(whole[i, t], whole[i, o]) for o in frames)))
        expected = {}
        for t, count in zip(sorted(frames), split(keep, some)):
            mine = sorted(range(t * N, (t + 1) * N), key=lambda j: -float(x[i, j].norm()))[: max(count, N // 2)]
            threshold = 0.6
            while True:
                groups, left = {}, list(mine)
                while left:
                    a, spare = left.pop(0), len(left) + len(groups) + 1 - count
                    like = sorted((j for j in left if cosine(x[i, a], x[i, j]) >= threshold - 1e-7),
                                  key=lambda j: -cosine(x[i, a], x[i, j]))[:spare]  # fmt: skip
                    groups[a] = [a, *like]
                    left = [j for j in left if j not in like]
                if len(groups) == count:
                    break
                threshold -= 0.05
            expected |= {a: x[i, members].mean(0) for a, members in groups.items()}
        assert answer.kept[i].tolist() == sorted(expected)
        torch.testing.assert_close(found[i], torch.stack([expected[j] for j in sorted(expected)]), atol=1e-5, rtol=1e-5)


def test_dcode_ends_on_states_that_are_no_numbers():
    video = Asked(torch.full((1, 12, 2), torch.nan), 3, (2, 2), whole=torch.ones(1, 3, 2))
    assert DCoDe().assign(video, 5).kept.shape == (1, 5)


# -- ts_llava ----------------------------------------------------------------------------------------------------------
def test_ts_llava_card():
    assert linspaced(50, 6) == [0, 10, 20, 29, 39, 49] and linspaced(10, 4) == [0, 3, 6, 9]
    many = linspaced(28800, 2880)
    assert many[:3] == [0, 10, 20] and many[-1] == 28799 and len(set(many)) == 2880
    answer = TSLLaVA().assign(FakeVideo(torch.zeros(1, 28800, 1), 50, (24, 24)), 3456)
    sizes = torch.bincount(answer.groups[0][answer.groups[0] >= 0])
    assert int((sizes > 1).sum()) <= 576 <= 3456 == len(sizes)
    assert {int(j) // 576 for j, size in zip(answer.kept[0], sizes) if size > 1} == {0, 10, 20, 29, 39, 49}


@pytest.mark.parametrize("seed", range(15))
def test_ts_llava_against_loops(seed):
    _, x, T, (h, w), N, keep = asked(seed, most=9)
    answer = TSLLaVA(frames=3).assign(FakeVideo(x, T, (h, w)), keep)
    found = answer.apply(x)
    if keep == T * N:
        assert torch.equal(found, x)
        return
    small, groups = min(keep, N), {}
    frames = min(3, T, small)
    for k, count in enumerate(split(small, frames)):
        t, layout = math.floor(k * (T - 1) / max(1, frames - 1) + 0.5), cells(h, w, count)
        for c, centre in enumerate(layout.centres.tolist()):
            groups[t * N + centre] = [t * N + j for j in range(N) if layout.groups[j] == c]
    others, rest = [j for j in range(T * N) if j not in groups], keep - small
    sampled = {others[math.floor(k * (len(others) - 1) / max(1, rest - 1) + 0.5)] for k in range(rest)}
    expected = {slot: x[:, sorted(set(mine) - sampled)].mean(1) for slot, mine in groups.items()}
    expected |= {j: x[:, j] for j in sampled}
    assert answer.kept[0].tolist() == sorted(expected)
    torch.testing.assert_close(found, torch.stack([expected[j] for j in sorted(expected)], 1))


# -- images, and budgets of models -------------------------------------------------------------------------------------
def test_images_keep_evenly_spaced_tokens():
    image = FakeVideo(torch.randn(1, 30, 4, generator=generator(0)), 1, (5, 6))
    looked = Asked(image.embeddings, 1, (5, 6), torch.rand(1, 2, 30, generator=generator(1)))
    even = EVS().assign(image, 7).kept.tolist()
    assert DATE().assign(looked, 7).kept.tolist() == QuoTA(resize="spaced").assign(looked, 7).kept.tolist() == even


@pytest.mark.parametrize("method", ["quota", "date"])
def test_frames_that_are_looked_at_keep_more(method):
    """On a model: the budget follows the attention of its own layer, row by row of a batch."""
    model, batch = shared("qwen2_5_vl"), batch_of("qwen2_5_vl", "video")
    with model.compressed(method, 0.5):
        greedy(model, batch)
        last = model.compression.last
        assert last.visual_left == [[budget.kept(n, 0.5) for n in row] for row in last.visual_tokens]
