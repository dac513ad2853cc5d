"""Selection and merging primitives against slow, obvious references and the numbers of the method cards."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_compress.tensors import attention, draw
from hf_compress.tensors.cells import cells
from hf_compress.tensors.kvmerge import take
from hf_compress.tensors.merge import (
    bipartite,
    by_first,
    first_members,
    group_sum,
    nearest,
    pool1d,
    pool_cells,
    rank,
)
from hf_compress.tensors.ranking import at_ranks, largest
from hf_compress.tensors.select import adaptive, spaced, spaced_grid, top_sorted
from hf_compress.tensors.svd import factors

X = torch.tensor(
    [[3, 0, 1], [4, 3, 0], [0, 2, 1], [-5, 1, 2], [3, 4, 1], [-1, -3, 2]], dtype=torch.float32
)  # fixture F6, a 2 x 3 grid
COS = {
    (0, 1): 0.7589, (0, 2): 0.1414, (0, 3): -0.7506, (0, 4): 0.6202, (0, 5): -0.0845, (1, 2): 0.5367,
    (1, 3): -0.6208, (1, 4): 0.9414, (1, 5): -0.6949, (2, 3): 0.3266, (2, 4): 0.7894, (2, 5): -0.4781,
    (3, 4): -0.3223, (3, 5): 0.2928, (4, 5): -0.6814,
}  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- selection


def test_fixture_cosines():
    unit = F.normalize(X, dim=-1)
    for (i, j), value in COS.items():
        assert float(unit[i] @ unit[j]) == pytest.approx(value, abs=5e-5)


def test_top_sorted_prefers_the_lower_index():
    score = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [5.0, 5.0, 5.0, 5.0, 5.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
    assert top_sorted(score, 2).tolist() == [[1, 2], [0, 1], [3, 4]]
    assert top_sorted(score, 4).tolist() == [[0, 1, 2, 4], [0, 1, 2, 3], [1, 2, 3, 4]]


def test_top_sorted_against_python():
    score = torch.randint(0, 12, (5, 40), generator=torch.Generator().manual_seed(1)).float()  # many ties
    for k in range(1, 41):
        want = [sorted(sorted(range(40), key=lambda i: (-row[i], i))[:k]) for row in score.tolist()]
        assert top_sorted(score, k).tolist() == want


def test_spaced_card():
    assert [spaced(6, k) for k in (1, 2, 3, 4)] == [[3], [1, 4], [1, 3, 5], [0, 2, 3, 5]]


def test_spaced_grid_card():
    assert spaced_grid(4, 4, 6) == [4, 6, 7, 12, 14, 15]
    assert spaced_grid(4, 4, 0) == []
    assert spaced_grid(4, 4, 7) == [1, 3, 8, 10, 11, 13, 15]
    lines = range(1, 24, 3)
    assert spaced_grid(24, 24, 64) == [r * 24 + c for r in lines for c in lines]


@pytest.mark.parametrize("h,w", [(1, 1), (1, 7), (7, 1), (2, 3), (5, 4), (3, 11), (3, 13), (20, 2)])
def test_spaced_is_exact(h, w):
    for k in range(1, h * w + 1):
        for index in (spaced(h * w, k), spaced_grid(h, w, k)):
            assert index == sorted(set(index)) and len(index) == k and index[0] >= 0 and index[-1] < h * w


# ---- merging


def slow_matching(x, remove, protect_first):
    """One step of the authors' algorithm in Python loops: members of each output, in the authors' order."""
    unit = F.normalize(x.double(), dim=-1)
    A, B = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    best = {a: max(B, key=lambda b: (float(unit[a] @ unit[b]), -b)) for a in A}
    edge = {a: float(unit[a] @ unit[best[a]]) for a in A}
    if protect_first:
        edge[0] = -math.inf
    order = sorted(A, key=lambda a: (-edge[a], a))
    left = sorted(order[remove:]) if protect_first else order[remove:]
    out = [[a] for a in left] + [[b] for b in B]
    for a in order[:remove]:
        out[len(left) + B.index(best[a])].append(a)
    return [sorted(g) for g in out]


def members(groups, count):
    return [[j for j, g in enumerate(groups.tolist()) if g == k] for k in range(count)]


def test_tome_card_in_the_order_of_the_authors():
    groups = bipartite(X[None], 2)  # 4 -> 1 and 0 -> 1
    assert members(groups[0], 4) == [[2], [0, 1, 4], [3], [5]]
    sizes = group_sum(torch.ones(1, 6), groups, 4)
    once = group_sum(X[None], groups, 4) / sizes[..., None]
    assert sizes.tolist() == [[1, 3, 1, 1]]
    want = torch.tensor([[0, 2, 1], [3.3333, 2.3333, 0.6667], [-5, 1, 2], [-1, -3, 2]])
    torch.testing.assert_close(once[0], want, atol=5e-5, rtol=0)
    again = bipartite(once, 2)
    sums = group_sum(sizes, again, 2)
    twice = group_sum(once * sizes[..., None], again, 2) / sums[..., None]
    assert sums.tolist() == [[4, 2]]
    torch.testing.assert_close(twice[0], torch.tensor([[2.5, 2.25, 0.75], [-3, -1, 2]]))


def test_bipartite_card():
    groups, kept = by_first(bipartite(X[None], 2), 4)
    assert groups.tolist() == [[0, 0, 1, 2, 0, 3]] and kept.tolist() == [[0, 2, 3, 5]]


@pytest.mark.parametrize("m", [2, 3, 4, 9, 16])
@pytest.mark.parametrize("protect", [False, True])
def test_matching_against_loops(m, protect):
    x = normal(3, m, 4, seed=m)
    for remove in range((m - protect) // 2 + 1):
        raw = bipartite(x, remove, protect)
        groups, kept = by_first(raw, m - remove)
        assert torch.equal(first_members(raw, m - remove).sort(1).values, kept)
        for row in range(3):
            want = slow_matching(x[row], remove, protect)
            assert members(raw[row], m - remove) == want
            assert members(groups[row], m - remove) == sorted(want)
            assert kept[row].tolist() == sorted(g[0] for g in want)
        if protect:
            assert (groups == 0).sum(1).tolist() == [1, 1, 1] and kept[:, 0].tolist() == [0, 0, 0]


def test_matching_ties_and_limits():
    groups, kept = by_first(bipartite(torch.ones(1, 6, 3), 2), 4)  # all edges equal: 0 and 2 go first, to partner 1
    assert groups.tolist() == [[0, 0, 0, 1, 2, 3]] and kept.tolist() == [[0, 3, 4, 5]]
    assert bipartite(torch.ones(2, 1, 3), 0).tolist() == [[0], [0]]
    with pytest.raises(ValueError, match="remove=4: one step removes 0 to 3 of 7"):
        bipartite(torch.ones(1, 7, 3), 4)
    with pytest.raises(ValueError, match="0 to 2 of 6"):
        bipartite(torch.ones(1, 6, 3), 3, protect_first=True)


def test_by_first_numbers_by_smallest_member():
    groups, kept = by_first(torch.tensor([[2, 0, 2, 1], [1, 1, 0, 2]]), 3)
    assert groups.tolist() == [[0, 1, 0, 2], [0, 0, 1, 2]] and kept.tolist() == [[0, 1, 3], [0, 2, 3]]


def test_rank_and_group_sum():
    mask, place = rank(torch.tensor([[1, 4]]), 5)
    assert mask.tolist() == [[False, True, False, False, True]] and place[mask].tolist() == [0, 1]
    groups = torch.tensor([[1, 0, 1]])
    assert group_sum(torch.tensor([[1.0, 2.0, 4.0]]), groups, 2).tolist() == [[2, 5]]
    assert group_sum(torch.tensor([[[1.0, 0], [2, 1], [4, 1]]]), groups, 2).tolist() == [[[2, 1], [5, 1]]]


@pytest.mark.parametrize("n", [1, 6, 13])
def test_pool1d_cuts_everything_once(n):
    for k in range(1, n + 1):
        groups, centres = pool1d(n, k)
        sizes = torch.bincount(groups, minlength=k)
        assert groups.tolist() == sorted(groups.tolist()) and sizes.max() - sizes.min() <= 1 and sizes.min() > 0
        for j, window in enumerate(members(groups, k)):
            assert centres[j] == window[(len(window) - 1) // 2]


def test_pool1d_equals_strided_pooling():
    groups, centres = pool1d(12, 4)
    assert groups.tolist() == [i // 3 for i in range(12)] and centres.tolist() == [1, 4, 7, 10]


@pytest.mark.parametrize("grid", [(1, 1), (3, 1), (1, 4), (5, 2), (4, 7)])
def test_cells_of_every_count(grid):
    """No cell is empty, the middle of each is in it, and together they are the grid."""
    for k in range(1, grid[0] * grid[1] + 1):
        layout = cells(*grid, k)
        assert torch.bincount(layout.groups, minlength=k).tolist() == layout.sizes.tolist() and layout.sizes.min() > 0
        assert layout.groups[layout.centres].tolist() == list(range(k)) and int(layout.sizes.sum()) == grid[0] * grid[1]


def test_pool_cells():
    groups, centres = pool_cells(2, 3, 1, 3)
    assert groups.tolist() == [0, 1, 2, 0, 1, 2] and centres.tolist() == [0, 1, 2]
    groups, centres = pool_cells(5, 7, 2, 3)
    for i in range(5):
        for j in range(7):
            assert groups[i * 7 + j] == (i * 2 // 5) * 3 + j * 3 // 7
    assert centres.tolist() == sorted(centres.tolist()) and groups[centres].tolist() == list(range(6))


def test_nearest():
    targets = torch.tensor([[2, 4], [4, 2]])
    assert nearest(X.expand(2, 6, 3), targets).tolist() == [[1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 0, 1]]
    assert nearest(torch.ones(1, 3, 2), torch.tensor([[1, 2]])).tolist() == [[0, 0, 0]]  # ties: the earlier one


def test_decisions_carry_no_gradient():
    x = normal(1, 6, 3).requires_grad_()
    for out in (
        top_sorted(x[..., 0], 3),
        bipartite(x, 2),
        nearest(x, torch.tensor([[0, 1]])),
    ):
        assert not out.requires_grad and out.dtype == torch.int64


# ---- factors


@pytest.mark.parametrize("n,width", [(30, 12), (12, 30)])
def test_factors_do_not_turn_with_padding(n, width):
    """Close singular values, rank cut between them: alone, and below rows of zeros in a batch with others."""
    u, _, v = torch.linalg.svd(normal(n, width).double(), full_matrices=False)
    x = (u * torch.linspace(1.001, 1.0, len(v), dtype=torch.float64) @ v).float()
    padded = torch.stack([F.pad(x, (0, 0, 9, 0)), normal(n + 9, width, seed=1)])
    for r in (1, 5, len(v)):
        left, right = factors(x[None], torch.tensor([r]))
        more, batch = factors(padded, torch.tensor([r, len(v)]))
        torch.testing.assert_close(more[0, 9:] @ batch[0], left[0] @ right[0], atol=2e-6, rtol=0)
        want = (u[:, :r] * torch.linspace(1.001, 1.0, len(v), dtype=torch.float64)[:r]) @ v[:r]
        torch.testing.assert_close((left[0] @ right[0]).double(), want, atol=2e-3, rtol=0)
        assert not more[0, :9].any()


def test_factors_of_less_than_the_rank_asked_for():
    """A matrix of rank 2 at rank 5: finite, and given back."""
    x = normal(1, 8, 2) @ normal(1, 2, 20, seed=1)
    left, right = factors(x, torch.tensor([5]))
    assert right.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(left @ right, x, atol=1e-5, rtol=0)


# ---- attention, streamed


@pytest.mark.parametrize(("block", "numbers"), [(256, 2**19), (3, 2**19), (4, 60), (16, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 6, 60])
def test_streamed_attention_against_the_whole_map(monkeypatch, block, numbers, dtype, size):
    """Sums and maxima of columns, and the attention; blocks of any size, logits up to 1e5, rows that see nothing."""
    monkeypatch.setattr(attention, "BLOCK", block)
    monkeypatch.setitem(attention.NUMBERS, "cpu", numbers)
    B, Hq, H, q, S, d = 2, 4, 2, 21, 27, 8
    query, key = size * normal(B, Hq, q, d).to(dtype), size * normal(B, H, S, d, seed=1).to(dtype)
    value = normal(B, H, S, 5, seed=4).to(dtype)
    rows = torch.rand(B, q, generator=torch.Generator().manual_seed(2))
    rows[0, :5] = 0
    see = (torch.arange(S) <= torch.arange(S - q, S)[:, None]) & (normal(B, H, q, S, seed=3) > -1)
    see[1, 1, 8] = False
    logits = (query @ key.repeat_interleave(2, 1).mT).float() * 0.5
    maps = logits.masked_fill(~see.repeat_interleave(2, 1), -torch.inf).softmax(-1).nan_to_num(0)
    weighed = (maps * rows[:, None, :, None]).unflatten(1, (H, 2))
    for ends in (None, list(range(S - q + 1, S + 1))):
        look = lambda part, n=ends: see[:, :, part, : None if n is None else max(n[part])]
        got = attention.column_sums(query, key, 0.5, look, rows, ends)
        torch.testing.assert_close(got, weighed.sum((2, 3)) / 2, atol=2e-5, rtol=1e-4)
        got = attention.column_max(query, key, 0.5, look, rows, S - q + 1, ends)
        torch.testing.assert_close(got, weighed.amax((2, 3))[..., : S - q + 1], atol=2e-5, rtol=1e-4)
        out, sums = attention.attention_and_sums(query, key, value, 0.5, look, rows, ends)
        torch.testing.assert_close(sums, weighed.sum((2, 3)) / 2, atol=2e-5, rtol=1e-4)
        want, near = maps @ value.float().repeat_interleave(2, 1), 2e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(out.float(), want.transpose(1, 2), atol=near, rtol=0)


# ---- places by rank


def test_the_first_of_the_largest():
    x = torch.tensor([[1.0, 3, 3, 2], [-torch.inf, -torch.inf, -1, -1], [0, 0, 0, 0]])
    best, at = largest(x.expand(2, -1, -1))
    assert at.tolist() == [[1, 2, 0]] * 2 and best.tolist() == [[3, -1, 0]] * 2


def test_places_of_ranks_are_those_of_a_stable_sort(monkeypatch):
    monkeypatch.setitem(attention.NUMBERS, "cpu", 40)
    x = (3 * normal(7, 19)).round()  # many ties
    x[0, ::2] *= -0.0
    x[1, 3], x[1, 9], x[2] = torch.inf, -torch.inf, 1e-40 * x[2]
    ranks = torch.stack([torch.randperm(19, generator=torch.Generator().manual_seed(i))[:6] for i in range(7)])
    assert torch.equal(at_ranks(x, ranks), x.argsort(dim=-1, stable=True).gather(-1, ranks))


# ---- draws that can be repeated


def test_draws_are_splitmix64():
    """The first outputs of the published generator from the state 1234567, each state one step further."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = 1234567 + draw._STEP * torch.arange(4)
    assert [x % 2**64 for x in draw.key(states).tolist()] == known


def test_draws_are_even_and_apart():
    keys = draw.key(torch.arange(2000), 5)
    order, numbers = draw.shuffled(keys, 8), draw.uniform(keys, 8)
    assert torch.equal(order.sort(1).values, torch.arange(8).expand(2000, -1))
    assert torch.equal(order[7:8], draw.shuffled(keys[7:8], 8)) and not torch.equal(order, draw.shuffled(keys + 1, 8))
    for column in range(8):  # five standard deviations of a binomial draw
        assert (torch.bincount(order[:, column], minlength=8) - 250).abs().max() < 75
    assert 0 <= numbers.min() < 1e-3 and 1 - 1e-3 < numbers.max() < 1
    assert (numbers.mean(0) - 0.5).abs().max() < 5 * (1 / 12 / 2000) ** 0.5
    assert numbers.T.corrcoef().fill_diagonal_(0).abs().max() < 5 / 2000**0.5
    assert torch.equal(draw.key(keys, 3), draw.key(keys, 3 + 2**64)) and not torch.equal(keys, draw.key(keys, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64])
def test_fingerprints_tell_every_bit_and_place(dtype):
    x = (torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) * 50).abs().to(dtype)
    other, turned = x.clone(), x.clone()
    other[0, 3, 4] += 1
    turned[0, 0, :2] = x[0, 0, :2].flip(0)
    found = torch.cat([draw.fingerprint(t) for t in (x, other, turned, x.mT)])
    assert len(set(found.tolist())) == 3 + 1 + 1 + 3
    alone = torch.cat([draw.fingerprint(row[None]) for row in torch.cat([x.new_ones(1), x.flatten()])[1:].view(3, 20)])
    assert torch.equal(draw.fingerprint(x), alone)  # wherever in the memory
    place = torch.arange(20).view(1, 4, 5).expand(3, -1, -1)
    padded = F.pad(x.flatten(1), (3, 0)), F.pad(place.flatten(1), (3, 0))
    assert torch.equal(draw.fingerprint(x, place), draw.fingerprint(*padded))


@pytest.mark.parametrize(("floor", "theirs"), [(0.5, [12, 4]), (0.75, [10, 6]), (1.0, [8, 8])])
def test_the_floor_of_ada_kv_beside_that_of_kvpress(floor, theirs):
    """Theirs counts the window in the floor: the numbers of the docstring, and the conversion that it gives."""
    window, budget, length = 4, 8, 20
    scores = torch.tensor([0.9, 0.1]).view(1, 2, 1) - torch.arange(length - window) * 1e-3
    keys = torch.cat([scores, torch.full((1, 2, window), scores.max() + 1)], 2)  # as AdaKVPress.compress does
    keys.scatter_(-1, keys.topk(int(budget * floor), -1).indices, torch.finfo(keys.dtype).max)
    gone = torch.topk(-keys.reshape(1, -1), 2 * (length - budget)).indices[0] // length
    assert [length - int((gone == h).sum()) for h in range(2)] == theirs

    def ours(floor):
        protected = torch.cat([scores, torch.full((1, 2, window), torch.inf)], 2)
        every = torch.ones(1, 1, length, dtype=torch.bool)
        return adaptive(protected, every, torch.tensor([budget]), floor)[0].tolist()

    assert ours(max(0.0, (floor * budget - window) / (budget - window))) == theirs
    assert floor != 0.5 or ours(floor) == [10, 6]


class Copies(TorchDispatchMode):
    """Numbers that operations write while it is on."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and torch.is_tensor(out):
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize("heads", [(2, 3), (1, 1), (4, 1), (2, 3, 2)])
@pytest.mark.parametrize("part", [slice(0, 7), slice(2, 7), slice(0, 9)])
def test_take_copies_what_it_takes(heads, part):
    """From the first, some middle or all tokens of every head of a roomy tensor, and from a transposed one."""
    room = torch.randn(*heads, 9, 4)
    x = room[..., part, :]
    at = torch.randint(x.shape[-2], (*heads, 3))
    expected = x.gather(-2, at[..., None].expand(*at.shape, 4))
    with Copies() as copies:
        got = take(x, at)
    assert torch.equal(got, expected) and copies.most <= max(got.numel(), at.numel())
    turned = room.transpose(-3, -2).contiguous().transpose(-3, -2)[..., part, :]
    assert torch.equal(take(turned, at), expected)
    assert torch.equal(take(x.clone().requires_grad_(), at), expected)
