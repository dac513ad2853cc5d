"""Decoder methods that merge: numbers of their cards, and the language model with rows merged by hand."""

import functools
import math
from fractions import Fraction

import pytest
import torch

from hf_compress.methods.decoder.holitom_inner import HoliTomInner
from hf_compress.methods.decoder.llavolta import LLaVolta
from hf_compress.methods.decoder.sparsevlm import PUBLISHED, SparseVLM, raters
from hf_compress.methods.recycling import _clusters
from hf_compress.signals import Assignment
from hf_compress.tensors.cluster import density_peaks
from hf_compress.tensors.merge import pool1d
from tests.invariants.language import FullLength, bare, embed
from tests.invariants.reference import batch_of, close, greedy, logits_of, shared


# -- clusters ---------------------------------------------------------------------------------------------------------
def test_density_peaks_of_the_card():
    x = torch.tensor([[(0, 0), (0, 0.4), (0.5, 0), (2, 2), (2, 2.3), (3, 0)]])
    centres, groups = density_peaks(x, 2, 3)
    assert centres.tolist() == [[0, 3]] and groups.tolist() == [[0, 0, 0, 1, 1, 1]]
    means = Assignment.owned(centres.gather(1, groups)).apply(x)
    torch.testing.assert_close(means, torch.tensor([[[0.1667, 0.1333], [2.3333, 1.4333]]]), atol=1e-4, rtol=0)


def peaks_by_hand(x, count, neighbours):
    n = len(x)
    dist = [[math.dist(a, b) / math.sqrt(len(a)) for b in x] for a in x]
    near = [sorted(row)[:neighbours] for row in dist]
    density = [math.exp(-sum(d * d for d in row) / len(row)) for row in near]
    rank = sorted(range(n), key=lambda i: (-density[i], i))
    reach = [min((dist[i][j] for j in rank[: rank.index(i)]), default=max(map(max, dist))) for i in range(n)]
    centres = sorted(sorted(range(n), key=lambda i: (-density[i] * reach[i], i))[:count])
    return centres, [
        centres.index(i) if i in centres else min(range(count), key=lambda c: dist[i][centres[c]]) for i in range(n)
    ]


def test_density_peaks_by_hand():
    g = torch.Generator().manual_seed(0)
    for n, d, count, k in ((1, 3, 1, 1), (5, 2, 5, 2), (12, 4, 3, 3), (20, 6, 4, 40), (9, 1, 2, 1)):
        x = torch.randn(3, n, d, generator=g, dtype=torch.float32)
        centres, groups = density_peaks(x, count, k)
        for i, rows in enumerate(x.tolist()):
            assert (centres[i].tolist(), groups[i].tolist()) == peaks_by_hand(rows, count, k)


def test_owners():
    """Rows that stay keep their order, ragged samples are filled up at the left."""
    owner = torch.tensor([[0, 0, 2, -1, 4], [1, 1, 1, 4, 4]])
    x = torch.arange(10.0).view(2, 5, 1)
    got = Assignment.owned(owner)
    assert got.kept[0].tolist() == [0, 2, 4] and got.kept[1, 1:].tolist() == [1, 4]
    assert got.valid.tolist() == [[True] * 3, [False, True, True]]
    assert got.apply(x)[..., 0].tolist()[0] == [0.5, 2, 4] and got.apply(x)[1, 1:, 0].tolist() == [6, 8.5]


# -- holitom_inner ----------------------------------------------------------------------------------------------------
class Rows:
    """The rows that enter a layer: states (B, S, D), score (B, S), visual places."""

    def __init__(self, hidden, score, visual):
        self.hidden, self.layer, self.memory = hidden, 2, {}
        self.removable = self.visual = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        self.visual[:, visual] = True
        self.valid, self.prompt = torch.ones_like(self.visual), torch.ones_like(self.visual)
        self.speaks = torch.zeros_like(self.visual)
        self.speaks[:, -1] = True
        self.image = torch.where(self.visual, 0, -1)
        self.first = torch.arange(hidden.shape[1]).expand(self.visual.shape)
        self.last = self.first.flip(1)
        self.score = torch.as_tensor(score)

    def attention(self, *, source, voters=None):
        return self.score


CARD = torch.tensor([[(1.0, 0), (0, 1), (3, 1), (1, 3), (5, 0), (9, 9)]])


def test_halving_of_the_card():
    """Kept (1,0) (0,1); (3,1) (1,3) (5,0) dropped in this order: (3.5, .25) and (.5, 2)."""
    rows = Rows(CARD, [[0.9, 0.8, 0.1, 0.1, 0.1, 0.0]], range(5))
    got = HoliTomInner().decide(rows, [2]).apply(CARD)[0]
    torch.testing.assert_close(got, torch.tensor([(3.5, 0.25), (0.5, 2), (9, 9)]))
    mean = HoliTomInner(merge="mean").decide(rows, [2]).apply(CARD)[0]
    torch.testing.assert_close(mean, torch.tensor([(3, 1 / 3), (0.5, 2), (9, 9)]))


def halved(x, stays, gone):
    """Rows (S, D) of one sample after the loop of the release."""
    out = x.clone()
    for i in gone:
        near = [float(torch.cosine_similarity(x[i], x[j], dim=0)) for j in stays]
        j = stays[near.index(max(near))]
        out[j] = (out[j] + x[i]) / 2
    return out


def test_halving_is_the_loop_of_the_release():
    g = torch.Generator().manual_seed(0)
    for n, keep in ((4, 1), (9, 3), (16, 15), (12, 5), (30, 2)):
        x, score = torch.randn(2, n + 3, 6, generator=g), torch.rand(2, n + 3, generator=g)
        answer = HoliTomInner().decide(Rows(x, score, range(1, n + 1)), [keep, keep])
        for b, got in enumerate(answer.apply(x)):
            order = sorted(range(1, n + 1), key=lambda i: -float(score[b, i]))
            stays, gone = sorted(order[:keep]), sorted(order[keep:])
            whole = [0, *stays, n + 1, n + 2]
            assert answer.kept[b].tolist() == whole
            torch.testing.assert_close(got, halved(x[b], stays, gone)[whole])


def merged_by_hand(name, batch, tokens, kept, put):
    """(B, L, V) logits of the bare model, columns hidden as `kept` says.

    Args:
        put: {layer: function of its input (B, L, D) and the map (B, H, L, L) of the layer before it}.
    """
    full, layers, maps, hooks = FullLength(name, batch, tokens), bare(name).get_decoder().layers, {}, []
    for layer, change in put.items():
        note = lambda _, args, out, layer=layer: maps.update({layer: out[1]})
        enter = lambda _, args, layer=layer, change=change: (change(args[0].clone(), maps[layer]), *args[1:])
        hooks.append(layers[layer - 1].self_attn.register_forward_hook(note))
        hooks.append(layers[layer].register_forward_pre_hook(enter))
    try:
        return full.run(full.survivors(kept))[0]
    finally:
        for hook in hooks:
            hook.remove()


def compare(method, knobs, name, side, put_of):
    """Prefill and decode steps (generated where padding is at the left) against the language model merged by hand."""
    model, batch = shared(name), batch_of(name, side=side)
    with model.compressed(method, **knobs), torch.no_grad():
        if side == "left":
            run = greedy(model, batch)
            tokens, got = run.tokens, run.logits
        else:
            tokens, got = batch["input_ids"][:, :1], logits_of(model, batch)
        kept = model.compression.last.layer_index
    assert sum(map(len, kept[-1])) < sum(map(len, kept[0]))
    with torch.no_grad():
        expected = merged_by_hand(name, batch, tokens, kept, put_of(batch, tokens, kept))
    if side == "left":
        assert tokens.shape[1] > 4
        close(got, expected[:, batch["input_ids"].shape[1] - 1 :])
        return
    for b, rows in enumerate(kept[-1]):
        close(got[b, rows], expected[b, rows])


ARCHITECTURES = ["llava", "qwen2_5_vl", "llava_window", "internvl", "idefics3"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_holitom_inner_on_models(name, side):
    def put_of(batch, tokens, kept):
        full = FullLength(name, batch, tokens)

        def put(x, _):
            for b in range(len(x)):
                visual = [i for image in full.visual(b) for i in image]
                stays = [i for i in visual if i in kept[2][b]]
                x[b] = halved(x[b], stays, [i for i in visual if i not in stays])
            return x

        return {2: put}

    compare("holitom_inner", dict(ratio=0.3, layer=2), name, side, put_of)


# -- sparsevlm --------------------------------------------------------------------------------------------------------
def test_raters_of_the_card():
    """r = [.4995 .1592 .3413], mean .3333: the first and the last token rate."""
    assert raters(torch.eye(2), torch.tensor([(2.0, 0), (0, 0), (0, 1)])).tolist() == [True, False, True]
    assert raters(torch.eye(2), torch.zeros(3, 2)).tolist() == [True] * 3


def test_recycled_of_the_card():
    """576 to 300: 276 dropped, 83 of them form 9 clusters, 309 in all."""
    assert _clusters(576, 309, 0.3) == 9
    assert _clusters(576, 309, 0) == 0 == _clusters(5, 5, 0.3)


def test_clusters_fill_what_rows_leave():
    for rows in range(2, 200, 7):
        for keep in range(1, rows):
            count = _clusters(rows, keep, 0.3)
            dropped = rows - keep + count
            assert 0 <= count < keep or keep == 1
            assert count in (0, (int(0.3 * dropped) + 1) // 10 + 1)
            assert count or keep <= 2 or rows > 10 * keep, (rows, keep)


@pytest.mark.parametrize("counts", PUBLISHED)
def test_published_counts(counts):
    mean = Fraction(3 * 576 + 4 * counts[0] + 9 * counts[1] + 16 * counts[2], 32)
    assert SparseVLM().plan(32, 576, 1 - mean / 576) == dict(zip((3, 7, 16), counts))


def test_two_cuts_take_the_counts_of_the_last_ones():
    mean = Fraction(7 * 576 + 9 * 117 + 16 * 39, 32)
    assert SparseVLM(layers=(7, 16)).plan(32, 576, 1 - mean / 576) == {7: 117, 16: 39}


@pytest.mark.parametrize("layers", [4, 6, 28, 32])
@pytest.mark.parametrize("ratio", [0, 0.2, 0.5, 0.65])
def test_sparsevlm_meets_the_ratio(layers, ratio):
    method, ratio = SparseVLM(), Fraction(str(ratio))
    plan = method.plan(layers, 1000, ratio)
    left, total = 1000, 0
    for layer in range(layers):
        left = plan.get(layer, left)
        total += left
    assert abs(1 - Fraction(total, 1000 * layers) - ratio) <= Fraction(1, 1000)
    with pytest.raises(ValueError, match="reachable is"):
        method.plan(layers, 1000, Fraction(99, 100))


def recycling(layers, kept, visual, votes, prompt, done, first=None):
    """What `merged_by_hand` puts before the layers: of what goes behind the `first` cut a part returns in clusters.

    Args:
        kept: rows of every layer and sample; visual: rows of every sample; votes: of every sample, the rows that rank.
        prompt: its length; done: a list that the layers are added to in which rows were clustered.
    """

    def merge(layer, x, maps):
        for b, mine in enumerate(visual):
            alive, left = sorted(mine & set(kept[layer - 1][b])), mine & set(kept[layer][b])
            score = maps[b][:, votes[b]].mean((0, 1))
            if prompt - 1 in mine:  # the answer is predicted from it
                score[prompt - 1] = math.inf
            order = sorted(alive, key=lambda i: (-float(score[i]), i))
            n = next((n for n in range(len(left), 0, -1) if recycled(len(alive), n) == len(left)), None)
            if len(left) == len(alive) or n is None or layer == first:
                assert left == set(order[: len(left)])
                continue
            done.append(layer)
            some = sorted(order[n : n + int(0.3 * (len(alive) - n)) + 1])
            centres, groups = peaks_by_hand(x[b, some].tolist(), len(left) - n, len(left) - n)
            assert left == {*order[:n], *(some[c] for c in centres)}
            means = [x[b, [i for i, g in zip(some, groups) if g == c]].mean(0) for c in range(len(centres))]
            for centre, mean in zip(centres, means):
                x[b, some[centre]] = mean
        return x

    return {layer: functools.partial(merge, layer) for layer in layers}


def asking(full, visual, prompt):
    """Of every sample the rows of text behind its last image, or the last row."""
    return [
        [i for i in range(prompt) if full.valid[b, i] and i > max(mine)] or [prompt - 1]
        for b, mine in enumerate(visual)
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sparsevlm_on_models(name, side):
    """Which rows vote, which are recycled and what becomes of them, from embeddings and maps of the bare model."""

    def put_of(batch, tokens, kept):
        full, x0, prompt = FullLength(name, batch, tokens), embed(name, batch), batch["input_ids"].shape[1]
        visual = [{i for image in full.visual(b) for i in image} for b in range(2)]
        votes = []
        for b, asks in enumerate(asking(full, visual, prompt)):
            share = (x0[b, sorted(visual[b])] @ x0[b, asks].T).softmax(-1).mean(0)
            votes.append([i for i, s in zip(asks, share) if s > share.mean()] or asks)
        return recycling((1, 2, 3), kept, visual, votes, prompt, merged)

    merged = []
    compare("sparsevlm", dict(ratio=0.4), name, side, put_of)
    assert merged


def recycled(rows, n):
    return n + int((int(0.3 * (rows - n)) + 1) / 10) + 1


@pytest.mark.parametrize("knobs", [dict(recycled=1), dict(layers=(3, 2, 1)), dict(layers=(1, 2, 3, 4)), dict(layers=2)])
def test_bad_knobs_of_sparsevlm(knobs):
    with pytest.raises(ValueError, match=f"{next(iter(knobs))}="):
        SparseVLM(**knobs)


# -- llavolta ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_llavolta_on_models(name, side):
    """Windows of each image in raster order, the mean of each at the place of its middle row."""

    def put_of(batch, tokens, kept):
        full = FullLength(name, batch, tokens)

        def put(x, _):
            for b in range(len(x)):
                for rows in full.visual(b):
                    stays = [row for row in rows if row in kept[2][b]]
                    n, N = len(stays), len(rows)
                    windows = [[row for i, row in enumerate(rows) if i * n // N == k] for k in range(n)]
                    assert stays == [window[(len(window) - 1) // 2] for window in windows]
                    x[b, stays] = torch.stack([x[b, window].mean(0) for window in windows])
            return x

        return {2: put}

    compare("llavolta", dict(ratio=0.3, layer=2), name, side, put_of)


def test_llavolta_card():
    """576 rows behind layer 2 of 32 with S = 8: 72 stay, each at floor(p + 3.5) of its eight."""
    method = LLaVolta()
    assert method.plan(32, 576, Fraction(30, 32) * Fraction(7, 8)) == {2: 72} and method.boundaries(32) == (2,)
    groups, middle = pool1d(576, 72)
    assert middle.tolist() == [8 * k + 3 for k in range(72)] and torch.equal(groups, torch.arange(576) // 8)


def test_bad_knobs_of_holitom_inner():
    with pytest.raises(ValueError, match="merge='sum'"):
        HoliTomInner(merge="sum")
