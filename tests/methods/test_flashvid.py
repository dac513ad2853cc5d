"""FlashVID: the numbers of its card, a slow reference, and what its trees join."""

import math

import pytest
import torch

from hf_compress.methods.vision.flashvid import FlashVID, picks, trees
from hf_compress.tensors.diversity import farthest
from tests.methods.test_vision_cards import generator
from tests.methods.test_vision_methods import ROWS, X
from tests.methods.test_vision_videos import FakeVideo, cosine, drawn, split

SCENE = torch.tensor([[[1, 0], [0, 1]], [[0.9, 0.1], [1, 1]], [[1, 0.05], [0, 2]]])


def test_picks_of_the_card():
    """Attention times distance; in this order 5, 1, 0, 3."""
    found = [picks(X[None, None], ROWS[0].mean(0)[None, None], [k]).nonzero()[:, 2].tolist() for k in range(1, 5)]
    assert found == [[5], [1, 5], [0, 1, 5], [0, 1, 3, 5]]


def test_trees_of_the_card():
    """The first tokens of three frames are one tree; (1, 1) and (0, 2) are like none enough."""
    nothing = torch.zeros(3, 2, dtype=torch.bool)
    assert trees(SCENE, nothing, 0.8, 1).tolist() == [0, 1, 0, 3, 0, 5]
    owner, weight = FlashVID().reduced(SCENE, nothing, [0, 0, 0], [2, 1, 1])
    assert owner.tolist() == [0, 1, 0, 3, 0, 5]
    found = torch.zeros(6, 2).index_add(0, owner, weight[:, None] * SCENE.view(6, 2))[[0, 1, 3, 5]]
    torch.testing.assert_close(found, torch.tensor([[2.9 / 3, 0.05], [0, 1], [1, 1], [0, 2]]), atol=1e-5, rtol=1e-5)
    assert trees(SCENE, nothing, 0.8, 5).tolist() == [0, 1, 2, 3, 2, 5]  # one bond: (.9, .1) to (1, .05) is stronger


def test_counts_of_the_card():
    """196 tokens, 25 a frame: 18 picks and 7 trees; with the cut behind 20 of 28 layers 20 a frame on the average."""
    each = [25] * 32
    share = FlashVID().merged
    assert [b - int(b * share) for b in each] == [18] * 32 and sum(each) == 800
    assert abs((20 * 800 + 8 * 240) / 28 / 32 - 20) < 0.01


def picked_by_loops(x, weight, mine, count):
    """So many of the tokens `mine`, the first far from all others and the rest far from those before."""
    far = {(i, j): float(weight[j]) * (1 - cosine(x[i], x[j])) for i in mine for j in mine}
    out = []

    def distance(j):
        return min((far[i, j] for i in out or mine if i != j), default=0.0)

    while len(out) < count:
        out.append(max(sorted(set(mine) - set(out)), key=distance))
    return out


@pytest.mark.parametrize("seed", range(8))
def test_weights_of_the_farthest_against_loops(seed, monkeypatch):
    g = generator(seed)
    x, weight = torch.randn(2, 9, 5, generator=g), torch.rand(2, 9, generator=g)
    wanted = [sorted(picked_by_loops(row, w, range(9), 5)) for row, w in zip(x, weight)]
    assert farthest(x, 5, weight=weight).tolist() == wanted
    monkeypatch.setattr("hf_compress.tensors.diversity.CHUNK", 0)
    assert farthest(x, 5, weight=weight).tolist() == wanted


def by_loops(x, attention, T, N, keep, method):
    """{kept token: vector} of one video."""
    s = [cosine(x[t * N : (t + 1) * N].mean(0), x[(t + 1) * N : (t + 2) * N].mean(0)) for t in range(T - 1)]
    ends = {t for t in range(T - 1) if s[t] < method.threshold}
    ends |= {*sorted(range(T - 1), key=lambda t: s[t])[: method.least - 1]}
    each, out, start = split(keep, T), {}, 0
    for end in [*sorted(ends), T - 1]:
        scene, chosen = range(start, end + 1), []
        for t in scene:
            count = each[t] - math.floor(each[t] * method.merged + 1e-9)
            chosen += picked_by_loops(x, attention, range(t * N, (t + 1) * N), count)
        out |= {j: x[j].double() for j in chosen}
        loose = [j for j in range(start * N, (end + 1) * N) if j not in chosen]
        quota, bonds = sum(each[t] for t in scene) - len(chosen), []
        for j in loose:
            before = [i for i in loose if i // N == j // N - 1]
            if before:
                best = max(before, key=lambda i: cosine(x[i], x[j]))
                bonds.append((cosine(x[best], x[j]), best, j))
        parent, left = {}, len(loose)
        for strength, i, j in sorted(bonds, reverse=True):
            if strength > method.alike and left > quota:
                parent[j] = i
                left -= 1
        tree = {}
        for j in loose:
            top = j
            while top in parent:
                top = parent[top]
            tree.setdefault(top, []).append(j)
        mean = {top: x[members].double().mean(0) for top, members in tree.items()}
        sizes = {t: sum(top // N == t for top in tree) for t in scene}
        exact = {t: quota * n / len(tree) for t, n in sizes.items() if n}
        counts = {t: int(e + 1e-9) for t, e in exact.items()}
        for t in sorted(exact, key=lambda t: (counts[t] - exact[t], t))[: quota - sum(counts.values())]:
            counts[t] += 1
        for t, count in counts.items():
            mine = sorted(top for top in tree if top // N == t)
            dist = [[float((mean[a] - mean[b]).norm()) / x.shape[1] ** 0.5 for b in mine] for a in mine]
            density = [math.exp(-sum(d * d for d in sorted(row)[:7]) / len(sorted(row)[:7])) for row in dist]
            peak = {}
            for i, a in enumerate(mine):
                denser = [dist[i][k] for k in range(len(mine)) if density[k] > density[i]]
                peak[a] = density[i] * (min(denser) if denser else max(max(row) for row in dist))
            centres = sorted(sorted(mine, key=lambda a: -peak[a])[:count])
            groups = {a: [] for a in centres}
            for i, a in enumerate(mine):
                if centres:
                    groups[a if a in groups else min(centres, key=lambda b: dist[i][mine.index(b)])].append(a)
            out |= {a: torch.stack([mean[b] for b in members]).mean(0) for a, members in groups.items()}
        start = end + 1
    return out


@pytest.mark.parametrize("seed", range(25))
def test_against_loops(seed):
    g, x, T, grid = drawn(seed, most=9)
    N = grid[0] * grid[1]
    still = torch.randn(len(x), 1, N, 6, generator=g)  # frames have something in common
    x = (x.unflatten(1, (T, N)) * torch.rand((), generator=g) + still).flatten(1, 2)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))
    method = FlashVID(least=draw(1, 4), threshold=draw(-9, 9) / 10, merged=draw(0, 10) / 10, alike=draw(0, 9) / 10)
    attention = torch.rand(len(x), 2, T * N, generator=g)
    keep = draw(1, T * N + 1)
    answer = method.assign(FakeVideo(x, T, grid, attention), keep)
    found = answer.apply(x)
    for i in range(len(x)):
        if keep == T * N:
            assert torch.equal(found[i], x[i])
            continue
        expected = by_loops(x[i], attention[i].mean(0), T, N, keep, method)
        assert len(expected) == keep and answer.kept[i].tolist() == sorted(expected)
        wanted = torch.stack([expected[j] for j in sorted(expected)])
        torch.testing.assert_close(found[i].double(), wanted, atol=1e-5, rtol=1e-5)


def test_what_stands_still_is_told_once():
    """Eight equal frames, in each the same cell picked: all other trees begin in the first one."""
    x = torch.randn(1, 1, 12, 8, generator=generator(0)).expand(1, 8, 12, 8).reshape(1, 96, 8)
    answer = FlashVID(least=1, merged=0.9).assign(FakeVideo(x, 8, (3, 4), torch.ones(1, 1, 96)), 16)
    kept = answer.kept[0]
    assert len({int(j) % 12 for j in kept[kept >= 12]}) == 1 and len(kept[kept < 12]) == 16 - 7
