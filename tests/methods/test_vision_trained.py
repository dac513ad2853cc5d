"""Trained selectors and encoders: worked checks, slow references, and that the order of a batch changes nothing."""

import math
import re
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_compress import budget
from hf_compress.methods.base import TowerMethod
from hf_compress.methods.vision import ia_red2, tempme
from hf_compress.methods.vision.diffrate import Rates, ranked
from hf_compress.methods.vision.lookupvit import Lookup
from hf_compress.methods.vision.sparseformer import Focus, first_boxes, moved, points, sampled
from hf_compress.methods.vision.sts import SuperTokens, affinity, weighted
from hf_compress.methods.vision.stvit import SemanticTokens
from hf_compress.signals import Assignment
from hf_compress.tensors.cells import cells, maxima, means
from tests.invariants.reference import adapter_of, alone, batch_of, close, fresh, logits_of, shared
from tests.tiny import IMG
from tests.toy import registered

CELLS = ("lookupvit", "sparseformer", "sts", "stvit")
GRIDS = [(1, 1, 1), (2, 4, 2), (6, 6, 9), (6, 6, 36), (5, 7, 11), (3, 8, 23), (24, 24, 64), (4, 6, 1)]
GRIDS += [(20, 1, 3), (1, 20, 3), (20, 2, 4), (5, 2, 1)]  # far higher than wide: more rows than cells are asked for


def stir(module):
    """Weights that do something everywhere: at the start the last maps are zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return module


# -- cells ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("h", "w", "k"), GRIDS)
def test_cells_cover_the_grid(h, w, k):
    layout = cells(h, w, k)
    seen = torch.full((h, w), -1)
    for i, (top, left, bottom, right) in enumerate(layout.boxes.tolist()):
        assert top < bottom and left < right and (seen[top:bottom, left:right] == -1).all()
        seen[top:bottom, left:right] = i
        row, column = divmod(int(layout.centres[i]), w)
        assert (row, column) == ((top + bottom - 1) // 2, (left + right - 1) // 2)
        assert layout.sizes[i] == (bottom - top) * (right - left)
    assert torch.equal(seen.flatten(), layout.groups) and len(layout.boxes) == k
    assert (layout.centres.diff() > 0).all()
    for i in range(k):
        cell = (seen == i).nonzero()
        for j in range(k):
            far = (cell[:, None] - (seen == j).nonzero()[None]).abs().amax(-1).min()
            assert layout.near[i, j] == (far <= 1)


def test_cells_that_divide_the_grid_are_those_of_pooling():
    x = torch.randn(2, 24, 5)
    picture = x.mT.unflatten(-1, (4, 6))
    layout = cells(4, 6, 6)
    for pooled, ours in ((F.adaptive_max_pool2d, maxima), (F.adaptive_avg_pool2d, means)):
        torch.testing.assert_close(ours(x, layout), pooled(picture, (2, 3)).flatten(2).mT)


# -- sts --------------------------------------------------------------------------------------------------------------
def test_sts_card():
    x = torch.tensor([1.0, 1, 3, 3, 1, 1, 3, 3])[None, :, None]
    share = affinity(x, cells(2, 4, 2))
    expected = torch.tensor([[0.0912, 0.6739], [0.0025, 0.9967]])
    torch.testing.assert_close(share[0, [0, 2]], expected, atol=5e-5, rtol=0)
    s = weighted(share, x)
    torch.testing.assert_close(s.flatten(), torch.tensor([1.0527, 2.1932]), atol=5e-5, rtol=0)
    back = (share @ s).flatten()[[0, 2]]
    torch.testing.assert_close(back, torch.tensor([1.5741, 2.1885]), atol=5e-5, rtol=0)


@pytest.mark.parametrize(("h", "w", "kh", "kw", "steps"), [(6, 6, 3, 3, 1), (4, 8, 2, 4, 2), (4, 4, 4, 4, 1)])
def test_sts_token_by_token(h, w, kh, kw, steps):
    """Nine places per token in a loop, those outside of the grid with zeros."""
    x = torch.randn(h, w, 3)
    a, b = h // kh, w // kw
    s = x.view(kh, a, kw, b, 3).mean((1, 3))
    for _ in range(steps):
        total, mass, found = torch.zeros_like(s), torch.zeros(kh, kw), torch.zeros(h, w, kh, kw)
        for i in range(h):
            for j in range(w):
                around = [(i // a + di, j // b + dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)]
                inside = [0 <= p < kh and 0 <= q < kw for p, q in around]
                rows = [s[p, q] if ok else torch.zeros(3) for (p, q), ok in zip(around, inside)]
                share = (torch.stack(rows) @ x[i, j] / math.sqrt(3)).softmax(0)
                for (p, q), ok, much in zip(around, inside, share):
                    if ok:
                        found[i, j, p, q] = much
                        total[p, q] += much * x[i, j]
                        mass[p, q] += much
        s = total / mass[..., None]
    layout, flat = cells(h, w, kh * kw), x.view(1, -1, 3)
    share = affinity(flat, layout, steps)
    torch.testing.assert_close(share[0], found.view(h * w, -1))
    torch.testing.assert_close(weighted(share, flat)[0], s.view(-1, 3))


def test_sts_begins_without_attention():
    x, layout, module = torch.randn(2, 24, 8), cells(4, 6, 6), SuperTokens(8, 1)
    plain = weighted(affinity(module.norm(x), layout), x)
    torch.testing.assert_close(module(x, layout), plain)
    assert not torch.allclose(stir(module)(x, layout), plain)


# -- stvit, lookupvit -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("module", "pool"), [(SemanticTokens, F.adaptive_max_pool2d), (Lookup, F.adaptive_avg_pool2d)])
def test_begins_as_pooling_and_reads_the_whole_image(module, pool):
    x, layout, module = torch.randn(2, 24, 8), cells(4, 6, 6), module(8, 2)
    torch.testing.assert_close(module(x, layout), pool(x.mT.unflatten(-1, (4, 6)), (2, 3)).flatten(2).mT)
    stir(module)
    far = x.clone()
    far[0, -1, 0] += 3  # the last token changes the first output, and nothing of the other image
    change = (module(far, layout) - module(x, layout)).abs().amax(-1)
    assert change[0, 0] > 1e-4 and change[1].max() == 0


def test_stvit_by_hand():
    """Attention with its sums written out."""
    x, layout, module = torch.randn(1, 12, 8), cells(3, 4, 4), stir(SemanticTokens(8, 1))
    attention, mlp = module.attention[0], module.mlp[0]
    s = maxima(x, layout)[0]
    y, q = attention.norm(x)[0], attention.query(attention.norm(s))
    k, v = attention.key_value(y).chunk(2, -1)
    out = []
    for i in range(4):
        share = torch.stack([(q[i] * k[j]).sum() / math.sqrt(8) for j in range(12)]).exp()
        out.append(s[i] + attention.out((share[:, None] * v).sum(0) / share.sum()))
    s = torch.stack(out)
    expected = s + mlp.down(F.gelu(mlp.up(mlp.norm(s))))
    torch.testing.assert_close(module(x, layout)[0], expected)


def test_lookupvit_by_hand():
    """Two blocks, both directions from one product."""
    x, layout, module = torch.randn(1, 12, 8), cells(3, 4, 4), stir(Lookup(8, 2))
    few, many = means(x, layout)[0], x[0]
    for block in module.blocks:
        e = block.exchange
        logits = e.few(e.norm_few(few)) @ e.many(e.norm_many(many)).T / math.sqrt(8)
        few = few + e.out(logits.softmax(1) @ e.value(e.norm_many(many)))
        few = block.wide(block.attention(few[None])[0])
        if block.back is not None:
            many = block.back.narrow(many + block.back.out(logits.T.softmax(1) @ block.back.value(few)))
    torch.testing.assert_close(module(x, layout)[0], few)


# -- sparseformer -----------------------------------------------------------------------------------------------------
def test_sparseformer_card():
    box, change = torch.tensor([0, 0, 0.5, 0.5]), torch.tensor([0.1, -0.2, math.log(2), 0])
    box = moved(box, change)
    torch.testing.assert_close(box, torch.tensor([-0.2, -0.1, 0.8, 0.4]))
    offsets = torch.tensor([[x, y] for x in (-0.25, 0.25) for y in (-0.25, 0.25)])
    at = points(box, offsets)
    torch.testing.assert_close(at[:, 0].unique(), torch.tensor([0.0113, 0.5887]), atol=5e-5, rtol=0)
    torch.testing.assert_close(at[:, 1].unique(), torch.tensor([0.0057, 0.2943]), atol=5e-5, rtol=0)


def test_sparseformer_samples_between_cells():
    """Middles of cells are the cells, between two it is their mean, and the border goes on."""
    picture = torch.randn(1, 3, 2, 4)
    at = torch.tensor([[0.125, 0.25], [0.25, 0.25], [0.875, 0.5], [-3.0, 5.0]]).view(1, 1, 4, 2)
    p = picture[0]
    expected = [p[:, 0, 0], (p[:, 0, 0] + p[:, 0, 1]) / 2, (p[:, 0, 3] + p[:, 1, 3]) / 2, p[:, 1, 0]]
    torch.testing.assert_close(sampled(picture, at)[0, 0], torch.stack(expected))


def test_sparseformer_first_boxes():
    box = first_boxes(cells(4, 8, 2))
    torch.testing.assert_close(box, torch.tensor([[0, 0.25, 0.5, 0.75], [0.5, 0.25, 1, 0.75]]))


def test_sparseformer_begins_with_tokens_and_learns_to_look():
    """Only the last map stands between the start and all the rest; boxes move with the image."""
    x, layout, module = torch.randn(2, 24, 8), cells(4, 6, 6), Focus(8, 2, 4)
    torch.testing.assert_close(module(x, layout), x[:, layout.centres])
    stir(module)(x, layout).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


# -- modules inside the tower -----------------------------------------------------------------------------------------
class Push(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.by = nn.Parameter(torch.randn(width))


@dataclass
class Pushes(TowerMethod):
    """Every block drops its last patch, the last one all but K, and adds a trained vector to the others."""

    def tower_module(self, width, blocks):
        return Push(width)

    def reduce(self, block, keep):
        n, m = block.hidden.shape[:2]
        count = keep + block.has_cls if block.index == block.steps - 1 else m - 1
        return Assignment(torch.arange(count).expand(n, -1))

    def add(self, block, keep, answer):
        block.losses.append(block.module.by.sum() * block.index)
        return block.module.by.expand(*answer.kept.shape, -1)


@pytest.mark.parametrize("name", ["llava", "paligemma", "qwen2_vl", "qwen2_5_vl"])
def test_what_is_added_inside_the_tower_is_a_bias_of_its_attention(name):
    """The vector on the output of the attention of every block that acts; its gradient that of these biases."""
    model, batch, adapter = fresh(name), batch_of(name), adapter_of(name)
    labelled = dict(batch, labels=labels(batch))
    with registered(Pushes):
        model.compress("pushes", ratio=0.5)
        out = model(**labelled)
        out.loss.backward()
        by, blocks = model.compressor.vision.by.detach().clone(), adapter.tower_blocks(model)
        steps = len(blocks)
        grad = model.compressor.vision.by.grad - sum(range(steps))  # what the losses of the blocks add
        with torch.no_grad():
            model.compressor.vision.by.zero_()
            biases = [getattr(b.attention, "out_proj", getattr(b.attention, "proj", None)).bias for b in blocks]
            for bias in biases:
                bias.add_(by)
        model.zero_grad()
        moved = model(**labelled)
        moved.loss.backward()
    close(moved.logits, out.logits)
    torch.testing.assert_close(out.loss - moved.loss, by.sum() * sum(range(steps)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grad, sum(bias.grad for bias in biases), atol=1e-4, rtol=1e-3)


def test_what_is_added_is_checked():
    class Short(Pushes):
        """One too few."""

        def add(self, block, keep, answer):
            return super().add(block, keep, answer)[:, 1:]

    wrong = pytest.raises(ValueError, match=r"'short' adds vectors of shape .*\(n, K, D\)")
    with registered(Short), shared("llava").compressed("short", 0.5) as model, wrong:
        model(**batch_of("llava"))


# -- diffrate ---------------------------------------------------------------------------------------------------------
def test_diffrate_card():
    """[CLS] and F6: two pruned, 5 merges into 0, 3 into 4; in the order of the ranks."""
    x = torch.tensor([[5.0, 5, 5], [3, 0, 1], [4, 3, 0], [0, 2, 1], [-5, 1, 2], [3, 4, 1], [-1, -3, 2]])
    a = torch.tensor([0.30, 0.25, 0.05, 0.08, 0.20, 0.12])
    order = F.pad(a.argsort(descending=True) + 1, (1, 0))
    assert order[:6].tolist() == [0, 1, 2, 5, 6, 4]
    answer = ranked(x[None], order[None], 6, 4, 1)
    expected = torch.tensor([[5.0, 5, 5], [1, -1.5, 1.5], [4, 3, 0], [-1, 2.5, 1.5]])
    torch.testing.assert_close(answer.apply(x[None])[0], expected)


@pytest.mark.parametrize("skip", [0, 1])
def test_diffrate_step_by_loop(skip):
    for m, left, stay in ((9, 7, 4), (9, 9, 8), (6, 3, 3)):
        x, order = torch.randn(m, 5), torch.cat([torch.arange(skip), torch.randperm(m - skip) + skip])
        groups = [[int(i)] for i in order[:stay]]
        for i in order[stay:left]:
            likeness = [F.cosine_similarity(x[i], x[g[0]], dim=0) for g in groups[skip:]]
            groups[skip + int(torch.stack(likeness).argmax())].append(int(i))
        answer = ranked(x[None], order[None], left, stay, skip)
        torch.testing.assert_close(answer.apply(x[None])[0], torch.stack([x[g].mean(0) for g in groups]))


@pytest.mark.parametrize("blocks", [1, 2, 3, 11, 23])
def test_diffrate_begins_linear(blocks):
    module = Rates(blocks, 16)
    left = torch.cat([module.shares(i, blocks)[0][None] for i in range(blocks)]).cumprod(0)
    torch.testing.assert_close(left, 1 - torch.arange(1, blocks + 1) / blocks)
    torch.testing.assert_close(module.cost(blocks), torch.tensor((blocks - 1) / (2 * blocks)))
    assert all(module.shares(i, blocks)[1].item() == pytest.approx(0.5) for i in range(blocks))


def test_diffrate_survival_is_the_probability_of_the_counts():
    module = stir(Rates(4, 5))
    p, q = module.stay_logits[1].softmax(0), module.prune_logits[1].softmax(0)
    counts = [2 + 10 * s for s in torch.linspace(1 / 3, 1, 5)]  # a surplus of 10 beyond 2; 2 of 3 shares go on
    lives, merges = module.survival(1, 4, 12, 2, 9)
    for j in range(9):
        expected = sum(chance for chance, count in zip(p, counts) if count > j + 1e-5)
        assert float(lives[j]) == pytest.approx(float(expected), abs=1e-6)
    assert float(merges) == pytest.approx(1 - sum(i / 4 * float(x) for i, x in enumerate(q)))


def counts_of(model, batch):
    """Tokens behind every block that reduced, of the first crop."""
    seen, method = [], model.compression.context.vision_method
    original = method.reduce

    def noted(block, keep):
        answer = original(block, keep)
        seen.append(block.hidden.shape[1] if answer is None else answer.kept.shape[1])
        return answer

    method.reduce = noted
    try:
        model(**batch)
    finally:
        del method.reduce
    return seen


def test_diffrate_learns_to_be_cheap():
    """Cost alone moves the counts: fewer tokens behind the first steps, K behind the last one in any case."""
    model, batch = fresh("llava"), batch_of("llava", "equal")
    model.compress("diffrate", ratio=0.75, cost=0.1, price=100.0)
    before = counts_of(model, batch)
    optimizer = torch.optim.Adam(model.compressor.parameters(), lr=0.3)
    for _ in range(20):
        model.train()
        optimizer.zero_grad()
        model(**batch, labels=labels(batch)).loss.backward()
        optimizer.step()
    after = counts_of(model.eval(), batch)
    assert before[-1] == after[-1] and before[0] == after[0] and after[1] < before[1]
    assert model.compressor.vision.prune_logits.grad.any()  # by the task


# -- ia_red2 ----------------------------------------------------------------------------------------------------------
def test_ia_red2_interpreter_by_loop():
    x, whole, module = torch.randn(2, 5, 6), torch.randn(2, 1, 6), ia_red2.Interpreters(6, 2)
    p = module(1, x, whole)
    for i in range(2):
        for j in range(5):
            a, b = module.token[1](module.norm[1](x[i, j])), module.whole[1](module.norm[1](whole[i, 0]))
            torch.testing.assert_close(p[i, j], 1 / (1 + (-(a * b).sum() / 8).exp()))


def test_ia_red2_counts():
    """Each group keeps the same part, the last one K."""
    left, counts = 576, []
    for groups in (3, 2, 1):
        left = ia_red2.share(left, 72, groups)
        counts.append(left)
    assert counts == [288, 144, 72]


def test_ia_red2_keeps_who_is_sure():
    p = torch.tensor([[0.6, 0.4, 0.5, 0.1], [0.1, 0.2, 0.4, 0.3]])
    answer = ia_red2.chosen(p, None, True)
    assert answer.stays(5).tolist() == [[True, True, False, True, False], [True, False, False, True, False]]
    assert ia_red2.chosen(p, 2, True).kept.tolist() == [[0, 1, 3], [0, 3, 4]]


@pytest.mark.parametrize("where", ["tower", "output"])
def test_ia_red2_adaptive_learns(where):
    model, batch = fresh("llava"), batch_of("llava")
    model.compress("ia_red2", ratio="adaptive", where=where)
    stir(model.compressor)
    whole = logits_of(model, batch)
    for row in range(2):
        close(whole[row, -1], logits_of(model, alone("llava", batch, row))[0, -1])
    model(**batch, labels=labels(batch)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.compressor.parameters())
    assert any(p.grad.any() for p in model.compressor.parameters())


# -- tempme -----------------------------------------------------------------------------------------------------------
def test_tempme_card():
    """Tokens per clip, [CLS] counted: ViT-B/32 and ViT-B/16, 12 frames."""
    found = {}
    for tokens in (50, 197):
        steps = tempme.published([tokens] * 12, (2, 2, 3), 0.3, 0.1, cls=1)
        found[tokens] = [(len(counts), counts[0]) for _, counts in steps]
    assert [found[50][i] for i in (0, 2, 4, 6, 7)] == [(12, 34), (6, 44), (3, 56), (1, 107), (1, 97)]
    assert found[197][-1] == (1, 493)


@dataclass
class Shown:
    """What `assign` and `make` look at."""

    embeddings: torch.Tensor
    grids: list
    module: nn.Module | None = None
    device = torch.device("cpu")

    def __len__(self):
        return len(self.embeddings)

    @property
    def count(self):
        return self.embeddings.shape[1]


def bipartite_by_loop(x, sizes, keep):
    """Lists of members of what is left of the tokens x (m, D): even places propose, the strongest merge."""
    left = [[i] for i in range(len(x))]
    while len(left) > keep:
        weight = [sum(float(sizes[i]) for i in g) for g in left]
        mean = [sum(float(sizes[i]) * x[i] for i in g) / w for g, w in zip(left, weight)]
        edges = []
        for i in range(0, len(left), 2):
            likeness = [F.cosine_similarity(mean[i], mean[j], dim=0).item() for j in range(1, len(left), 2)]
            j = max(range(len(likeness)), key=likeness.__getitem__)
            edges.append((likeness[j], i, 2 * j + 1))
        edges.sort(reverse=True)
        gone = edges[: min(len(left) // 2, len(left) - keep)]
        for _, i, j in gone:
            left[j] = left[j] + left[i]
        rest = [left[i] for _, i, _ in edges[len(gone) :]]
        left = rest + left[1::2]
    return left


@pytest.mark.parametrize(("frames", "keep", "joins"), [(4, 14, (2, 2)), (5, 9, (2, 2, 3)), (1, 4, (2,)), (6, 2, (2,))])
def test_tempme_clip_by_clip(frames, keep, joins):
    x = torch.randn(1, frames * 9, 5)
    answer = tempme.TempMe(joins=joins).assign(Shown(x, [(3, 3)] * frames), keep)
    assert answer.kept.shape == (1, keep)
    clips, N = [[[i] for i in range(9 * t, 9 * t + 9)] for t in range(frames)], 9 * frames
    steps = tempme.published([9] * frames, joins, 0.3, 0.1)
    for (join, _), total in zip(steps, tempme.totals(N, [sum(c) for _, c in steps], keep)):
        join = join if total >= len(clips) else len(clips)
        clips = [[g for c in clips[i : i + join] for g in c] for i in range(0, len(clips), join)]
        room = [len(c) - 1 for c in clips]
        left = budget.shares(total - len(clips), [float(len(c)) for c in clips], room)
        for k, (clip, n) in enumerate(zip(clips, left)):
            means, sizes = torch.stack([x[0, g].mean(0) for g in clip]), [len(g) for g in clip]
            clips[k] = [[t for i in g for t in clip[i]] for g in bipartite_by_loop(means, sizes, n + 1)]
    expected = sorted(sorted(g) for clip in clips for g in clip)
    found = [(answer.groups[0] == k).nonzero().flatten().tolist() for k in range(keep)]
    assert found == expected and answer.kept[0].tolist() == [g[0] for g in expected]


@pytest.mark.parametrize("frames", [1, 2, 7, 12])
def test_tempme_keeps_what_is_asked(frames):
    x = Shown(torch.randn(2, frames * 4, 5), [(2, 2)] * frames)
    for keep in range(1, 4 * frames):
        answer = tempme.TempMe().assign(x, keep)
        assert answer.kept.shape == (2, keep) and (answer.kept.diff(dim=1) > 0).all()
        assert sorted(set(answer.groups[0].tolist())) == list(range(keep))


def test_tempme_frames_learn():
    """The vectors are stretched over the frames, and every output has the mean of its frames'."""
    module = stir(tempme.Frames(2, 5))
    shown = Shown(torch.randn(1, 16, 5), [(2, 2)] * 4, module)
    method = tempme.TempMe(frames=2)
    answer = method.assign(shown, 6)
    a, b = module.vectors
    vectors = torch.stack([a, 0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b, b]).repeat_interleave(4, 0)
    out = method.make(shown, answer)
    for k in range(6):
        mine = answer.groups[0] == k
        torch.testing.assert_close(out[0, k], (shown.embeddings[0] + vectors)[mine].mean(0))
    out.sum().backward()
    assert module.vectors.grad.all()


# -- in a model -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next"])
@pytest.mark.parametrize("method", [*CELLS, "ia_red2"])
def test_trained_weights_decide_each_image_alone(method, name):
    """Weights that do something: each sample of a ragged batch as alone, and every parameter learns."""
    model, batch = fresh(name), batch_of(name)
    model.compress(method, ratio=0.5)
    stir(model.compressor)
    whole = logits_of(model, batch)
    for row in range(2):
        sample = alone(name, batch, row)
        close(whole[row, -1], logits_of(model, sample)[0, -1])
    before = whole[:, -1].clone()
    stir(model.compressor)
    assert not torch.allclose(logits_of(model, batch)[:, -1], before, atol=1e-3)
    model(**batch, labels=labels(batch)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.compressor.parameters())


def labels(batch):
    """On the text: neither on images nor on padding, nor where nothing predicts."""
    mask = batch["attention_mask"]
    hidden = (batch["input_ids"] == IMG) | (mask == 0) | (mask.cumsum(1) == 1)
    return batch["input_ids"].masked_fill(hidden, -100)


KNOBS = [
    ("diffrate", "candidates", 1), ("diffrate", "price", -1), ("diffrate", "cost", -0.5), ("ia_red2", "groups", 0),
    ("ia_red2", "price", -1), ("sts", "steps", 0), ("stvit", "blocks", 0), ("lookupvit", "blocks", 1.5),
    ("sparseformer", "repeats", 0), ("sparseformer", "points", 1),
    ("tempme", "frames", 0), ("tempme", "across", -0.1), ("tempme", "inside", -1), ("tempme", "joins", 1),
]  # fmt: skip


@pytest.mark.parametrize(("method", "knob", "value"), KNOBS)
def test_knobs(method, knob, value):
    with pytest.raises(ValueError, match=rf"{knob}={re.escape(str(value))}.*at least"):
        fresh("llava").compress(method, ratio=0.5, **{knob: value})
