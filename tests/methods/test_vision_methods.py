"""Vision methods on images made of plain tensors: the numbers of their cards, and what all must satisfy."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from hf_compress.engine.vision import mix, reach
from hf_compress.methods.base import PixelMethod, TowerMethod, VisionMethod
from hf_compress.methods.vision.avgpool import AvgPool, cells
from hf_compress.methods.vision.divprune import DivPrune
from hf_compress.methods.vision.downsample import Downsample
from hf_compress.methods.vision.fastervlm import FasterVLM
from hf_compress.methods.vision.random import RandomTokens
from hf_compress.methods.vision.tome import ToMe, share
from hf_compress.methods.vision.uniform import Uniform
from hf_compress.methods.vision.visionzip import VisionZip
from hf_compress.methods.vision.vtc_cls import VtcCls
from hf_compress.registry import methods
from hf_compress.signals import Assignment, Read

ALL = [
    RandomTokens(),
    RandomTokens(seed=7),
    Uniform(),
    Uniform(grid=False),
    Downsample(),
    AvgPool(),
    FasterVLM(),
    VtcCls(layers=2),
    VisionZip(),
    VisionZip(contextual=0.5, average=True),
    DivPrune(),
    ToMe(),
]
CLS = [m for m in ALL if isinstance(m, (FasterVLM, VtcCls, VisionZip))]

# Fixture F6: a 2 x 3 grid and two heads; ROWS[1] is the second block of the vtc_cls card.
X = torch.tensor([[3, 0, 1], [4, 3, 0], [0, 2, 1], [-5, 1, 2], [3, 4, 1], [-1, -3, 2]], dtype=torch.float32)
ROWS = [
    torch.tensor([[0.40, 0.10, 0.05, 0.11, 0.25, 0.09], [0.20, 0.40, 0.05, 0.05, 0.15, 0.15]]),
    torch.tensor([[0.05, 0.05, 0.30, 0.20, 0.10, 0.30], [0.05, 0.05, 0.42, 0.20, 0.10, 0.18]]),
]


class FakeTokens:
    """The signals of n images from tensors; counts what is asked for."""

    def __init__(self, x, rows, grid, content=None):
        self.embeddings_, self.rows, self.grid = x, rows, grid
        self.content = torch.arange(len(x)) if content is None else content
        self.device, self.asked = x.device, []

    def __len__(self):
        return len(self.embeddings_)

    @property
    def count(self):
        return self.embeddings_.shape[1]

    @property
    def embeddings(self):
        self.asked.append("embeddings")
        return self.embeddings_

    features = embeddings

    def attention(self, back=0, *, rows="cls", surrogate=None):
        self.asked.append(f"{rows} {back}")
        return self.rows[back]

    def states(self, what, back=0, *, heads="mean"):
        self.asked.append(f"{what} {back}")
        return self.embeddings_

    def one(self, i):
        return FakeTokens(
            self.embeddings_[i : i + 1], [r[i : i + 1] for r in self.rows], self.grid, self.content[i : i + 1]
        )


@dataclass
class FakeBlock:
    index: int
    steps: int
    has_cls: bool
    hidden: torch.Tensor
    sizes: torch.Tensor

    @property
    def keys(self):
        return self.hidden


def f6(blocks=(0,)):
    return FakeTokens(X[None], [ROWS[b][None] for b in blocks], (2, 3))


def some(h, w, n=2, heads=3, blocks=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, heads, h * w, generator=g).softmax(-1) for _ in range(blocks)]
    return FakeTokens(torch.randn(n, h * w, 8, generator=g), rows, (h, w))


def name(method):
    return str(method)


# ---- the cards' numbers


def split_mix(x):
    """SplitMix64 with Python's integers, after the listing of Steele, Lea & Flood 2014."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def signed(x):
    return x - 2**64 * (x >> 63)


def test_random_card():
    key = split_mix(split_mix(0) + 7)  # of content 0 and seed 7
    order = sorted(range(6), key=lambda i: signed(split_mix(split_mix(key) + i)))
    assert RandomTokens(seed=7).assign(f6(), 3).kept.tolist() == [sorted(order[:3])]


def test_uniform_card():
    kept = [Uniform(grid=False).assign(f6(), k).kept[0].tolist() for k in (1, 2, 3, 4)]
    assert kept == [[3], [1, 4], [1, 3, 5], [0, 2, 3, 5]]
    square = some(4, 4)
    assert Uniform().assign(square, 6).kept.tolist() == [[4, 6, 7, 12, 14, 15]] * 2
    assert Uniform().assign(square, 7).kept.tolist() == [[1, 3, 8, 10, 11, 13, 15]] * 2
    lines = range(1, 24, 3)
    assert Uniform().assign(some(24, 24), 64).kept[1].tolist() == [r * 24 + c for r in lines for c in lines]


def test_avgpool_card():
    row = AvgPool().assign(f6(), 3)
    assert row.apply(X[None]).tolist() == [[[3.5, 1.5, 0.5], [-2.5, 1.5, 1.5], [1, 0.5, 1.5]]]
    assert row.kept.tolist() == [[0, 2, 4]]
    cell = AvgPool(grid=True).assign(f6(), 3)  # windows of two rows and one column
    assert cell.apply(X[None]).tolist() == [[[-1, 0.5, 1.5], [3.5, 3.5, 0.5], [-0.5, -0.5, 1.5]]]
    assert cell.kept.tolist() == [[0, 1, 2]]


def test_fastervlm_card():
    assert ROWS[0].mean(0).tolist() == pytest.approx([0.30, 0.25, 0.05, 0.08, 0.20, 0.12])
    assert FasterVLM().assign(f6(), 3).kept.tolist() == [[0, 1, 4]]


def test_vtc_cls_card():
    total = ROWS[0].mean(0) + ROWS[1].mean(0)
    assert total.tolist() == pytest.approx([0.35, 0.30, 0.41, 0.28, 0.30, 0.36])
    images = f6(blocks=(1, 0))  # the feature block comes last
    assert VtcCls(layers=2).assign(images, 3).kept.tolist() == [[0, 2, 5]]
    assert images.asked == ["cls 0", "cls 1"]
    assert VtcCls(layers=1).assign(images, 3).kept.tolist() == [[2, 3, 5]]


def test_visionzip_card():
    out = VisionZip(contextual=0.5).assign(f6(), 4)
    assert out.kept.tolist() == [[0, 1, 2, 4]] and out.before_projector
    assert out.groups.tolist() == [[0, 1, 2, 2, 3, 2]]  # 3 and 5 go to target 2, none to target 4
    assert out.apply(X[None]).tolist() == [[[3, 0, 1], [4, 3, 0], [-3, 1, 3], [3, 4, 1]]]
    mean = VisionZip(contextual=0.5, average=True).assign(f6(), 4).apply(X[None])
    torch.testing.assert_close(mean[0, 2], torch.tensor([-2, 0, 5 / 3]))


@pytest.mark.parametrize("keep,contextual", [(64, 10), (128, 20), (192, 30)])
def test_visionzip_split_is_that_of_the_authors(keep, contextual):
    images = some(24, 24, n=1)
    dominant = set(images.attention().sum(1)[0].topk(keep - contextual).indices.tolist())
    kept = set(VisionZip().assign(images, keep).kept[0].tolist())
    assert len(kept) == keep and dominant <= kept
    rest = [i for i in range(576) if i not in dominant]
    assert kept - dominant == set(rest[:: len(rest) // contextual][:contextual])


def test_divprune_card():
    assert DivPrune().assign(f6(), 3).kept.tolist() == [[1, 3, 5]]
    assert DivPrune().assign(f6(), 4).kept.tolist() == [[1, 2, 3, 5]]
    assert not {1, 4} <= set(DivPrune().assign(f6(), 5).kept[0].tolist())


def test_tome_card_on_the_output():
    once = ToMe().assign(f6(), 4)  # the card's outputs, in the order of their first token
    assert once.kept.tolist() == [[0, 2, 3, 5]] and once.groups.tolist() == [[0, 0, 1, 2, 0, 3]]
    want = torch.tensor([[10 / 3, 7 / 3, 2 / 3], [0, 2, 1], [-5, 1, 2], [-1, -3, 2]])
    torch.testing.assert_close(once.apply(X[None])[0], want)


def test_tome_card_in_blocks():
    out = ToMe().reduce(FakeBlock(0, 2, False, X[None], torch.ones(1, 6)), 2)
    assert out.kept.tolist() == [[2, 0, 3, 5]] and out.groups.tolist() == [[1, 1, 0, 2, 1, 3]]
    once = out.apply(X[None])
    torch.testing.assert_close(once[0], torch.tensor([[0, 2, 1], [10 / 3, 7 / 3, 2 / 3], [-5, 1, 2], [-1, -3, 2]]))
    again = ToMe().reduce(FakeBlock(1, 2, False, once, torch.tensor([[1.0, 3, 1, 1]])), 2)
    torch.testing.assert_close(again.apply(once)[0], torch.tensor([[2.5, 2.25, 0.75], [-3, -1, 2]]))
    _, sizes, _, _ = run_tower(ToMe(), X[None], False, 2, 2)
    assert sizes.tolist() == [[4, 2]]


def schedule(tokens, keep, blocks):
    steps = []
    for left in range(blocks, 0, -1):
        steps.append(share(tokens, keep, left))
        tokens -= steps[-1]
    return steps


def test_tome_schedule():
    for keep, average in ((192, 16.7), (128, 19.5), (64, 22.3)):
        steps = schedule(576, keep, 23)
        assert sum(steps) == 576 - keep and max(steps) - min(steps) == 1
        assert steps == sorted(steps, reverse=True) and sum(steps) / 23 == pytest.approx(average, abs=0.05)
    # AuroraCap merges a constant int(tokens * 0.8 / blocks); the exact schedule is that or one more.
    assert min(schedule(729, 146, 48)) == 12 and min(schedule(729, 146, 32)) == 18
    assert 729 - 47 * 12 == 165


# ---- what all must satisfy


def check(out, images, keep, at_most=False):
    n, N = len(images), images.count
    K = out.kept.shape[1]
    assert 1 <= K <= keep if at_most else keep == K
    assert out.kept.shape == (n, K) and out.kept.dtype == torch.int64
    assert (out.kept.diff(dim=1) > 0).all() and out.kept.min() >= 0 and out.kept.max() < N
    if out.groups is not None:
        assert out.groups.shape == (n, N)
        for groups, kept in zip(out.groups.tolist(), out.kept.tolist()):
            assert set(groups) == set(range(K))  # every token is merged somewhere, no output is empty
            assert [groups[i] for i in kept] == list(range(K))  # an output takes the slot of a token of its own


@pytest.mark.parametrize("method", ALL, ids=name)
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 5), (6, 2)])
def test_every_count_is_met(method, grid):
    images = some(*grid)
    for keep in range(1, images.count + 1):
        out = method.assign(images, keep)
        check(out, images, keep, method.at_most)
        if keep == images.count:
            assert not out.merges and out.kept.tolist() == [list(range(keep))] * 2


@pytest.mark.parametrize("method", ALL, ids=name)
def test_keeping_everything_asks_for_nothing(method):
    images = some(3, 4)
    method.assign(images, 12)
    assert images.asked == []


@pytest.mark.parametrize("method", ALL, ids=name)
def test_a_batch_decides_as_its_images_alone(method):
    images = some(6, 7, n=3)
    for keep in (1, 5, 20, 41):
        out = method.assign(images, keep)
        for i in range(3):
            alone = method.assign(images.one(i), keep)
            assert torch.equal(out.kept[i : i + 1], alone.kept)
            for a, b in ((out.groups, alone.groups), (out.weight, alone.weight)):
                assert (a is None) == (b is None) and (a is None or torch.equal(a[i : i + 1], b))


@pytest.mark.parametrize("method", CLS, ids=name)
def test_order_of_heads_does_not_matter(method):
    images = some(5, 6, heads=4)
    turned = FakeTokens(images.embeddings_, [r[:, [2, 0, 3, 1]] for r in images.rows], (5, 6))
    for keep in (3, 11, 29):
        assert torch.equal(method.assign(images, keep).kept, method.assign(turned, keep).kept)


def test_equal_scores_keep_the_lower_index():
    flat = FakeTokens(torch.ones(1, 6, 2), [torch.full((1, 2, 6), 1 / 7)] * 4, (2, 3))
    assert FasterVLM().assign(flat, 3).kept.tolist() == [[0, 1, 2]]
    assert VtcCls().assign(flat, 3).kept.tolist() == [[0, 1, 2]]
    assert VisionZip(contextual=0.25).assign(flat, 4).kept.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("method", ALL, ids=name)
def test_outputs_are_averages_or_tokens_and_carry_gradients(method):
    images = some(4, 6)
    out = method.assign(images, 9)
    x = torch.randn(2, 24, 5, requires_grad=True)
    y = out.apply(x)
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    if out.groups is None:
        assert torch.equal(y, x.gather(1, out.kept[..., None].expand(-1, -1, 5)))
    elif isinstance(method, VisionZip) and not method.average:
        norm = torch.ones(2, 24, 1)  # target + mean: a contextual token with company weighs two
        assert {round(v, 4) for v in out.apply(norm).unique().tolist()} == {1.0, 2.0}
    else:
        torch.testing.assert_close(out.apply(torch.ones(2, 24, 1)), torch.ones_like(y[..., :1]))


@pytest.mark.parametrize("method", ALL, ids=name)
def test_blocks_read(method):
    images = some(4, 6)
    method.assign(images, 9)
    asked = [a.split() for a in images.asked if " " in a]
    read = {Read("tower", int(back), "attention" if what == "cls" else what) for what, back in asked}
    assert read == method.reads(9)


def test_random_draws_per_image_and_leaves_the_generator_alone():
    images = some(6, 6, n=3)
    state = torch.get_rng_state()
    kept = RandomTokens(seed=4).assign(images, 10).kept
    assert torch.equal(state, torch.get_rng_state())
    assert len({tuple(row) for row in kept.tolist()}) == 3
    images.content = torch.tensor([5, 2, 0])
    assert torch.equal(RandomTokens(seed=4).assign(images, 10).kept[2], kept[0])
    assert not torch.equal(RandomTokens(seed=9).assign(images, 10).kept[2], kept[0])


def test_downsample_grids():
    best = Downsample().resize
    assert best((24, 24), 64) == (8, 8) and best((24, 24), 58) == (7, 8) and best((24, 24), 576) == (24, 24)
    assert best((12, 24), 72) == (6, 12) and best((12, 24), 1000) == (12, 24)
    assert best((24, 24), 1) == (1, 1) and best((1, 30), 7) == (1, 7) and best((30, 1), 7) == (7, 1)
    for h, w in ((5, 9), (13, 4), (1, 6)):
        last = 0
        for keep in range(1, h * w + 1):
            a, b = best((h, w), keep)
            assert 1 <= a <= h and 1 <= b <= w and last <= a * b <= keep
            last = a * b
        assert last == h * w


def test_downsample_pools_features():
    images = some(4, 6)
    out = Downsample().assign(images, 6)
    x = images.embeddings_
    want = torch.nn.functional.avg_pool2d(x.mT.reshape(2, 8, 4, 6), 2).flatten(2).mT
    wanted = Downsample().resize((4, 6), 6)
    assert wanted == (2, 3) and out.kept.tolist() == [[0, 2, 4, 12, 14, 16]] * 2
    torch.testing.assert_close(out.apply(x), want)


def test_avgpool_any_count_and_grid_refusal():
    images = some(4, 6)
    x = images.embeddings_
    torch.testing.assert_close(AvgPool().assign(images, 8).apply(x), x.reshape(2, 8, 3, 8).mean(2))
    assert cells(24, 24, 64) == (8, 8) and cells(24, 24, 192) == (12, 16) and cells(24, 24, 1) == (1, 1)
    assert cells(1, 30, 7) == (1, 7) and cells(30, 1, 7) == (7, 1) and cells(10, 40, 1) == (1, 1)
    for keep in (58, 57, 23, 14):
        with pytest.raises(ValueError, match=f"keep={keep} .*24 x 24.*grid=False"):
            cells(24, 24, keep)
    with pytest.raises(ValueError, match="grid=True"):
        AvgPool(grid=True).assign(images, 23)
    check(AvgPool(grid=True).assign(images, 12), images, 12)


def test_visionzip_small_counts_select():
    images = some(4, 6)
    assert not VisionZip().assign(images, 3).merges and VisionZip().assign(images, 4).merges
    assert torch.equal(VisionZip(contextual=0).assign(images, 9).kept, FasterVLM().assign(images, 9).kept)
    best = images.attention().sum(1).argmax(1, keepdim=True)
    assert (VisionZip(contextual=0.99).assign(images, 2).kept == best).any(1).all()  # one dominant token stays


def run_tower(method, hidden, has_cls, steps, keep):
    """What an engine does with `reduce`: apply, add sizes, compose the group map."""
    n, m, _ = hidden.shape
    x, sizes = hidden, torch.ones(n, m)
    mapped, first = torch.arange(m).expand(n, m), torch.arange(m).expand(n, m)
    for index in range(steps):
        out = method.reduce(FakeBlock(index, steps, has_cls, x, sizes), keep)
        if out is None:
            continue
        x = out.apply(x)
        sizes = torch.zeros(n, x.shape[1]).scatter_add(1, out.groups, sizes)
        mapped, first = out.groups.gather(1, mapped), first.gather(1, out.kept)
    return x, sizes, mapped, first


@pytest.mark.parametrize("has_cls", [False, True])
@pytest.mark.parametrize("tokens,steps", [(10, 4), (20, 3), (49, 6), (7, 1)])
def test_tome_reaches_every_count(has_cls, tokens, steps):
    hidden = torch.randn(2, tokens + has_cls, 5)
    for keep in range(1, tokens + 1):
        x, sizes, mapped, first = run_tower(ToMe(), hidden, has_cls, steps, keep)
        assert x.shape[1] == keep + has_cls and (sizes.sum(1) == tokens + has_cls).all()
        if has_cls:
            assert torch.equal(x[:, 0], hidden[:, 0]) and (sizes[:, 0] == 1).all()
        for k in range(x.shape[1]):  # size-weighted steps end in the plain mean over original tokens
            group = mapped[0] == k
            torch.testing.assert_close(x[0, k], hidden[0, group].mean(0))
            assert sizes[0, k] == group.sum() and mapped[0, first[0, k]] == k


def test_tome_leaves_a_block_without_work():
    block = FakeBlock(3, 5, True, torch.randn(1, 9, 4), torch.ones(1, 9))
    assert ToMe().reduce(block, 8) is None and ToMe().reduce(block, 7) is not None


def test_tome_where():
    assert ToMe().inside and ToMe(where="tower").inside and not ToMe(where="output").inside


def test_tome_weights_by_size():
    block = FakeBlock(0, 1, False, torch.tensor([[[1.0, 0], [1, 0], [0, 1]]]), torch.tensor([[3.0, 1, 1]]))
    out = ToMe().reduce(block, 2)
    assert out.groups.tolist() == [[1, 1, 0]] and out.weight.tolist() == [[0.75, 0.25, 1]]


def slow_tome(x, keep):
    """The authors' loop on the output, with lists of original members in the authors' order."""
    groups = [[i] for i in range(len(x))]
    while len(groups) > keep:
        r = min(len(groups) // 2, len(groups) - keep)
        unit = torch.nn.functional.normalize(torch.stack([x[g].mean(0) for g in groups]), dim=-1)
        sim = unit[::2] @ unit[1::2].T
        value, partner = sim.max(1)
        order = value.argsort(descending=True).tolist()
        odd = [list(g) for g in groups[1::2]]
        for a in order[:r]:
            odd[int(partner[a])] += groups[2 * a]
        groups = [groups[2 * a] for a in order[r:]] + odd
    return sorted(sorted(g) for g in groups)


def test_tome_on_the_output_against_loops():
    images = some(5, 5)
    for keep in range(1, 25):
        out = ToMe().assign(images, keep)
        for i in range(2):
            got = [(out.groups[i] == k).nonzero().flatten().tolist() for k in range(keep)]
            assert got == slow_tome(images.embeddings_[i], keep)
            want = torch.stack([images.embeddings_[i][g].mean(0) for g in got])
            torch.testing.assert_close(out.apply(images.embeddings_)[i], want)


# ---- registry and knobs


def test_registered():
    want = {
        "random": (RandomTokens, {"visual"}, {"seed": 0}),
        "uniform": (Uniform, {"visual"}, {"grid": True}),
        "downsample": (Downsample, {"visual"}, {}),
        "avgpool": (AvgPool, {"visual"}, {"grid": False}),
        "fastervlm": (FasterVLM, {"visual", "cls"}, {}),
        "vtc_cls": (VtcCls, {"visual", "cls"}, {"layers": 4}),
        "visionzip": (VisionZip, {"visual", "cls"}, {"contextual": 10 / 64, "average": False}),
        "divprune": (DivPrune, {"visual"}, {}),
        "tome": (ToMe, {"visual"}, {"where": "auto"}),
    }
    known = methods("vision")
    for key, (cls, needs, knobs) in want.items():
        spec = known[key]
        assert spec.cls is cls and spec.needs == needs and issubclass(cls, VisionMethod)
        assert {k: v for k, v in spec.knobs.items() if k != "positions"} == knobs
        assert spec.paper == "control" or spec.paper.startswith("arXiv:")
        assert 20 < len(spec.summary) < 100 and spec.summary.endswith(".")
    assert issubclass(ToMe, TowerMethod) and issubclass(Downsample, PixelMethod) and Downsample.at_most
    assert [reach(m, 9) for m in (VtcCls(), VtcCls(layers=2), FasterVLM(), ToMe())] == [4, 2, 1, 0]


@pytest.mark.parametrize("D", [64, 3])  # with fewer numbers than outputs per token, the other way is taken
def test_mixed_outputs_are_those_of_apply(D):
    """Groups of any size, tokens that vanish and outputs that stay as they are; images with more and fewer of them."""
    g = torch.Generator().manual_seed(0)
    kept = torch.stack([torch.randperm(30, generator=g)[:12].sort().values for _ in range(4)])
    groups = torch.full((4, 30), -1).scatter(1, kept, torch.arange(12).expand(4, -1))
    more = torch.randint(-1, 5, (4, 30), generator=g) * (torch.arange(4)[:, None] + 1).clamp(max=2)
    groups = torch.where(groups < 0, more.clamp(min=-1), groups)
    weight = torch.where(groups < 4, torch.rand(4, 30, generator=g), torch.ones(4, 30))
    assignment, x = Assignment(kept, groups, weight), torch.randn(4, 30, D, generator=g)
    mixed = assignment.mixed
    assert 0 < int(mixed.sum()) < mixed.numel() and len(set(mixed.sum(1).tolist())) > 1
    torch.testing.assert_close(mix(assignment, x, mixed), assignment.apply(x)[mixed])


@pytest.mark.parametrize(
    "cls,knob,bad",
    [
        (RandomTokens, "seed", -1),
        (RandomTokens, "seed", 0.5),
        (Uniform, "grid", 3),
        (AvgPool, "grid", "yes"),
        (VtcCls, "layers", 0),
        (VtcCls, "layers", True),
        (VisionZip, "contextual", 1.0),
        (VisionZip, "average", "true"),
        (ToMe, "where", "inside"),
        (ToMe, "positions", "new"),
        (VisionZip, "positions", None),
        (RandomTokens, "positions", "new"),
        (DivPrune, "positions", "new"),
    ],
)
def test_bad_knobs_are_refused(cls, knob, bad):
    with pytest.raises(ValueError, match=f"{knob}="):
        cls(**{knob: bad})
