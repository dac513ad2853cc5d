"""holitom and prunevid: what stands still in a video is told once, against slow references."""

from __future__ import annotations

import pytest
import torch

from hf_compress import budget
from hf_compress.demo import load_demo
from hf_compress.demo.dataset import TOKEN, load_scenes
from hf_compress.evaluate.prompts import encode
from hf_compress.methods.vision.holitom import HoliTom, windows
from hf_compress.methods.vision.prunevid import PruneVid
from hf_compress.tensors.cluster import density_peaks
from hf_compress.tensors.frames import cell_cosines, contiguous, still_windows
from tests.methods.test_vision_cards import generator
from tests.methods.test_vision_videos import FakeVideo, cosine, drawn


# -- holitom -----------------------------------------------------------------------------------------------------------
def partitions(T):
    """All ways to cut T frames into windows, as lengths."""
    if not T:
        yield []
    for first in range(1, T + 1):
        for rest in partitions(T - first):
            yield [first, *rest]


def saved_by(lengths, still):
    """Tokens that windows of such lengths save, of cells (T - 1, N) that are still or not."""
    out, start = 0, 0
    for m in lengths:
        out += (
            (m - 1) * sum(all(still[t][j] for t in range(start, start + m - 1)) for j in range(len(still[0]))) * (m > 1)
        )
        start += m
    return out


@pytest.mark.parametrize("seed", range(20))
def test_still_windows_against_all_partitions(seed):
    g = generator(seed)
    T, N = (int(torch.randint(2, 8, (), generator=g)) for _ in "TN")
    still = torch.rand(T - 1, N, generator=g) < 0.7
    lengths, saved = still_windows(still)
    assert sum(lengths) == T and saved == saved_by(lengths, still.tolist())
    assert saved == max(saved_by(way, still.tolist()) for way in partitions(T))


def test_holitom_card():
    alike = torch.tensor([[0.9, 0.9, 0.1], [0.9, 0.2, 0.9], [0.9, 0.9, 0.9]])
    assert still_windows(alike > 0.8) == ([2, 2], 5)
    lengths, still = windows(alike, 0.8, 6)  # half of twelve tokens: 5 are saved
    assert lengths == [2, 2] and (still[0].tolist(), still[2].tolist()) == ([True, True, False], [True] * 3)
    lengths, still = windows(torch.tensor([[0.9, 0.95], [0.99, 0.85]]), 0.8, 2)  # all still would save 4
    assert saved_by(lengths, still.tolist()) == 2 and still.tolist() == [[True, True], [True, False]]


def condensed(x, cells, count, own=None):
    """{slot: vector} of cells (lists of tokens) by loops around `density_peaks`."""
    if not count:
        return {}
    means = torch.stack([x[cell].mean(0) for cell in cells])
    centres, groups = (t[0].tolist() for t in density_peaks(means[None], count, 7))
    out = {}
    for place, c in enumerate(centres):
        mine = [means[i].double() for i in range(len(cells)) if groups[i] == place]
        others = [means[i].double() for i in range(len(cells)) if groups[i] == place and i != c]
        out[cells[c][0]] = sum(mine) / len(mine)
        if own is not None and others:
            out[cells[c][0]] = own * means[c].double() + (1 - own) * sum(others) / len(others)
    return out


def same(answer, x, expected):
    """The answer of every video is {slot: vector} of it."""
    found = answer.apply(x)
    for i, mine in enumerate(expected):
        assert answer.kept[i].tolist() == sorted(mine)
        wanted = torch.stack([mine[j].double() for j in sorted(mine)])
        torch.testing.assert_close(found[i].double(), wanted, atol=1e-5, rtol=1e-5)


def quiet(x, frames, much):
    """The videos, each of whose frames is like the first one, but for so much."""
    x = x.unflatten(1, (frames, -1))
    return (x[:, :1] + much * x).flatten(1, 2)


@pytest.mark.parametrize("seed", range(25))
def test_holitom_against_loops(seed):
    g, x, T, grid = drawn(seed)
    N, draw = grid[0] * grid[1], lambda: float(torch.rand((), generator=g))
    x, keep = quiet(x, T, draw()), int(torch.randint(1, T * N, (), generator=g)) if T * N > 1 else 1
    method = HoliTom(threshold=draw(), own=draw(), contextual=[0.0, 0.5][seed % 2])
    attention = torch.rand(len(x), 2, T * N, generator=g)
    answer, expected = method.assign(FakeVideo(x, T, grid, attention), keep), []
    if keep == T * N:
        assert torch.equal(answer.apply(x), x)
        return
    for video, rows in zip(x, attention.mean(1)):
        alike = cell_cosines(video.view(1, T, N, -1), [*range(1, T), T - 1])[0, :-1]
        lengths, still = windows(alike, method.threshold, T * N - keep)
        for level in [method.threshold, *sorted(v for v in alike.flatten().tolist() if v > method.threshold)]:
            if T == 1 or max(saved_by(way, (alike > level).tolist()) for way in partitions(T)) <= T * N - keep:
                break  # the first level that leaves enough
        assert torch.equal(still, alike > level)
        units, start, out = [], 0, {}
        for m in lengths:
            one = [m > 1 and all(bool(still[t, j]) for t in range(start, start + m - 1)) for j in range(N)]
            units.append([[t * N + j for t in range(start, start + m)] for j in range(N) if one[j]])
            units += [[[t * N + j] for j in range(N) if not one[j]] for t in range(start, start + m)]
            start += m
        sizes = [len(unit) for unit in units]
        for unit, count in zip(units, budget.shares(keep, [float(n) for n in sizes], sizes)):
            if unit and len(unit[0]) == 1:
                some = int(count * method.contextual)
                first = sorted(unit, key=lambda cell: -float(rows[cell[0]]))[: count - some]
                out |= {cell[0]: video[cell[0]] for cell in first}
                unit, count = [cell for cell in unit if cell not in first], some
            out |= condensed(video, unit, count, method.own)
        expected.append(out)
    same(answer, x, expected)


# -- prunevid ----------------------------------------------------------------------------------------------------------
def test_prunevid_card():
    assert contiguous([0, 0, 1, 0, 1, 1, 1, 2]) == [2, 6]
    assert contiguous([0, 0, 0, 1, 2, 2, 1, 1]) == [4, 2, 2]
    assert contiguous([0, 1, 0]) == [3] and contiguous([0]) == [1]
    assert contiguous([0, 0, 1, 0, 0]) == [3, 2]  # both runs stay; of equal neighbours the earlier


@pytest.mark.parametrize("seed", range(25))
def test_prunevid_against_loops(seed):
    g, x, T, grid = drawn(seed, most=13)
    N, draw = grid[0] * grid[1], lambda: float(torch.rand((), generator=g))
    x, keep = quiet(x, T, draw()), int(torch.randint(1, T * N + 1, (), generator=g))
    method, expected = PruneVid(threshold=draw()), []
    answer = method.assign(FakeVideo(x, T, grid), keep)
    if keep == T * N:
        assert torch.equal(answer.apply(x), x)
        return
    for video in x:
        whole = torch.stack([video[t * N : (t + 1) * N].mean(0) for t in range(T)])
        lengths = contiguous(density_peaks(whole[None], max(1, T // 4), 7)[1][0].tolist())
        starts, room = [sum(lengths[:s]) for s in range(len(lengths))], T * N - keep
        stillness = {}
        for s, (start, m) in enumerate(zip(starts, lengths)):
            for j in range(N if m > 1 else 0):
                tokens = [video[t * N + j] for t in range(start, start + m)]
                pairs = [cosine(a, b) for i, a in enumerate(tokens) for k, b in enumerate(tokens) if i != k]
                stillness[s, j] = sum(pairs) / len(pairs)
        still = set()
        for (s, j), value in sorted(stillness.items(), key=lambda item: -item[1]):
            room -= lengths[s] - 1
            if room < 0 or value <= method.threshold:
                break
            still.add((s, j))
        units, out = [], {}
        for s, (start, m) in enumerate(zip(starts, lengths)):
            units.append([[t * N + j for t in range(start, start + m)] for j in range(N) if (s, j) in still])
            units += [[[t * N + j] for j in range(N) if (s, j) not in still] for t in range(start, start + m)]
        sizes = [len(unit) for unit in units]
        for unit, count in zip(units, budget.shares(keep, [float(n) for n in sizes], sizes)):
            out |= condensed(video, unit, count)
        expected.append(out)
    same(answer, x, expected)


@pytest.mark.parametrize("method", [HoliTom(), PruneVid(segments=0)])
def test_a_frozen_video_is_one_frame(method):
    """As many tokens as a frame has: each cell is the mean of all its frames, in the slot of the first."""
    frame = torch.randn(1, 6, 4, generator=generator(0))
    x = frame.repeat(1, 5, 1) * torch.linspace(0.5, 1.5, 5).repeat_interleave(6)[None, :, None]
    answer = method.assign(FakeVideo(x, 5, (2, 3), torch.rand(1, 1, 30)), 6)
    assert answer.kept.tolist() == [[*range(6)]]
    torch.testing.assert_close(answer.apply(x), frame)


def test_prunevid_misses_objects_of_stills():
    """What its docstring says of images: of the tokens on objects half as many are centres as random keeps."""
    model, processor = load_demo("qwen")
    rows, side = load_scenes("test", images=20, questions=1), 14
    share = {}
    for method in ("prunevid", "random"):
        for ratio in (0.5, 0.75):
            found = total = 0
            with model.compressed(method, ratio=ratio), torch.no_grad():
                for row in rows:
                    model(**encode(processor, [row["image"]], [row["question"]]), logits_to_keep=1)
                    kept, on = {int(i) for i in model.compression.last.visual_kept[0][0]}, set()
                    for left, top, right, bottom in (one["box"] for one in row["objects"]):
                        columns = range(left // TOKEN, -(-right // TOKEN))
                        on |= {y * side + x for y in range(top // TOKEN, -(-bottom // TOKEN)) for x in columns}
                    found, total = found + len(on & kept), total + len(on)
            share[method, ratio] = found / total
    assert [share["prunevid", ratio] for ratio in (0.5, 0.75)] == pytest.approx([0.23, 0.12], abs=0.02)
    assert [share["random", ratio] for ratio in (0.5, 0.75)] == pytest.approx([0.49, 0.23], abs=0.02)
