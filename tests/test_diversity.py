"""Subsets of tokens that differ, against loops over all pairs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_compress.tensors import diversity
from hf_compress.tensors.diversity import coverage, farthest, nearest_distance
from tests.test_tensors import X, normal


def slow_farthest(x, k):
    """Full matrix, double loop."""
    N = len(x)
    unit = F.normalize(x.double(), dim=-1)
    d = [[float(1 - unit[i] @ unit[j]) for j in range(N)] for i in range(N)]
    picks = [max(range(N), key=lambda i: (min((d[i][j] for j in range(N) if j != i), default=0), -i))]
    while len(picks) < k:
        rest = [i for i in range(N) if i not in picks]
        picks.append(max(rest, key=lambda i: (min(d[i][j] for j in picks), -i)))
    return picks


def test_divprune_card():
    want = [0.2411, 0.0586, 0.2106, 0.6734, 0.0586, 0.7072]
    assert nearest_distance(F.normalize(X[None], dim=-1))[0].tolist() == pytest.approx(want, abs=5e-5)
    assert slow_farthest(X, 4) == [5, 1, 3, 2]  # the order of picks
    assert farthest(X[None], 3).tolist() == [[1, 3, 5]]
    assert farthest(X[None], 4).tolist() == [[1, 2, 3, 5]]
    assert not {1, 4} <= set(farthest(X[None], 5)[0].tolist())


@pytest.mark.parametrize("chunk", [2**24, 7 * 2 * 30])  # whole, and seven rows at a time (30 = 4 * 7 + 2)
def test_farthest_against_the_full_matrix(monkeypatch, chunk):
    monkeypatch.setattr(diversity, "CHUNK", chunk)
    x = normal(2, 30, 5)
    for k in (1, 2, 9, 29, 30):
        assert farthest(x, k).tolist() == [sorted(slow_farthest(row, k)) for row in x]


def test_farthest_holds_no_full_matrix(monkeypatch):
    monkeypatch.setattr(diversity, "CHUNK", 1000)
    seen = []
    cat = torch.cat

    def spy(parts, dim):
        seen.extend(p.shape[1] for p in parts)
        return cat(parts, dim=dim)

    monkeypatch.setattr(diversity.torch, "cat", spy)
    nearest_distance(F.normalize(normal(1, 100, 4), dim=-1))
    assert max(seen) == 10 and sum(seen) == 100


def test_farthest_on_one_token_and_on_copies():
    assert farthest(normal(1, 1, 4), 1).tolist() == [[0]]
    copies = torch.ones(1, 5, 4)
    for k in range(1, 6):
        index = farthest(copies, k)[0].tolist()
        assert index == sorted(set(index)) and len(index) == k


def test_decisions_carry_no_gradient():
    x = normal(1, 6, 3).requires_grad_()
    assert not farthest(x, 3).requires_grad and farthest(x, 3).dtype == torch.int64


def slow_coverage(x, weight, k):
    """Every gain of every candidate, in double precision."""
    unit = F.normalize(x.double(), dim=-1)
    cos, covered, picks = (unit @ unit.T).tolist(), [0.0] * len(x), []
    while len(picks) < k:
        rest = [j for j in range(len(x)) if j not in picks]
        gain = {j: sum(max(0.0, c - best) for c, best in zip(cos[j], covered)) for j in rest}
        picks.append(max(rest, key=lambda j: (gain[j] * float(weight[j]), -j)))
        covered = [max(best, c) for best, c in zip(covered, cos[picks[-1]])]
    return picks


@pytest.mark.parametrize("chunk", [2**24, 7 * 30])  # whole, and seven rows at a time
def test_coverage_against_every_gain(monkeypatch, chunk):
    monkeypatch.setattr(diversity, "CHUNK", chunk)
    x, weight = normal(3, 30, 9), normal(3, 30, seed=1).softmax(-1)
    unit = F.normalize(x, dim=-1)
    for k in (1, 2, 9, 29, 30):
        want = [slow_coverage(x[i], weight[i], k) for i in range(3)]
        assert coverage(x, weight, k).tolist() == want
        assert diversity._covering_all(unit @ unit.mT, weight, k).tolist() == want  # as on accelerators


def test_coverage_of_equal_tokens_takes_the_lower_index():
    assert coverage(torch.ones(2, 5, 4), torch.ones(2, 5), 5).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert coverage(torch.zeros(1, 4, 4), torch.ones(1, 4), 3).tolist() == [[0, 1, 2]]
