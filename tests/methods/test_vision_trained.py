"""Trained selectors and encoders: worked checks, slow references, and that the order of a batch changes nothing."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_compress.methods.vision.lookupvit import Lookup
from hf_compress.methods.vision.sparseformer import Focus, first_boxes, moved, points, sampled
from hf_compress.methods.vision.sts import SuperTokens, affinity, weighted
from hf_compress.methods.vision.stvit import SemanticTokens
from hf_compress.tensors.cells import cells, maxima, means
from tests.invariants.reference import alone, batch_of, close, fresh, logits_of

CELLS = ("lookupvit", "sparseformer", "sts", "stvit")
GRIDS = [(1, 1, 1), (2, 4, 2), (6, 6, 9), (6, 6, 36), (5, 7, 11), (3, 8, 23), (24, 24, 64), (4, 6, 1)]


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


# -- in a model -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next"])
@pytest.mark.parametrize("method", CELLS)
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
    """On the text at the end."""
    out = torch.full_like(batch["input_ids"], -100)
    out[:, -2:] = batch["input_ids"][:, -2:]
    return out


@pytest.mark.parametrize(
    ("method", "knob", "value"),
    [("sts", "steps", 0), ("stvit", "blocks", 0), ("lookupvit", "blocks", 1.5), ("sparseformer", "repeats", 0),
     ("sparseformer", "points", 1)],
)  # fmt: skip
def test_knobs(method, knob, value):
    with pytest.raises(ValueError, match=f"{knob}={value}.*at least"):
        fresh("llava").compress(method, ratio=0.5, **{knob: value})
