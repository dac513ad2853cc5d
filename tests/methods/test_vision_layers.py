"""scm, lrs and explainability: the numbers of their cards, and slow references of what they decide."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_compress.budget import shares
from hf_compress.methods.vision.explainability import Explainability, Foresight, relevance, weighted
from hf_compress.methods.vision.lrs import LRS, above, shares_of
from hf_compress.methods.vision.scm import SCM
from hf_compress.tensors.regions import beside_whole
from tests import tiny
from tests.invariants.reference import batch_of, greedy, logits_of, shared
from tests.methods.test_vision_cards import TILES, WHOLE, FakeParts

VIEWS = [(4, 4), (2, 3), (3, 2), (1, 4), (2, 2)]  # the whole image, and four crops


class Looked(FakeParts):
    """Sequences of several parts from what rows of the prompt look at, (n, H, N)."""

    def __init__(self, heads, grids, boxes=(WHOLE,)):
        super().__init__(heads.mean(1)[..., None], heads, grids, boxes)

    def looked_at(self, layer, rows="last"):
        self.asked = layer, rows
        return self.logits


def maps(n, grids, seed):
    """Attention of three heads on all tokens, a part of what rows give away."""
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, sum(h * w for h, w in grids), generator=g).pow(3)


def best(score, among, count):
    """The `count` indices with the highest scores, found one by one."""
    left, out = list(among), []
    for _ in range(count):
        top = max(left, key=lambda i: (score[i], -i))
        left.remove(top)
        out.append(top)
    return sorted(out)


def starts(grids):
    at, out = 0, []
    for h, w in grids:
        out.append(range(at, at + h * w))
        at += h * w
    return out


# -- scm ---------------------------------------------------------------------------------------------------------------
def test_scm_card():
    """Two later rows; `looked_at` gives their mean."""
    rows = torch.tensor([[0.2, 0.1, 0.05, 0.4], [0.1, 0.3, 0.05, 0.2]])
    tokens = Looked(rows.mean(0)[None, None], [(2, 2)])
    assert SCM().assign(tokens, 2).kept.tolist() == [[1, 3]]
    assert tokens.asked == (1, "later")


@pytest.mark.parametrize("seed", range(4))
def test_scm_cuts_crops_alone(seed):
    heads = maps(3, VIEWS, seed)
    for keep in (16, 17, 25, 35):
        kept = SCM().assign(Looked(heads, VIEWS, [WHOLE, *TILES]), keep).kept
        for mine, row in zip(heads.mean(1).tolist(), kept.tolist()):
            assert row == [*range(16), *best(mine, range(16, len(mine)), keep - 16)]


def test_the_whole_image_is_never_cut():
    assert beside_whole([16, 6, 4], 20) == 4 and beside_whole([16, 6], 16) == 0
    for method in (SCM(), LRS()):
        with pytest.raises(ValueError, match=r"keep=15 of 36 tokens.*has 16.*ratio at most 0.5556"):
            method.assign(Looked(maps(1, VIEWS, 0), VIEWS, [WHOLE, *TILES]), 15)
    model, batch = shared("llava_next"), batch_of("llava_next")
    for method in ("scm", "lrs"):
        with model.compressed(method, keep=36):
            logits_of(model, batch)
            for sample in model.compression.last.visual_kept:
                assert all(row[:36] == list(range(36)) for row in sample)
        with model.compressed(method, keep=35), pytest.raises(ValueError, match="never cut"):
            logits_of(model, batch)


# -- lrs ---------------------------------------------------------------------------------------------------------------
CARD = torch.tensor([[0.05, 0.30, 0.02, 0.10, 0.01, 0.20, 0.15, 0.17]])


def test_lrs_card():
    """Row ends, which are newlines here and stay anyway, are left out."""
    tokens = Looked(CARD[None], [(2, 4)])
    assert LRS().assign(tokens, 2).kept.tolist() == [[1, 5]] and tokens.asked == (1, "last")
    assert LRS().assign(tokens, None).kept.tolist() == [[1, 3, 5, 6, 7]]
    low, high = CARD.quantile(0.05), CARD.quantile(0.95)
    assert [round(float(x), 4) for x in (low, high)] == [0.0135, 0.265]
    scaled = ((CARD.clamp(low, high) - low) / (high - low))[0].tolist()
    assert scaled == pytest.approx([0.145, 1, 0.026, 0.344, 0, 0.742, 0.543, 0.622], abs=5e-4)


def percentile(values, q):
    """Linear between the two nearest ranks."""
    ranked, at = sorted(values), q * (len(values) - 1)
    low = math.floor(at)
    return ranked[low] + (at - low) * (ranked[min(low + 1, len(ranked) - 1)] - ranked[low])


def fractions(heads, among):
    """Per token its share of what each head gives to `among`, mean over heads."""
    sums = [sum(float(head[i]) for i in among) for head in heads]
    return {i: sum(float(head[i]) / s for head, s in zip(heads, sums)) / len(sums) for i in among}


def marked(score, grid, boxes, count):
    """How many of the best `count` cells of the whole image have their centre in each box."""
    h, w = grid
    out = [0] * len(boxes)
    for i in best(score, range(h * w), count):
        y, x = (i // w + 0.5) / h, (i % w + 0.5) / w
        for k, (top, left, bottom, right) in enumerate(boxes):
            out[k] += top <= y < bottom and left <= x < right
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_lrs_is_the_loop(seed, share):
    heads, parts = maps(2, VIEWS, seed), starts(VIEWS)
    fine = range(16, 36)
    for keep in (16, 20, 30, None):
        answer = LRS(share=share).assign(Looked(heads, VIEWS, [WHOLE, *TILES]), keep)
        for b in range(2):
            coarse, local = fractions(heads[b], parts[0]), fractions(heads[b], fine)
            marks = marked(coarse, VIEWS[0], TILES, max(1, round(16 * share)))
            expected = list(parts[0])
            if keep is None:
                low, high = (percentile(list(local.values()), q) for q in (0.05, 0.95))
                for part, n in zip(parts[1:], marks):
                    expected += [i for i in part if n and (min(max(local[i], low), high) - low) / (high - low) > 0.2]
            else:
                for part, n in zip(parts[1:], shares(keep - 16, marks, [len(part) for part in parts[1:]])):
                    expected += best(local, part, n)
            valid = torch.ones_like(answer.kept[b]).bool() if answer.valid is None else answer.valid[b]
            assert answer.kept[b][valid].tolist() == sorted(expected)


def test_lrs_where_nothing_stands_out():
    """Equal scores say nothing: all stay; without rows that look, the first ones."""
    assert above(torch.full((1, 4), 0.25), 0.2).all()
    assert shares_of(torch.zeros(1, 2, 3)).tolist() == [[0, 0, 0]]
    assert LRS().assign(Looked(torch.zeros(1, 2, 4), [(2, 2)]), 2).kept.tolist() == [[0, 1]]


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
def test_lrs_decides_itself(name):
    model, batch = shared(name), batch_of(name)
    with model.compressed("lrs", "adaptive"):
        together, last = greedy(model, batch), model.compression.last
        for row in range(2):
            single = greedy(model, tiny.single(batch, row, name))
            assert model.compression.last.visual_kept == [last.visual_kept[row]]
            torch.testing.assert_close(single.logits[0], together.logits[row], atol=2e-4, rtol=0)
    counts = [n for sample in last.visual_left for n in sample]
    assert 0 < sum(counts) < sum(n for sample in last.visual_tokens for n in sample)


@pytest.mark.parametrize(
    ("knob", "why"),
    [
        ({"layer": -1}, "layer=-1 must be an integer of at least 0"),
        ({"share": 0}, "share=0 must be a number above 0 and at most 1"),
        ({"threshold": 2}, "threshold=2 must be a number of at least 0 and at most 1"),
    ],
)
def test_knobs(knob, why):
    with pytest.raises(ValueError, match=why):
        LRS(**knob)


def test_a_layer_that_is_not_there():
    with pytest.raises(ValueError, match=r"'lrs' reads Read.*of the layers 0 to 3 of"):
        shared("llava").compress("lrs", ratio=0.5, layer=4)


# -- explainability ----------------------------------------------------------------------------------------------------
def test_explainability_card():
    a, g = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]]), torch.tensor([[[1.0, -1, 2], [0.5, 1, -1]]])
    torch.testing.assert_close(weighted(a, g), torch.tensor([[0.5, 0, 0.4], [0.05, 0.6, 0]]))


@pytest.mark.parametrize("seed", range(3))
def test_relevance_is_the_product_of_the_layers(seed):
    """Written out with whole matrices."""
    rng = torch.Generator().manual_seed(seed)
    layers = [torch.rand(2, 5, 5, generator=rng).tril() for _ in range(3)]
    gradients = [torch.randn(2, 5, 5, generator=rng) for _ in range(3)]
    R = torch.eye(5)
    for a, grad in zip(layers, gradients):
        A = torch.zeros(5, 5)
        for i in range(5):
            for j in range(5):
                A[i, j] = sum(max(0.0, float(a[h, i, j] * grad[h, i, j])) for h in range(2)) / 2
        R = R + A @ R
    torch.testing.assert_close(relevance(layers, gradients, torch.tensor([3, 4])), (R[3] + R[4]) / 2)


def test_a_new_net_ranks_by_the_mean_over_heads():
    tokens = Looked(maps(2, [(3, 4)], 1), [(3, 4)])
    tokens.module = Foresight(3)
    kept = Explainability().assign(tokens, 5).kept.tolist()
    shares_ = tokens.logits / tokens.logits.mean(-1, keepdim=True)
    assert kept == [best(row, range(12), 5) for row in shares_.mean(1).tolist()]
    assert tokens.asked == (0, "text")
    scaled = Foresight(3)(tokens.logits * torch.tensor([1.0, 7.0])[:, None, None])
    torch.testing.assert_close(scaled, Foresight(3)(tokens.logits))


def test_the_net_is_five_separable_convolutions():
    """One written out: each head by itself, then mixed; zeros beyond both ends."""
    net = Foresight(3)
    kinds = [type(layer) for layer in net.layers]
    assert kinds == [*[nn.Conv1d, nn.Conv1d, nn.GELU] * 4, nn.Conv1d, nn.Conv1d]
    depthwise = [layer for layer in net.layers if isinstance(layer, nn.Conv1d)][::2]
    assert all(layer.groups == layer.in_channels and layer.kernel_size == (7,) for layer in depthwise)
    x = torch.randn(1, 3, 9)
    alone, mix = depthwise[0], net.layers[1]
    got = mix(alone(x))
    for channel in (0, 40):
        for at in (0, 4, 8):
            total = mix.bias[channel]
            for h in range(3):
                inside = sum(alone.weight[h, 0, k] * x[0, h, at + k - 3] for k in range(7) if 0 <= at + k - 3 < 9)
                total = total + mix.weight[channel, h, 0] * (inside + alone.bias[h])
            torch.testing.assert_close(got[0, channel, at], total)


def test_the_net_learns_what_it_is_taught():
    """Relevance that the mean over heads does not know: what one head alone says."""
    from recipes.explainability.train import fit

    torch.manual_seed(0)
    x = maps(64, [(4, 5)], 3)
    net, target = Foresight(3), x[:, 1] / x[:, 1].sum(1, keepdim=True)
    loss = lambda: nn.functional.kl_div(net(x).log_softmax(1), target, reduction="batchmean").item()
    before = loss()
    fit(net, x, x[:, 1], epochs=30)
    assert loss() < 0.5 * before


def test_what_was_trained_is_read_again(tmp_path):
    """Weights that rank otherwise than new ones do."""
    model, batch = tiny.build("llava"), batch_of("llava")
    model.compress("explainability", ratio=0.5)
    logits_of(model, batch)
    new = model.compression.last.visual_kept
    with torch.no_grad():
        for weight in model.compressor.parameters():
            weight.normal_()
    expected, kept = logits_of(model, batch), model.compression.last.visual_kept
    assert kept != new
    model.compression.save(tmp_path)
    model.decompress()
    model.compress("explainability", ratio=0.5, weights=tmp_path)
    assert torch.equal(logits_of(model, batch), expected) and model.compression.last.visual_kept == kept
