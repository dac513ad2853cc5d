"""Methods that merge tokens which are no partition of the image, or cluster them: cards and slow references."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from hf_compress.methods.vision.prumerge import PruMerge, PruMergePlus, outliers
from hf_compress.methods.vision.token_transforming import TokenTransforming
from hf_compress.methods.vision.vmtc import VMTC
from hf_compress.tensors.cluster import kmeans, none_empty
from tests.invariants.reference import alone, batch_of, greedy, logits_of, shared
from tests.methods.test_vision_methods import ROWS, FakeTokens, X, some

A = ROWS[0].mean(0)


class Merging(FakeTokens):
    """Images of one head, one key per token: the embeddings."""

    def attention(self, back=0, *, rows="cls", surrogate=None, logits=False, heads="each"):
        return super().attention(back)

    def states(self, what, back=0, *, heads="mean"):
        assert what == "key" and heads == "all"
        return super().states(what, back)


def merging(images):
    return Merging(images.embeddings_, images.rows, images.grid)


def f6(a=A):
    return Merging(X[None], [a[None, None]], (2, 3))


# ---- prumerge
def test_prumerge_card():
    out = PruMerge(neighbours=2).assign(f6(), 3)
    assert out.kept.tolist() == [[0, 1, 5]] and out.before_projector and out.valid is None
    want = torch.tensor([[4.6, 1.55, 1.2], [5.5, 3.8, 0.5], [0.08, 0.62, 0.65]])
    torch.testing.assert_close(out.apply(X[None])[0], want)
    a = torch.tensor([[0.5, 0.12, 0.11, 0.09, 0.10, 0.08]])
    assert numpy.quantile(a[0].numpy(), [0.25, 0.75]) == pytest.approx([0.0925, 0.1175])
    assert outliers(a).tolist() == [1] and outliers(A[None]).tolist() == [1]  # of the fixture none: one stays
    out = PruMerge(neighbours=2).assign(f6(a[0]), None)
    assert out.kept.tolist() == [[0, 5]]


def slow_prumerge(x, a, keep, plus, neighbours):
    """Kept tokens and vectors of one image, as the authors' code goes."""
    N = len(x)
    order = sorted(range(N), key=lambda i: -float(a[i]))
    low, high = numpy.quantile(a.double().numpy(), [0.25, 0.75])
    count = max(1, sum(float(v) > high + 1.5 * (high - low) for v in a)) if keep is None else keep - 1
    if keep is not None and plus:
        count = math.ceil((keep - 1) / 4)
    stay = order[:count]
    if plus and keep is None:
        stay = [*stay, *(i for i in range(0, N - 1, int(int(N / count) / 3)) if i not in stay)]
    elif plus:
        rest, more = [i for i in range(N) if i not in stay], keep - 1 - count
        stay = [*stay, *(rest[(2 * i + 1) * len(rest) // (2 * more)] for i in range(more))]
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    out = {}
    for i in stay:
        near = sorted((j for j in range(N) if j != i), key=lambda j: -float(unit[i] @ unit[j]))[:neighbours]
        out[i] = x[i].double() + sum(float(a[j]) * x[j].double() for j in near)
    rest = [j for j in range(N) if j not in stay]
    if rest:
        out[rest[-1]] = sum(float(a[j]) * x[j].double() for j in rest)
    kept = sorted(out)
    return kept, torch.stack([out[i] for i in kept]).float()


@pytest.mark.parametrize("cls", [PruMerge, PruMergePlus])
@pytest.mark.parametrize("neighbours", [1, 4, 99])
def test_prumerge_against_loops(cls, neighbours):
    images = merging(some(5, 7, n=4, heads=1))
    images.rows[0] = (3 * images.rows[0].log()).softmax(-1)  # some stand out, of each image others
    counts = set()
    for keep in (None, 1, 2, 3, 9, 20, 34):
        out = cls(neighbours=neighbours).assign(images, keep)
        merged = out.apply(images.embeddings_)
        for i in range(4):
            real = slice(None) if out.valid is None else out.valid[i]
            plus = cls is PruMergePlus
            kept, want = slow_prumerge(images.embeddings_[i], images.rows[0][i, 0], keep, plus, neighbours)
            assert out.kept[i][real].tolist() == kept and keep in (None, len(kept))
            torch.testing.assert_close(merged[i][real], want, atol=1e-5, rtol=1e-4)
            counts.add(len(kept) if keep is None else None)
    assert len(counts) > 2


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "smolvlm"])
@pytest.mark.parametrize("method", ["prumerge", "prumerge_plus"])
def test_adaptive_counts_are_those_of_the_samples_alone(method, name):
    model, batch = shared(name), batch_of(name)
    with model.compressed(method, "adaptive"):
        got, last = greedy(model, batch).tokens, model.compression.last
        assert all(1 < n <= m for row in zip(last.visual_left, last.visual_tokens) for n, m in zip(*row))
        for row in range(2):
            sample = alone(name, batch, row)
            logits_of(model, sample)
            assert model.compression.last.visual_kept == [last.visual_kept[row]]
            assert torch.equal(greedy(model, sample).tokens[0], got[row])


# ---- token_transforming
def test_token_transforming_card():
    wanted = {
        0.1: [[0.4971, -1.0305, 1.4978], [0.7699, 2.5037, 0.9652]],
        1e-3: [[1, -1.5, 1.5], [0.5, 2.5, 1]],
        1: [[0.5837, 0.7930, 1.2299], [0.7463, 1.5254, 1.1060]],
    }
    for temperature, want in wanted.items():
        out = TokenTransforming(temperature=temperature).assign(f6(), 2)
        assert out.kept.tolist() == [[0, 1]] and out.before_projector
        torch.testing.assert_close(out.apply(X[None])[0], torch.tensor(want), atol=1e-4, rtol=0)


@pytest.mark.parametrize("informed", [False, True])
def test_token_transforming_against_loops(informed):
    images, tau = some(4, 5, n=3), 0.3
    for keep in (1, 2, 7, 19):
        out = TokenTransforming(temperature=tau, informed=informed).assign(images, keep)
        merged = out.apply(images.embeddings_)
        for i, (x, a) in enumerate(zip(images.embeddings_.double(), images.rows[0].mean(1).double())):
            best = sorted(sorted(range(20), key=lambda j: -float(a[j]))[:keep])
            cos = [[float(torch.cosine_similarity(x[k], x[j], dim=0)) for j in range(20)] for k in best]
            power = [[math.exp(c / tau) for c in row] for row in cos]
            sums = [sum(row[j] for row in power) for j in range(20)]
            share = [[row[j] / sums[j] * (float(a[j]) if informed else 1) for j in range(20)] for row in power]
            want = torch.stack([sum(w * v for w, v in zip(row, x)) / sum(row) for row in share])
            assert out.kept[i].tolist() == best
            torch.testing.assert_close(merged[i].double(), want, atol=1e-5, rtol=1e-4)


# ---- vmtc
def test_vmtc_card():
    out = VMTC(primary=0.5).assign(f6(), 4)
    assert out.kept.tolist() == [[0, 1, 2, 3]] and out.before_projector
    assert out.groups.tolist() == [[0, 1, 2, 3, 2, 3]]
    want = torch.tensor([[3, 0, 1], [4, 3, 0], [2.4, 3.6, 1], [-2.6, -1.4, 2]])
    torch.testing.assert_close(out.apply(X[None])[0], want)
    assert out.mixed.tolist() == [[False, False, True, True]]  # primary tokens stay as they are
    assert kmeans(X[None, 2:], torch.tensor([[0, 2]]), 10).tolist() == [[1, 0, 1, 0]]


def slow_kmeans(x, first, steps):
    """Lists of members in double precision; one without any keeps its direction, and takes the worst token at last."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    centres = [unit[i] for i in first]
    for step in range(steps):
        near = [[float(u @ c) for c in centres] for u in unit]
        groups = [row.index(max(row)) for row in near]
        if step < steps - 1:
            for k in range(len(first)):
                mine = [unit[i] for i, g in enumerate(groups) if g == k]
                if mine:
                    centres[k] = torch.nn.functional.normalize(sum(mine), dim=0)
    sure = {max((i for i, g in enumerate(groups) if g == k), key=lambda i: near[i][k]) for k in set(groups)}
    worst = sorted((i for i in range(len(x)) if i not in sure), key=lambda i: near[i][groups[i]])
    for k, i in zip([k for k in range(len(first)) if k not in groups], worst):
        groups[i] = k
    return groups


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_kmeans_against_lists(steps):
    g = torch.Generator().manual_seed(0)
    for C in (1, 2, 5, 12, 20):
        x = torch.randn(3, 20, 2, generator=g)  # in the plane centres crowd each other out
        first = torch.stack([torch.randperm(20, generator=g)[:C] for _ in range(3)])
        groups = kmeans(x, first, steps)
        assert groups.tolist() == [slow_kmeans(x[i], first[i].tolist(), steps) for i in range(3)]
        assert all(set(row) == set(range(C)) for row in groups.tolist())
    same = kmeans(torch.ones(1, 6, 3), torch.arange(6)[None], steps)[0].tolist()  # all are nearest to the first centre
    assert same[0] == 0 and sorted(same) == list(range(6))


def test_no_group_is_left_empty():
    groups, near = torch.tensor([[0, 0, 0, 3, 0], [1, 1, 1, 1, 1]]), torch.tensor([[0.9, 0.2, 0.5, 0.1, 0.3]] * 2)
    assert none_empty(groups, near, 4).tolist() == [[0, 1, 0, 3, 2], [1, 2, 1, 0, 3]]


@pytest.mark.parametrize("primary", [0.0, 0.75])
def test_vmtc_against_lists(primary):
    images = some(5, 6, n=3)
    for keep in (1, 2, 7, 15, 29):
        out = VMTC(primary=primary).assign(images, keep)
        merged = out.apply(images.embeddings_)
        for i, (x, a) in enumerate(zip(images.embeddings_, images.rows[0].mean(1))):
            order = sorted(range(30), key=lambda j: -float(a[j]))
            stay = min(round(keep * primary), keep - 1)
            rest, count = sorted(order[stay:]), keep - stay
            near = slow_kmeans(x[rest], [k * len(rest) // count for k in range(count)], 10)
            groups = [[j] for j in order[:stay]]
            groups += [[j for j, g in zip(rest, near) if g == k] for k in range(count)]
            groups.sort()
            assert out.kept[i].tolist() == [g[0] for g in groups]
            want = torch.stack([sum(a[j] * x[j] for j in g) / sum(a[j] for j in g) for g in groups])
            torch.testing.assert_close(merged[i], want, atol=1e-5, rtol=1e-4)


# ---- knobs
@pytest.mark.parametrize(
    "cls,knob,bad",
    [
        (PruMerge, "neighbours", 0),
        (PruMergePlus, "neighbours", 2.0),
        (TokenTransforming, "temperature", 0),
        (TokenTransforming, "informed", 1),
        (VMTC, "primary", 1.0),
        (VMTC, "primary", True),
        (VMTC, "steps", 0),
    ],
)
def test_bad_knobs_are_refused(cls, knob, bad):
    with pytest.raises(ValueError, match=f"{knob}=") as refused:
        cls(**{knob: bad})
    assert "removed" not in str(refused.value)  # that is said of ratios
