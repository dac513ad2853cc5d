"""Methods that share a budget over crops and images by themselves: the numbers of their cards, and slow references."""

from __future__ import annotations

import pytest
import torch

from hf_compress.methods.vision.hired import HiRED
from hf_compress.tensors.regions import region_sums
from tests.invariants.reference import alone, batch_of, logits_of, shared
from tests.methods.test_vision_cards import TILES, WHOLE, generator, largest_remainders
from tests.methods.test_vision_cls import Signals


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
