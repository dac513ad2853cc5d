"""Methods that share a budget over crops and images by themselves: the numbers of their cards, and slow references."""

from __future__ import annotations

import math

import pytest
import torch

from hf_compress.methods.vision.correlation import Correlation, early
from hf_compress.methods.vision.hired import HiRED
from hf_compress.methods.vision.prunesid import PruneSID, quotas
from hf_compress.methods.vision.slime import SliME, likeness
from hf_compress.tensors import counts as tensor_counts
from hf_compress.tensors import select
from hf_compress.tensors.regions import region_sums
from hf_compress.tensors.select import spaced
from hf_compress.tensors.svd import principal
from tests import tiny
from tests.invariants.language import bare
from tests.invariants.reference import alone, batch_of, close, logits_of, shared
from tests.methods.test_vision_cards import TILES, WHOLE, generator, largest_remainders
from tests.methods.test_vision_cls import Signals
from tests.methods.test_vision_methods import X


# -- regions -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_region_sums(seed):
    g = generator(seed)
    h, w, rows, columns = (int(torch.randint(1, 7, (), generator=g)) for _ in range(4))
    view = torch.rand(2, h, w, generator=g)
    boxes = [(r / rows, c / columns, (r + 1) / rows, (c + 1) / columns) for r in range(rows) for c in range(columns)]
    found = region_sums(view, boxes)
    for i in range(2):
        for k, (top, left, bottom, right) in enumerate(boxes):
            mine = [
                float(view[i, r, c])
                for r in range(h)
                for c in range(w)
                if top <= (r + 0.5) / h < bottom and left <= (c + 0.5) / w < right
            ]
            edges = [h * top, h * bottom, w * left, w * right]
            if all(abs(edge % 1 - 0.5) > 1e-6 for edge in edges):  # else a centre lies on the line between two
                assert float(found[i, k]) == pytest.approx(sum(mine), abs=1e-5)


# -- hired -------------------------------------------------------------------------------------------------------------
EARLY = torch.tensor([9.0, 8, 7, 6, 1, 1, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]) + 0.001 * torch.arange(16)


def test_hired_card():
    """Twenty of five crops of sixteen: ten of the whole image, ten of its crops."""
    counts = lambda how: HiRED(allocation=how).counts(EARLY.view(1, 4, 4), [16] * 5, [WHOLE, *TILES], 20)
    assert counts("region") == [[10, 4, 3, 1, 2]]
    assert counts("code") == [[10, 5, 0, 3, 2]]  # the code keeps 5, 0, 2, 2: one fewer than asked
    half = lambda keep: HiRED().counts(EARLY.view(1, 4, 4), [576] * 5, [WHOLE, *TILES], keep)[0]
    for keep, first in ((288, 144), (576, 288), (1152, 576)):
        assert half(keep)[0] == first and sum(half(keep)) == keep


def slow_hired(early, late, grids, boxes, keep, whole, allocation):
    sizes = [h * w for h, w in grids]
    early, late = early.double().sum(0), late.double().sum(0).split(sizes)
    H, W = grids[0]
    scores = []
    marked = sorted(range(sizes[0]), key=lambda i: -float(early[i]))[: int(sizes[0] * (1 - whole))]
    for k, (top, left, bottom, right) in enumerate(boxes[1:]):
        if allocation == "code":
            scores.append(sum(i * (len(grids) - 1) // sizes[0] == k for i in marked))
        else:
            cells = [
                (r, c)
                for r in range(round(top * H), round(bottom * H))
                for c in range(round(left * W), round(right * W))
            ]
            scores.append(float(sum(early[r * W + c] for r, c in cells)))
    rest, first = largest_remainders(keep, [1 - whole, whole], [sum(sizes[1:]), sizes[0]])
    counts = [first, *largest_remainders(rest, scores, sizes[1:])]
    kept, start = [], 0
    for row, count in zip(late, counts):
        best = sorted(range(len(row)), key=lambda i: -float(row[i]))[:count]
        kept += [start + i for i in sorted(best)]
        start += len(row)
    return kept


@pytest.mark.parametrize("allocation", ["region", "code"])
@pytest.mark.parametrize("seed", range(8))
def test_hired_against_loops(seed, allocation):
    g = generator(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))
    rows, columns, h, w, n, heads = draw(1, 4), draw(1, 4), draw(2, 6), draw(2, 6), draw(1, 4), draw(1, 4)
    grids = [(12, 12), *[(h, w)] * (rows * columns)]
    boxes = [WHOLE] + [
        (r / rows, c / columns, (r + 1) / rows, (c + 1) / columns) for r in range(rows) for c in range(columns)
    ]
    N = sum(a * b for a, b in grids)
    early, late = (torch.rand(n, heads, N, generator=g) for _ in range(2))
    keep = draw(2, N)
    tokens = Signals(torch.zeros(n, N, 2), rows={0: late, 5: early}, grids=grids, boxes=boxes, depth=6)
    answer = HiRED(allocation=allocation, whole=0.4).assign(tokens, keep)
    assert answer.valid is None and answer.kept.shape == (n, keep)
    for i in range(n):
        expected = slow_hired(early[i, :, :144], late[i], grids, boxes, keep, 0.4, allocation)
        assert answer.kept[i].tolist() == expected


def test_hired_of_one_crop_keeps_its_highest():
    late = torch.rand(2, 3, 12, generator=generator(0))
    kept = HiRED().assign(Signals(torch.zeros(2, 12, 2), rows={0: late}, grids=((3, 4),)), 5).kept
    assert kept.tolist() == [sorted(row.topk(5).indices.tolist()) for row in late.sum(1)]


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_hired_spends_where_the_whole_image_looks(name):
    """Exact budgets per image; all on the whole image, or none; the same alone and in a batch."""
    model, batch = shared(name), batch_of(name)
    for whole in (0.0, 0.5, 1.0):
        with model.compressed("hired", 0.5, whole=whole):
            logits_of(model, batch)
            last = model.compression.last
            assert last.visual_left == [[round(n / 2) for n in row] for row in last.visual_tokens]
            for row in range(2):
                logits_of(model, alone(name, batch, row))
                assert model.compression.last.visual_kept == [last.visual_kept[row]]
            for kept, crops in zip(last.visual_kept[0], last.visual_crops[0]):
                first, N = len(crops[0].rows), sum(len(crop.rows) for crop in crops)
                seen = sum(i < first for i in kept)
                assert seen == {0.0: max(0, round(N / 2) - (N - first)), 1.0: min(first, round(N / 2))}.get(whole, seen)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [(dict(whole=1.1), "whole=1.1 must be"), (dict(allocation="paper"), "allocation='paper' must be")],
)
def test_hired_refuses(knobs, message):
    with pytest.raises(ValueError, match=message):
        HiRED(**knobs)


# -- counts ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [2**24, 50])
@pytest.mark.parametrize("seed", range(4))
def test_neighbours_and_mean_cosine(seed, chunk, monkeypatch):
    monkeypatch.setattr(tensor_counts, "CHUNK", chunk)
    g = generator(seed)
    N = int(torch.randint(1, 15, (), generator=g))
    x = torch.randn(3, N, 3, generator=g)
    found, mean = tensor_counts.neighbours(x, 0.5), tensor_counts.mean_cosine(x)
    for i in range(3):
        unit = [row / row.norm() for row in x[i].double()]
        cosine = [[float(a @ b) for b in unit] for a in unit]
        assert found[i].tolist() == [sum(c > 0.5 for j, c in enumerate(row) if j != k) for k, row in enumerate(cosine)]
        pairs = [cosine[a][b] for a in range(N) for b in range(a)]
        assert float(mean[i]) == pytest.approx(sum(pairs) / max(1, len(pairs)), abs=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_nucleus(seed):
    g = generator(seed)
    score = 2 * torch.randn(3, 20, generator=g)
    for mass in (0.0, 0.3, 0.75, 0.95, 1.0):
        found = tensor_counts.nucleus(score, mass)
        for row, mine in zip(score.double().softmax(1).tolist(), found.tolist()):
            order, total, kept = sorted(range(20), key=lambda i: -row[i]), 0.0, set()
            for i in order:
                if total > mass:
                    break
                kept.add(i)
                total += row[i]
            assert {i for i, stays in enumerate(mine) if stays} == (kept if mass < 1 else set(range(20)))


# -- correlation -------------------------------------------------------------------------------------------------------
def test_correlation_card():
    for threshold, counts in ((0.75, [1, 2, 1, 0, 2, 0]), (0.9, [0, 1, 0, 0, 1, 0])):
        assert tensor_counts.neighbours(X[None], threshold).tolist() == [counts]
        assert Correlation(threshold=threshold).singles(X[None], [6]).tolist() == [[counts.count(0)]]
    assert early(23) == 16 and early(4) == 2  # blocks 22 and 6 of CLIP-L


def slow_correlation(keys, rows, sizes, keep, threshold):
    """Kept tokens of one image, and what becomes of every token; rows: late and early attention (H, N)."""
    keys, N = keys.double(), len(keys)
    part = [p for p, n in enumerate(sizes) for _ in range(n)]
    cosine = lambda i, j: float(keys[i] @ keys[j] / keys[i].norm() / keys[j].norm())
    crops = [[i for i in range(N) if part[i] == p] for p in range(len(sizes))]
    singles = [sum(all(i == j or cosine(i, j) <= threshold for j in crop) for i in crop) for crop in crops]
    weights = [max(n, len(crop) / 10) for n, crop in zip(singles, crops)]
    counts = [max(1, round(w)) for w in weights] if keep is None else largest_remainders(keep, weights, sizes)
    kept = []
    for crop, count in zip(crops, counts):
        mean = [row.double().mean(0) for row in rows]
        score = {i: sum(float(m[i] / sum(m[j] for j in crop)) for m in mean) for i in crop}
        kept += sorted(sorted(crop, key=lambda i: -score[i])[:count])
    goes = []
    for i in range(N):
        mine = [k for k in kept if part[k] == part[i]]
        goes.append(i if i in kept else max(mine, key=lambda k: cosine(i, k)) if mine else None)
    return kept, goes


@pytest.mark.parametrize("seed", range(10))
def test_correlation_against_loops(seed):
    g = generator(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))
    grids, n, heads = [(draw(1, 5), draw(1, 5)) for _ in range(draw(1, 4))], draw(1, 4), draw(1, 3)
    sizes = [h * w for h, w in grids]
    N = sum(sizes)
    keys, late, soon = (torch.randn(n, N, 3, generator=g), *(torch.rand(n, heads, N, generator=g) for _ in range(2)))
    tokens = Signals(keys, rows={0: late, 4: soon}, grids=grids, depth=7)
    for keep in (None, max(1, N // 2), 1, N):
        answer = Correlation(threshold=0.6).assign(tokens, keep)
        for i in range(n):
            kept, goes = slow_correlation(keys[i], (late[i], soon[i]), sizes, keep, 0.6)
            real = [True] * answer.kept.shape[1] if answer.valid is None else answer.valid[i].tolist()
            assert [k for k, r in zip(answer.kept[i].tolist(), real) if r] == kept
            assert [None if at < 0 else answer.kept[i, at].item() for at in answer.groups[i].tolist()] == goes


def test_correlation_draws_by_probability():
    """Without replacement, by the seed and the pixels; a token of twice the probability is first twice as often."""
    rows = torch.tensor([[[4.0, 2.0, 1.0, 1.0]]]).repeat(4000, 1, 1) / 8
    tokens = Signals(torch.randn(4000, 4, 3, generator=generator(0)), rows={0: rows}, grids=((2, 2),))
    tokens.content = torch.arange(4000)
    draw = lambda seed: Correlation(sample=True, seed=seed).assign(tokens, 1).kept[:, 0]
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    share = torch.bincount(draw(0), minlength=4) / 4000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.25, 0.125, 0.125]), atol=0.03, rtol=0)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "internvl", "qwen2_5_vl"])
@pytest.mark.parametrize("ratio", [0.5, "adaptive"])
def test_correlation_of_a_model(name, ratio):
    """Exact counts, or those of the rule; the same alone and in a batch."""
    model, batch = shared(name), batch_of(name)
    with model.compressed("correlation", ratio, threshold=0.3):
        got, last = logits_of(model, batch), model.compression.last
        if ratio == 0.5:
            assert last.visual_left == [[round(n / 2) for n in row] for row in last.visual_tokens]
        else:
            assert all(0 < a <= b for mine in zip(last.visual_left, last.visual_tokens) for a, b in zip(*mine))
        for row in range(2):
            mine = logits_of(model, alone(name, batch, row))
            assert model.compression.last.visual_kept == [last.visual_kept[row]]
            at = int(batch["attention_mask"][row].nonzero()[-1])
            close(got[row, at], mine[0, -1])


# -- slime -------------------------------------------------------------------------------------------------------------
def asked(x, text, real=None, **parts):
    tokens = Signals(x, **parts)
    tokens.question = text, torch.ones(text.shape[:2], dtype=torch.bool) if real is None else real
    return tokens


def test_slime_card():
    text = torch.tensor([[[0.0, 1, 0]]])
    score = likeness(X[None], text, torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(score[0], torch.tensor([0, 0.6, 0.8944, 0.1826, 0.7845, -0.8018]), atol=1e-4, rtol=0)
    expected = torch.tensor([0.1098, 0.2001, 0.2685, 0.1318, 0.2406, 0.0492])
    torch.testing.assert_close(score.softmax(1)[0], expected, atol=1e-4, rtol=0)
    assert SliME(top_p=0.75).assign(asked(X[None], text), None).kept.tolist() == [[1, 2, 3, 4]]
    assert SliME().assign(asked(X[None], text), 3).kept.tolist() == [[1, 2, 4]]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_slime_against_loops(seed, whole):
    g = generator(seed)
    x, text = torch.randn(3, 4 + 12, 5, generator=g), torch.randn(3, 4, 5, generator=g)
    real = torch.rand(3, 4, generator=g) < 0.6
    real[:2, 3], real[2] = True, False  # the last one asks nothing
    tokens = asked(x, text, real, grids=[(2, 2), (2, 3), (3, 2)], boxes=[WHOLE, (0, 0, 1, 0.5), (0, 0.5, 1, 1)])
    keep, first = 9, 4 if whole else 0
    exact = SliME(whole=whole).assign(tokens, keep).kept.tolist()
    free = SliME(whole=whole, top_p=0.52, temperature=0.7).assign(tokens, None)
    for i in range(3):
        unit = lambda y: y.double() / y.double().norm()
        score = [
            float(sum((unit(x[i, j]) @ unit(t) for t, r in zip(text[i], real[i]) if r), torch.tensor(0.0)))
            for j in range(first, 16)
        ]
        order = sorted(range(first, 16), key=lambda j: -score[j - first])
        if i < 2:
            assert exact[i] == sorted([*range(first), *order[: keep - first]])
        else:
            assert exact[i] == [*range(first), *(first + j for j in spaced(16 - first, keep - first))]
        p = torch.tensor(score).div(0.7).softmax(0).tolist()
        chosen, total = set(range(first)), 0.0
        for j in order:
            if total <= 0.52:
                chosen.add(j)
            total += p[j - first]
        if i == 2:
            chosen = {*range(first), *(first + j for j in spaced(16 - first, len(chosen) - first))}
        stays = [
            j
            for j, r in zip(free.kept[i].tolist(), free.valid[i].tolist() if free.valid is not None else [1] * 16)
            if r
        ]
        assert stays == sorted(chosen)


def test_slime_keeps_the_whole_image_or_says_that_it_cannot():
    x = torch.randn(1, 12, 4, generator=generator(0))
    tokens = asked(x, x[:, :2], grids=[(2, 3), (2, 3)], boxes=[WHOLE, WHOLE])
    assert SliME().assign(tokens, 6).kept.tolist() == [list(range(6))]
    with pytest.raises(
        ValueError, match=r"keep=5 does not hold its 6 tokens.*12 tokens 0\.5 can be removed.*whole=False"
    ):
        SliME().assign(tokens, 5)
    assert SliME(whole=False).assign(tokens, 5).kept.shape == (1, 5)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_slime_follows_the_question(name):
    model, found = shared(name), []
    with model.compressed("slime", 0.75):
        for text in ([5, 6, 7], [71, 72, 73], [5, 6, 7]):
            logits_of(model, tiny.batch(name, bare(name), [[1, tiny.IMG, *text]]))
            found.append(model.compression.last.visual_kept)
    assert found[0] == found[2] != found[1]


# -- knobs -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "knobs", "message"),
    [
        (Correlation, dict(threshold=2), "threshold=2 must be a number of at least -1 and at most 1"),
        (Correlation, dict(sample=1), "sample=1 must be one of"),
        (Correlation, dict(seed=-1), "seed=-1 must be an integer of at least 0"),
        (PruneSID, dict(share=0), "share=0 must be a number above 0 and at most 1"),
        (PruneSID, dict(phi0=0), "phi0=0 must be a number above 0 and at most 2"),
        (SliME, dict(top_p=1.5), "top_p=1.5 must be a number of at least 0 and at most 1"),
        (SliME, dict(temperature=0), "temperature=0 must be a number above 0"),
        (SliME, dict(whole="yes"), "whole='yes' must be one of"),
    ],
)
def test_knobs_are_checked(method, knobs, message):
    with pytest.raises(ValueError, match=message):
        method(**knobs)


# -- prunesid ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [2**24, 40])
@pytest.mark.parametrize("seed", range(6))
def test_suppressed(seed, chunk, monkeypatch):
    monkeypatch.setattr(select, "CHUNK", chunk)
    g = generator(seed)
    n, N = 3, int(torch.randint(1, 25, (), generator=g))
    x, score = torch.randn(n, N, 3, generator=g), torch.randint(0, 9, (n, N), generator=g).float()
    group, bound = torch.randint(0, 3, (n, N), generator=g), torch.tensor([0.2, 0.6, 1.5])
    found = select.suppressed(x, score, group, bound).tolist()
    for i in range(n):
        assert [j for j, gone in enumerate(found[i]) if not gone] == sorted(
            survivors(x[i], score[i], group[i], float(bound[i]))
        )


def survivors(x, score, group, bound):
    """In the order in which they are taken."""
    unit, left, taken = [row / row.norm() for row in x.double()], list(range(len(x))), []
    while left:
        best = max(left, key=lambda j: (float(score[j]), -j))
        taken.append(best)
        like = [j for j in left if group[j] == group[best] and float(unit[j] @ unit[best]) > bound]
        left = [j for j in left if j != best and j not in like]
    return taken


@pytest.mark.parametrize(("samples", "numbers"), [(30, 12), (12, 30), (9, 9)])
def test_principal_directions(samples, numbers):
    """Of a spectrum that falls fast; whatever else is in the batch."""
    g = generator(0)
    U, _, Vh = torch.linalg.svd(torch.randn(3, samples, numbers, generator=g), full_matrices=False)
    x = U @ torch.diag_embed((0.1 ** torch.arange(U.shape[-1])).expand(3, -1)) @ Vh + torch.randn(3, 1, numbers)
    exact = torch.linalg.svd((x - x.mean(1, keepdim=True)).double()).Vh[:, :4].mT
    found = principal(x, 4)
    assert found.shape == (3, numbers, 4)
    alike = (exact * found).sum(1).abs()
    assert (alike > 0.999).all()
    torch.testing.assert_close(found.mT @ found, torch.eye(4).expand(3, 4, 4), atol=1e-5, rtol=0)
    assert torch.equal(principal(x[1:2], 4).abs().argmax(-1), found[1:2].abs().argmax(-1))


def test_prunesid_card():
    mean = tensor_counts.mean_cosine(X[None])
    assert float(mean) == pytest.approx(0.0517, abs=1e-4)
    assert PruneSID().counts([128, 128], torch.tensor([[0.9483, 0.5]]), 128) == [[84, 44]]
    assert PruneSID().counts([576], torch.tensor([[0.9483]]), 64) == [[64]]
    assert PruneSID(share=0.2, phi0=0.5).counts([100, 100], torch.tensor([[0.25, 0.75]]), None) == [[10, 30]]
    assert PruneSID(share=1).counts([9, 9], torch.tensor([[2.0, 0.0]]), None) == [[9, 1]]


def official_quotas(size, taken, keep):
    """The loops of the official code, in floats."""
    size, taken = torch.tensor([size]), torch.tensor([taken])
    lower = size.clamp(max=1)
    upper = torch.minimum(torch.minimum(torch.full_like(size, 5 * math.ceil(keep / 64)), size), taken)
    while upper.sum() < keep:
        upper = torch.minimum(upper + 1, size)
    other = max(0, keep - int(lower.sum()))
    ends = ((taken.cumsum(-1) * other).double() / taken.sum()).round().int()
    out = torch.minimum(ends - torch.nn.functional.pad(ends[:, :-1], (1, 0)) + lower, upper)
    order, at = taken.argsort(dim=-1, descending=True, stable=True)[0], 0
    while out.sum() < other + lower.sum():
        g = order[at]
        out[0, g] += min(int(upper[0, g] - out[0, g]), int(other + lower.sum() - out.sum()))
        at += 1
    return out[0].tolist()


@pytest.mark.parametrize("seed", range(12))
def test_quotas(seed):
    g = generator(seed)
    for _ in range(20):
        groups = int(torch.randint(1, 12, (), generator=g))
        size = torch.randint(0, 30, (groups,), generator=g)
        size[0] += groups
        taken = [int(torch.randint(1, n + 1, (), generator=g)) if n else 0 for n in size.tolist()]
        keep = int(torch.randint(groups, int(size.sum()) + 1, (), generator=g))
        found = quotas(size.tolist(), taken, keep)
        assert sum(found) == keep and all(0 <= k <= n for k, n in zip(found, size.tolist()))
        assert found == official_quotas(size.tolist(), taken, keep)


@pytest.mark.parametrize("seed", range(6))
def test_prunesid_against_loops(seed):
    g = generator(seed)
    grids = [(3, 4), (4, 4)]
    x, rows = torch.randn(3, 28, 6, generator=g) + 0.3, torch.rand(3, 2, 28, generator=g)
    tokens = Signals(x, rows={0: rows}, grids=grids)
    for keep in (1, 9, 14, 28):
        kept = PruneSID().assign(tokens, keep).kept
        for i in range(3):
            parts, scores = x[i].split([12, 16]), rows[i].sum(0).split([12, 16])
            phi = [1 - float(tensor_counts.mean_cosine(part[None])) for part in parts]
            counts = largest_remainders(keep, [12 * phi[0], 16 * phi[1]], [12, 16])
            expected, start = [], 0
            for part, score, f, k in zip(parts, scores, phi, counts):
                N = len(part)
                if k:
                    group = principal(part.sigmoid().T[None], max(1, min(k // 4, 6)))[0].abs().argmax(-1).tolist()
                    taken = survivors(part, score, group, 18 * k / N * (1 - f)) if k < N else list(range(N))
                    first = [[j for j in taken if group[j] == c] for c in range(max(group) + 1)]
                    later = [
                        sorted(
                            (j for j in range(N) if group[j] == c and j not in taken), key=lambda j: -float(score[j])
                        )
                        for c in range(max(group) + 1)
                    ]
                    share = official_quotas([group.count(c) for c in range(len(first))], list(map(len, first)), k)
                    expected += sorted(start + j for a, b, n in zip(first, later, share) for j in (a + b)[:n])
                start += N
            assert kept[i].tolist() == expected


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("ratio", [0.5, "adaptive"])
def test_prunesid_of_a_model(name, ratio):
    """Exact over all images of a sample, or by the rule; the same alone and in a batch."""
    model, batch = shared(name), batch_of(name)
    with model.compressed("prunesid", ratio, **({"share": 0.4} if ratio == "adaptive" else {})):
        logits_of(model, batch)
        last = model.compression.last
        if ratio == 0.5:
            assert [sum(row) for row in last.visual_left] == [
                sum(round(n / 2) for n in row) for row in last.visual_tokens
            ]
        for row in range(2):
            logits_of(model, alone(name, batch, row))
            assert model.compression.last.visual_kept == [last.visual_kept[row]]
