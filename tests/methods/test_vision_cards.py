"""globalcom2, cdpruner and evs: the numbers of their cards, and slow references of what they decide."""

from __future__ import annotations

import math

import pytest
import torch

from hf_compress.methods.vision.cdpruner import CDPruner, relevance
from hf_compress.methods.vision.evs import EVS
from hf_compress.methods.vision.globalcom2 import GlobalCom2, over
from hf_compress.tensors.diversity import determinantal
from hf_compress.tensors.select import spaced_grid
from tests import tiny
from tests.invariants.language import bare
from tests.invariants.reference import alone, batch_of, greedy, logits_of, shared
from tests.methods.test_vision_methods import FakeTokens, X
from tests.tiny import VID, VISION_END, VISION_START


def generator(seed):
    return torch.Generator().manual_seed(seed)


class FakeParts(FakeTokens):
    """Sequences of several parts from tensors: logits (n, H, N), or embeddings (n, N, D)."""

    def __init__(self, x, logits=None, grids=((2, 3),), boxes=((0.0, 0.0, 1.0, 1.0),), question=None):
        super().__init__(x, [logits], grids[0])
        self.logits, self.grids, self.boxes, self.question = logits, list(grids), list(boxes), question

    @property
    def place(self):
        sizes = torch.tensor([h * w for h, w in self.grids])
        part = torch.arange(len(sizes)).repeat_interleave(sizes)
        return torch.stack([part, part, part], 1).expand(len(self), -1, -1)

    def attention(self, back=0, *, rows="cls", surrogate=None, logits=False):
        assert logits and surrogate == "all"
        return self.logits


def parts_of(logits, grids, boxes):
    return FakeParts(logits.mean(1)[..., None], logits, grids, boxes)


# -- globalcom2 --------------------------------------------------------------------------------------------------------
TILES = ((0.0, 0.0, 0.5, 0.5), (0.0, 0.5, 0.5, 1.0), (0.5, 0.0, 1.0, 0.5), (0.5, 0.5, 1.0, 1.0))
WHOLE = (0.0, 0.0, 1.0, 1.0)


def test_globalcom2_card():
    g = 10 * torch.tensor([[2.0, 2, 0, 0], [2, 2, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    assert GlobalCom2().counts(g[None], [(4, 4)] * 4, TILES, 20) == [[4, 7, 3, 3, 3]]
    resized = over(torch.tensor([[[0.0, 4], [8, 12]]]), (4, 4), WHOLE)
    assert resized[0].tolist() == [[0, 1, 3, 4], [2, 3, 5, 6], [6, 7, 9, 10], [8, 9, 11, 12]]
    local, view = torch.tensor([1.0, 2, 3, 4]), torch.tensor([4.0, 0, 0, 0])
    logits = torch.cat([view, local])[None, None]  # a thumbnail of 1 x 4 over one crop of 1 x 4
    answer = GlobalCom2().assign(parts_of(logits, [(1, 4)] * 2, [WHOLE] * 2), 4)
    assert answer.kept.tolist() == [[0, 1, 4, 7]]  # of the crop 0 and 3: scores 1.1826 .3651 .5477 .7303
    assert answer.valid is None


def bilinear(view, height, width, y, x):
    """One number of a view (h, w) resized with align_corners=False."""
    h, w = view.shape
    sy, sx = (max((i + 0.5) * n / m - 0.5, 0.0) for i, n, m in ((y, h, height), (x, w, width)))
    y0, x0 = int(sy), int(sx)
    y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
    top = (1 - (sx - x0)) * view[y0, x0] + (sx - x0) * view[y0, x1]
    low = (1 - (sx - x0)) * view[y1, x0] + (sx - x0) * view[y1, x1]
    return float((1 - (sy - y0)) * top + (sy - y0) * low)


def largest_remainders(total, weights, most):
    """Shares of a total in proportion to weights; what one part cannot hold goes to the others."""
    out, open_ = [0] * len(weights), list(range(len(weights)))
    left = total
    while True:
        mass = sum(weights[i] for i in open_)
        full = [i for i in open_ if left * weights[i] / mass >= most[i]]
        if not full:
            break
        for i in full:
            out[i], left = most[i], left - most[i]
        open_ = [i for i in open_ if i not in full]
        if not open_:
            return out
    exact = {i: left * weights[i] / mass for i in open_}
    for i in open_:
        out[i] = int(exact[i])
    rest = left - sum(int(e) for e in exact.values())
    for i in sorted(open_, key=lambda i: (int(exact[i]) - exact[i], i))[:rest]:
        out[i] += 1
    return out


def slow_globalcom2(logits, grids, rows, columns, keep, temperature):
    """Kept tokens of one image: a thumbnail, then rows x columns equal crops, as the official loop goes."""
    mean = logits.double().mean(0)
    sizes = [h * w for h, w in grids]
    parts = list(mean.split(sizes))
    (H, W), (h, w) = grids[0], grids[1]
    view = parts[0].view(H, W)
    sums = []
    for r in range(rows):
        for c in range(columns):
            inside = [
                view[i, j]
                for i in range(H)
                for j in range(W)
                if r / rows <= (i + 0.5) / H < (r + 1) / rows and c / columns <= (j + 0.5) / W < (c + 1) / columns
            ]
            sums.append(float(sum(inside)))
    top = max(sums)
    powers = [math.exp((e - top) / temperature) for e in sums]
    p = [x / sum(powers) for x in powers]
    share = keep / sum(sizes)
    scales = [min(1.0, share * (1 + x - sum(p) / len(p))) for x in p]
    first, rest = largest_remainders(keep, [sizes[0], sum(sizes[1:])], [sizes[0], sum(sizes[1:])])
    counts = [first, *largest_remainders(rest, [n * s for n, s in zip(sizes[1:], scales)], sizes[1:])]
    kept, start = [], 0
    for k, (part, count) in enumerate(zip(parts, counts)):
        score = [float(x) for x in part]
        if k:
            r, c = divmod(k - 1, columns)
            seen = [bilinear(view, rows * h, columns * w, r * h + y, c * w + x) for y in range(h) for x in range(w)]
            norms = [math.sqrt(sum(s * s for s in row)) for row in (score, seen)]
            score = [a / norms[0] + b / norms[1] for a, b in zip(score, seen)]
        best = sorted(range(len(score)), key=lambda i: -score[i])[:count]
        kept += [start + i for i in sorted(best)]
        start += len(score)
    return kept


@pytest.mark.parametrize("seed", range(12))
def test_globalcom2_against_the_official_loop(seed):
    g = generator(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))
    rows, columns, h, n, heads = draw(1, 4), draw(1, 4), draw(2, 6), draw(1, 4), draw(1, 4)
    w, side = draw(2, 6), 12  # a multiple of all numbers of rows
    grids = [(side, side), *[(h, w)] * (rows * columns)]
    boxes = [WHOLE] + [
        (r / rows, c / columns, (r + 1) / rows, (c + 1) / columns) for r in range(rows) for c in range(columns)
    ]
    logits = 2 * torch.randn(n, heads, sum(a * b for a, b in grids), generator=g)
    keep = draw(2, logits.shape[2])
    answer = GlobalCom2(temperature=3.0).assign(parts_of(logits, grids, boxes), keep)
    assert answer.valid is None and answer.kept.shape == (n, keep)
    for i in range(n):
        assert answer.kept[i].tolist() == slow_globalcom2(logits[i], grids, rows, columns, keep, 3.0)


def test_globalcom2_of_one_crop_keeps_its_highest_logits():
    logits = torch.randn(2, 3, 12, generator=generator(0))
    kept = GlobalCom2().assign(parts_of(logits, [(3, 4)], [WHOLE]), 5).kept
    for mine, row in zip(kept.tolist(), logits.mean(1)):
        assert mine == sorted(row.topk(5).indices.tolist())


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "llava_next_video"])
def test_globalcom2_spends_where_the_thumbnail_looks(name):
    """Exact budgets per image, other shares per crop than in proportion, the same alone and in a batch."""
    model, batch = shared(name), batch_of(name)
    with model.compressed("globalcom2", 0.5, temperature=0.05):
        kept = logits_of(model, batch) is not None and model.compression.last
        assert [[round(n / 2) for n in row] for row in kept.visual_tokens] == kept.visual_left
        for row in range(2):
            logits_of(model, alone(name, batch, row))
            assert model.compression.last.visual_kept == [kept.visual_kept[row]]
    with model.compressed("globalcom2", 0.5, temperature=1e6):
        logits_of(model, batch)
        even = model.compression.last.visual_kept
    assert even != kept.visual_kept


# -- cdpruner ----------------------------------------------------------------------------------------------------------
def test_cdpruner_card():
    """The relevance of the card is that of CLIP, negated; unconditioned is a kernel of cosines."""
    cosine = torch.nn.functional.cosine_similarity(X, torch.tensor([[0.0, 1, 0]]))
    r = -cosine
    r = (r - r.min() + 1e-6) / (r.max() - r.min())
    torch.testing.assert_close(r, torch.tensor([0.5273, 0.1736, 0, 0.4197, 0.0648, 1]), atol=1e-4, rtol=0)
    assert determinantal(X[None], r[None], 3).tolist() == [[5, 0, 3]]
    assert determinantal(X[None], torch.ones(1, 6), 3).tolist() == [[0, 5, 2]]
    question = torch.tensor([[[0.0, 1, 0]]])
    ours = relevance(X[None], question, torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(ours, 1 - r[None], atol=1e-5, rtol=0)


def slow_picks(x, weight, k):
    """Every determinant of every candidate, in double precision."""
    x = x.double() / x.double().norm(dim=1, keepdim=True) * weight.double()[:, None]
    kernel, picks = x @ x.T, []
    for _ in range(k):
        rest = [i for i in range(len(x)) if i not in picks]
        picks.append(max(rest, key=lambda i: float(torch.logdet(kernel[[*picks, i]][:, [*picks, i]]))))
    return picks


def official_picks(x, weight, k):
    """The recursion of the official code over rows of the kernel."""
    x = x.double() / x.double().norm(dim=1, keepdim=True)
    kernel = weight.double()[:, None] * (x @ x.T) * weight.double()[None]
    left, rows, picks = weight.double().square(), [], []  # cosines of a token and itself, without rounding
    for _ in range(k):
        j = int(left.argmax())
        e = kernel[j] - sum((row[j] * row for row in rows), torch.zeros(len(x), dtype=torch.double))
        e = e / left[j].clamp(min=1e-12).sqrt()
        rows.append(e)
        left = left - e**2
        left[j] = -math.inf
        picks.append(j)
    return picks


@pytest.mark.parametrize("seed", range(10))
def test_cdpruner_against_determinants(seed):
    g = generator(seed)
    n, N, D = 3, int(torch.randint(6, 20, (), generator=g)), 24
    x, weight = torch.randn(n, N, D, generator=g), torch.rand(n, N, generator=g) * 0.9 + 0.1
    k = int(torch.randint(1, N + 1, (), generator=g))
    found = determinantal(x, weight, k).tolist()
    for i in range(n):
        assert found[i] == official_picks(x[i], weight[i], k) == slow_picks(x[i], weight[i], k)


def test_what_is_explained_comes_by_its_weight():
    """In three dimensions three picks explain everything; so do copies of what was picked."""
    g = generator(0)
    x, weight = torch.randn(1, 9, 3, generator=g), torch.rand(1, 9, generator=g) * 0.9 + 0.1
    picks = determinantal(x, weight, 9)[0].tolist()
    assert sorted(picks) == list(range(9))
    assert picks[3:] == sorted(picks[3:], key=lambda i: -float(weight[0, i]))
    same = torch.ones(2, 7, 4)
    assert determinantal(same, torch.ones(2, 7), 7).tolist() == [list(range(7))] * 2
    assert determinantal(torch.zeros(1, 4, 4), torch.ones(1, 4), 4).tolist() == [[0, 1, 2, 3]]


def test_cdpruner_follows_the_question_and_does_without():
    g = generator(1)
    x = torch.randn(2, 30, 40, generator=g)
    one, other = torch.randn(2, 3, 40, generator=g), torch.randn(2, 3, 40, generator=g)
    every, none = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)
    ask = lambda text, real: CDPruner().assign(FakeParts(x, question=(text, real)), 8).kept.tolist()
    assert ask(one, every) != ask(other, every)
    assert ask(one, none) == ask(other, none) == ask(one[:, :0], every[:, :0])
    assert ask(one, none) == [sorted(official_picks(y, torch.ones(30), 8)) for y in x]
    padded = torch.cat([99 * torch.ones(2, 2, 40), one], 1), torch.cat([none[:, :2], every], 1)
    assert ask(*padded) == ask(one, every)
    for i in range(2):  # by hand
        unit = lambda y: y / y.norm(dim=-1, keepdim=True)
        r = (unit(x[i]) @ unit(one[i]).T).mean(1)
        r = (r - r.min() + 1e-6) / (r.max() - r.min())
        assert ask(one, every)[i] == sorted(official_picks(x[i], r, 8))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_cdpruner_of_a_model_follows_its_prompt(name):
    model, found = shared(name), []
    with model.compressed("cdpruner", 0.75):
        for text in ([5, 6, 7], [71, 72, 73], [5, 6, 7]):
            logits_of(model, tiny.batch(name, bare(name), [[1, tiny.IMG, *text]]))
            found.append(model.compression.last.visual_kept)
    assert found[0] == found[2] != found[1]


# -- evs ---------------------------------------------------------------------------------------------------------------
def test_evs_card():
    """Cosines [.9 .1 .5 .95] and [.2 .99 .6 .7] to the frame before, half of three frames of 2 x 2."""
    cosines = torch.tensor([[0.9, 0.1, 0.5, 0.95], [0.2, 0.99, 0.6, 0.7]])
    angles = torch.cat([torch.zeros(1, 4), cosines.acos().cumsum(0)]).flatten()
    x = torch.stack([angles.cos(), angles.sin()], 1)[None]
    assert EVS().assign(FakeParts(x, grids=[(2, 2)] * 3), 6).kept.tolist() == [[0, 1, 2, 3, 5, 8]]


@pytest.mark.parametrize("seed", range(10))
def test_evs_against_loops(seed):
    g = generator(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))
    n, T, h, w = draw(1, 4), draw(2, 6), draw(1, 4), draw(1, 4)
    N, x = h * w, torch.randn(n, T * h * w, 5, generator=g)
    keep = draw(N, T * N + 1)
    kept = EVS().assign(FakeParts(x, grids=[(h, w)] * T), keep).kept.tolist()
    for i in range(n):
        change = [255.0] * N
        for t in range(1, T):
            for j in range(N):
                a, b = x[i, t * N + j].double(), x[i, (t - 1) * N + j].double()
                change.append(float(1 - a @ b / (a.norm() * b.norm())))
        assert kept[i] == sorted(sorted(range(T * N), key=lambda j: -change[j])[:keep])


def test_evs_of_a_frozen_video_keeps_the_first_frame():
    frame = torch.randn(1, 6, 4, generator=generator(0))
    video = FakeParts(frame.repeat(1, 4, 1), grids=[(2, 3)] * 4)
    assert EVS().assign(video, 6).kept.tolist() == [list(range(6))]
    with pytest.raises(ValueError, match=r"keep=5 does not hold its 6 tokens.*4 frames 0\.75 can be removed"):
        EVS().assign(video, 5)


def test_evs_of_a_single_image_is_uniform():
    x = torch.randn(2, 12, 4, generator=generator(0))
    for keep in (1, 5, 12):
        assert EVS().assign(FakeParts(x, grids=[(3, 4)]), keep).kept.tolist() == [spaced_grid(3, 4, keep)] * 2


def test_evs_keeps_the_places_of_the_whole_prompt():
    """Kept rows stand where they stood, text behind the video where the whole prompt has it."""
    name = "qwen2_vl"
    model, g = shared(name), generator(0)
    ids = torch.tensor([[1, 5, 6, 7, VISION_START, *[VID] * 12, VISION_END, 8]])
    batch = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=2 * (ids == VID).int(),
        pixel_values_videos=torch.randn(48, 96, generator=g),
        video_grid_thw=(grid := torch.tensor([[3, 4, 4]])),
    )
    where, seen = model.base_model.get_rope_index(ids, batch["mm_token_type_ids"], video_grid_thw=grid)[0], []
    note = lambda _, args, kwargs: seen.append(kwargs["position_embeddings"][0])
    handle = model.get_decoder().layers[0].register_forward_pre_hook(note, with_kwargs=True)
    with model.compressed("evs", 0.5):
        greedy(model, batch, max_new_tokens=1)
        rows = model.compression.last.layer_index[0][0]
    handle.remove()
    expected = model.get_decoder().rotary_emb(torch.zeros(1), where[..., rows])[0]
    assert torch.equal(seen[0], expected)
    assert where[:, 0, 5:9].T.tolist() == [[5, 5, 5], [5, 5, 6], [5, 6, 5], [5, 6, 6]]
    assert len(rows) == 7 + 6 and rows[5:9] == [5, 6, 7, 8] and rows[-2:] == [17, 18]


@pytest.mark.parametrize("name", tiny.VIDEO)
def test_evs_spends_on_the_whole_video(name):
    """Exact over all frames, the first one whole; the same alone and in a batch."""
    model, batch = shared(name), batch_of(name, "video")
    with model.compressed("evs", 0.4):
        logits_of(model, batch)
        last = model.compression.last
        assert last.visual_left == [[round(0.6 * n) for n in row] for row in last.visual_tokens]
        for row in range(2):
            logits_of(model, alone(name, batch, row))
            assert model.compression.last.visual_kept == [last.visual_kept[row]]


def test_evs_wants_videos():
    with pytest.raises(ValueError, match=r"evs.*needs videos"):
        shared("llava").compress("evs", 0.5)
