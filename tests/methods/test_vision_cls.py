"""Selectors by what [CLS], or all patches, look at: the numbers of their cards, and slow references."""

from __future__ import annotations

import math

import pytest
import torch

from hf_compress.engine.contrast import contrast
from hf_compress.methods.vision.damro import Damro
from hf_compress.methods.vision.divprune import DivPrune
from hf_compress.methods.vision.fastervlm import FasterVLM
from hf_compress.methods.vision.gls import GlobalLocalSimilarity
from hf_compress.methods.vision.hiprune import HiPrune
from hf_compress.methods.vision.visionzip import VisionZip
from hf_compress.signals import Assignment, SomeTokens
from tests.invariants.reference import batch_of, logits_of, shared, unchanged
from tests.methods.test_vision_methods import X

NOT_THEN = ("snapkv", "downsample", "tome", "evs", "hired", "damro")  # of another stage, the pixels, the tower, ...


def generator(seed):
    return torch.Generator().manual_seed(seed)


class Signals:
    """Sequences of several parts from tensors.

    Args:
        x: (n, N, D) embeddings, features and states of every block; whole: (n, P, D) those of [CLS].
        rows: {back: (n, H, N)} what [CLS] attends to; received: the same of all rows.
        grids, boxes: of the parts.
    """

    def __init__(
        self, x, rows=None, received=None, whole=None, grids=((2, 3),), boxes=((0.0, 0.0, 1.0, 1.0),), depth=1
    ):
        self.embeddings, self.rows, self.received, self.cls = x, rows, received, whole
        self.grids, self.boxes, self.depth, self.device = list(grids), list(boxes), depth, x.device

    def __len__(self):
        return len(self.embeddings)

    @property
    def count(self):
        return self.embeddings.shape[1]

    @property
    def features(self):
        return self.embeddings

    @property
    def grid(self):
        (grid,) = self.grids
        return grid

    @property
    def place(self):
        sizes = torch.tensor([h * w for h, w in self.grids])
        part = torch.arange(len(sizes)).repeat_interleave(sizes)
        return torch.stack([part, part, part], 1).expand(len(self), -1, -1)

    def attention(self, back=0, *, rows="cls", surrogate=None, logits=False):
        assert surrogate in ("mean", "all") or rows != "cls"
        return (self.rows if rows == "cls" else self.received)[back]

    def states(self, what, back=0, *, heads="mean"):
        return self.embeddings

    def whole(self, what, back=0):
        return self.cls


# -- gls ---------------------------------------------------------------------------------------------------------------
def test_gls_card():
    one, mean = torch.ones(1, 1, 3), X.mean(0)[None, None]
    card = {  # metric, whole: similarities, three that stay
        ("cosine", one): ([0.7303, 0.8083, 0.7746, -0.2108, 0.9058, -0.3086], [1, 2, 4]),
        ("cosine", mean): ([0.5627, 0.6931, 0.8796, 0.0171, 0.8633, -0.2753], [1, 2, 4]),
        ("l1", one): ([-1, -2, -0.6667, -2.3333, -1.6667, -2.3333], [0, 2, 4]),
    }
    for (metric, whole), (like, kept) in card.items():
        method = GlobalLocalSimilarity(metric=metric, centre=False)
        torch.testing.assert_close(method.similarity(X[None], whole)[0], torch.tensor(like), atol=1e-4, rtol=0)
        assert method.assign(Signals(X[None], whole=whole), 3).kept.tolist() == [kept]


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("metric", ["cosine", "l1", "l2"])
@pytest.mark.parametrize("seed", range(4))
def test_gls_against_loops(seed, metric, centre):
    g = generator(seed)
    x, whole = torch.randn(3, 14, 5, generator=g) + 2, torch.randn(3, 1, 5, generator=g)
    keep = int(torch.randint(1, 15, (), generator=g))
    kept = GlobalLocalSimilarity(metric=metric, centre=centre).assign(Signals(x, whole=whole), keep).kept.tolist()
    for i in range(3):
        rows, y, scores = x[i].tolist(), whole[i, 0].tolist(), []
        mean = [sum(row[c] for row in rows) / 14 if centre else 0.0 for c in range(5)]
        y = [b - m for b, m in zip(y, mean)]
        for row in rows:
            row = [a - m for a, m in zip(row, mean)]
            gaps = [a - b for a, b in zip(row, y)]
            if metric == "cosine":
                scores.append(sum(a * b for a, b in zip(row, y)) / math.hypot(*row) / math.hypot(*y))
            else:
                scores.append(-sum(abs(gap) if metric == "l1" else gap**2 for gap in gaps))
        assert kept[i] == sorted(sorted(range(14), key=lambda j: -scores[j])[:keep])


def test_gls_refuses_metrics_that_there_are_not():
    with pytest.raises(ValueError, match=r"metric='dot' must be one of \('cosine', 'l1', 'l2'\)"):
        GlobalLocalSimilarity(metric="dot")


# -- hiprune -----------------------------------------------------------------------------------------------------------
DEEP = torch.tensor([[[0.01 * i for i in range(1, 15)] + [0.055, 0.005]]])


def hiprune_of(anchor, **knobs):
    middle = torch.full((1, 1, 16), 0.01).index_fill(2, torch.tensor([anchor]), 0.5)
    tokens = Signals(torch.zeros(1, 16, 2), received={0: DEEP, 14: middle}, grids=((4, 4),), depth=23)
    return HiPrune(objects=0.6, **knobs).assign(tokens, 8).kept.tolist()


def test_hiprune_card():
    assert HiPrune().back(23) == 14 and HiPrune().back(4) == 2  # CLIP-L: block 8 of 0 to 22; Qwen2.5-VL: the second
    assert hiprune_of(5) == [[1, 4, 5, 6, 9, 11, 12, 13]]
    assert hiprune_of(3) == [[2, 3, 7, 9, 10, 11, 12, 13]]
    assert hiprune_of(3, wrap=True) == [[0, 2, 3, 4, 7, 11, 12, 13]]


def slow_hiprune(middle, late, grid, keep, objects, wrap):
    h, w = grid
    sure = set()
    anchors = min(round(keep * objects / 5), keep // 5)
    for at in sorted(range(h * w), key=lambda i: -middle[i])[:anchors]:
        sure.add(at)
        for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            if wrap:
                sure.add(min(max(at + dr * w + dc, 0), h * w - 1))
            elif 0 <= at // w + dr < h and 0 <= at % w + dc < w:
                sure.add(at + dr * w + dc)
    rest = sorted((i for i in range(h * w) if i not in sure), key=lambda i: -late[i])
    return sorted([*sure, *rest[: keep - len(sure)]])


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_hiprune_against_loops(seed, wrap):
    g = generator(seed)
    h, w, heads = (int(torch.randint(2, 8, (), generator=g)) for _ in range(3))
    rows = {back: torch.rand(3, heads, h * w, generator=g) for back in (0, 3)}
    tokens = Signals(torch.zeros(3, h * w, 2), received=rows, grids=((h, w),), depth=6)
    for keep in {1, 4, h * w // 2, h * w}:
        for objects in (0, 0.3, 1):
            kept = HiPrune(objects=objects, block=2, wrap=wrap).assign(tokens, keep).kept.tolist()
            means = [(rows[3][i].mean(0).tolist(), rows[0][i].mean(0).tolist()) for i in range(3)]
            assert kept == [slow_hiprune(*mean, (h, w), keep, objects, wrap) for mean in means]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(objects=1.5), "objects=1.5 must be a number of at least 0 and at most 1"),
        (dict(block=-1), "block=-1 must be an integer of at least 0"),
        (dict(block=9), "block=9: the vision tower has 3 that see the whole image, from 0 on"),
        (dict(wrap=1), "wrap=1 must be one of"),
    ],
)
def test_hiprune_refuses(knobs, message):
    model = shared("llava")
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.compress("hiprune", 0.5, **knobs)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_hiprune_reads_two_blocks_of_a_model(name):
    model, batch, found = shared(name), batch_of(name), []
    for block in (0, 1):
        with model.compressed("hiprune", 0.5, objects=1, block=block):
            logits_of(model, batch)
            found.append(model.compression.last.visual_kept)
    assert found[0] != found[1]


# -- damro -------------------------------------------------------------------------------------------------------------
def test_damro_card():
    full, negative = torch.tensor([[2.0, 1.5, 0.0]]), torch.tensor([[2.0, 0.5, 1.0]])
    assert contrast(full, negative, 2, 0.1).tolist() == [[2, 3.5, -2]]
    full[0, 2] = -0.5  # below 2 + ln .1 = -.3026
    assert contrast(full, negative, 2, 0.1).tolist() == [[2, 3.5, -math.inf]]


@pytest.mark.parametrize("seed", range(4))
def test_damro_ranks_by_queries_and_keys_at_full_width(seed):
    g = generator(seed)
    query, keys = torch.randn(3, 4, 1, 5, generator=g), torch.randn(3, 4, 14, 5, generator=g)  # 4 heads of 5 channels
    tokens = Signals(torch.zeros(3, 14, 2), rows={0: (query @ keys.mT)[:, :, 0] / 5**0.5})
    kept = Damro().assign(tokens, 4).kept.tolist()
    for i in range(3):
        q, k = query[i].transpose(0, 1).flatten(), keys[i].transpose(0, 1).flatten(1)
        row = (k @ q / 20**0.5).softmax(0)
        assert kept[i] == sorted(row.topk(4).indices.tolist())


@pytest.mark.parametrize("then", [FasterVLM(), DivPrune(), VisionZip()], ids=["fastervlm", "divprune", "visionzip"])
@pytest.mark.parametrize("seed", range(4))
def test_damro_drops_the_outliers_for_another_method(seed, then):
    """As if the tokens that are left were an image of their own."""
    g = generator(seed)
    x, rows = torch.randn(3, 20, 6, generator=g), {0: torch.rand(3, 2, 20, generator=g)}
    name = type(then).__name__.lower()
    for keep, dropped in ((5, 4), (16, 4), (18, 2), (19, 1)):
        answer = Damro(outliers="drop", count=4, then=name).assign(Signals(x, rows=rows), keep)
        for i in range(3):
            sums = rows[0][i].sum(0)
            left = sorted(sorted(range(20), key=lambda j: float(sums[j]))[: 20 - dropped])
            alone = then.assign(Signals(x[i : i + 1, left], rows={0: rows[0][i : i + 1, :, left]}), keep)
            assert answer.kept[i].tolist() == [left[j] for j in alone.kept[0].tolist()]
            assert answer.merges == alone.merges and answer.before_projector == alone.before_projector
            if alone.merges:
                found, expected = answer.apply(x)[i], alone.apply(x[i : i + 1, left])[0]
                torch.testing.assert_close(found, expected)


def test_some_tokens_show_what_they_have_and_spread_what_is_answered():
    x = torch.randn(2, 6, 3, generator=generator(0))
    at = torch.tensor([[0, 2, 5], [1, 2, 3]])
    rows = torch.rand(2, 4, 6, generator=generator(1))
    some = SomeTokens(Signals(x, rows={0: rows}), at)
    assert (len(some), some.count, some.depth) == (2, 3, 1)
    for b in range(2):
        assert torch.equal(some.embeddings[b], x[b, at[b]]) and torch.equal(some.features[b], x[b, at[b]])
        assert torch.equal(some.states("key")[b], x[b, at[b]])
        assert torch.equal(some.attention(surrogate="all")[b], rows[b][:, at[b]])
        assert torch.equal(some.place[b, :, 0], torch.zeros(3, dtype=torch.long))
    dense = torch.rand(2, 2, 3, generator=generator(2))
    answer = some.among_all(Assignment(torch.tensor([[0, 2], [1, 2]]), dense=dense))
    assert answer.kept.tolist() == [[0, 5], [2, 3]]
    for b in range(2):
        torch.testing.assert_close(answer.apply(x)[b], dense[b] @ x[b, at[b]])
    with pytest.raises(ValueError, match="stand on no grid"):
        some.grid  # noqa: B018


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_damro_of_a_model(name):
    """Exact; the outliers stay, or none of them does."""
    model, batch = shared(name), batch_of(name)
    with model.compressed("damro", keep=2):
        logits_of(model, batch)
        outliers = model.compression.last.visual_kept
    assert all(len(kept) == 2 for row in outliers for kept in row)
    for then in ("fastervlm", "visionzip", "cdpruner"):
        with model.compressed("damro", 0.5, outliers="drop", count=2, then=then):
            logits_of(model, batch)
            last = model.compression.last
        assert last.visual_left == [[round(n / 2) for n in row] for row in last.visual_tokens]
        for pair in zip(outliers, last.visual_kept):
            assert not any({*a} & {*b} for a, b in zip(*pair))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(outliers="mask"), "outliers='mask' must be one of"),
        (dict(count=0), "count=0 must be an integer of at least 1"),
        (dict(then="nobody"), "then='nobody' is not a method"),
        *[(dict(then=name), f"then='{name}' is no vision method that picks") for name in NOT_THEN],
    ],
)
def test_damro_refuses(knobs, message):
    with pytest.raises(ValueError, match=message):
        Damro(**knobs)
