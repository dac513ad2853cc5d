"""Stores in which layers share tensors: merged directions and low-rank factors, against loops and torch.linalg."""

import copy
import math
import pickle
import warnings
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_compress.engine.entries import StoredView
from hf_compress.engine.rotary import Rotary
from hf_compress.layout import Layout
from hf_compress.stores import HeldLayer
from hf_compress.stores.lowrank import LowRankStore
from hf_compress.stores.merged import MergedStore
from hf_compress.stores.shared import Shared
from hf_compress.tensors.slerp import divergent, slerp
from hf_compress.tensors.svd import factors

LONG, SHORT, SIZE, HEADS = 40, 25, 8, 2


def layers_of(count, seed=0, dtype=torch.float32, scale=1.0):
    """Layers of random entries, rows of 40 and of 25 (left padded), with the views of their prompt.

    Neighbours are alike: layer l is layer 0 and noise of `scale`.
    """
    g = torch.Generator().manual_seed(seed)
    index = torch.arange(LONG).repeat(2, 1)
    valid = torch.ones(2, LONG, dtype=torch.bool)
    valid[1, : LONG - SHORT] = False
    layout = Layout(index, index, torch.full_like(index, -1), valid, torch.zeros(2, dtype=torch.int64), LONG)
    angle = (valid.cumsum(1) - 1).clamp(min=0)[..., None] * 0.7 ** torch.arange(SIZE // 2)
    angle = torch.cat([angle, angle], -1)
    rotary = Rotary((angle.cos().to(dtype), angle.sin().to(dtype)), apply_rotary_pos_emb)
    held, base = [], torch.randn(2, 2, HEADS, LONG, SIZE, generator=g)
    for _ in range(count):
        layer = HeldLayer()
        layer.announce(layout)
        x = base + scale * torch.randn(base.shape, generator=g)
        layer.update(x[0].to(dtype), x[1].to(dtype))
        held.append(layer)
    views = [StoredView(layer, i, count, layout.valid.sum(-1), layout, None, rotary) for i, layer in enumerate(held)]
    return held, views, layout


def settled(store, count, **kwargs):
    """The layers after the store packed them, and keys and values as they were."""
    held, views, layout = layers_of(count, **kwargs)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in held]
    store.settle(held, views)
    return held, before, layout


def nbytes(held):
    """Bytes of all different storages."""
    tensors = [t for layer in held for t in (layer.keys, layer.values, *(x for p in layer.body for x in parts(p)))]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def parts(body):
    """All tensors behind a body, whoever counts them."""
    for value in vars(body).values():
        if torch.is_tensor(value):
            yield value
        elif isinstance(value, Shared):
            yield from value.parts


# -- directions -----------------------------------------------------------------------------------------------------
def test_slerp_card():
    """u orthogonal to w, t=.6: e = .5878 u + .8090 w."""
    u, w = torch.eye(4)[:2]
    torch.testing.assert_close(slerp(u, w, 0.6), torch.tensor([0.5878, 0.8090, 0, 0]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 1.0])
def test_slerp_is_the_arc(t):
    """A unit vector at t times the angle from u, for angles down to nothing."""
    g = torch.Generator().manual_seed(1)
    u, w = torch.nn.functional.normalize(torch.randn(2, 50, SIZE, generator=g), dim=-1)
    e = slerp(u, w, t)
    torch.testing.assert_close(e.norm(dim=-1), torch.ones(50))
    angle = (u * w).sum(-1).acos()
    torch.testing.assert_close((u * e).sum(-1).clamp(-1, 1), (t * angle).cos(), atol=2e-6, rtol=0)
    torch.testing.assert_close(slerp(u, u, t), u)
    assert slerp(u, -u, t).isfinite().all()
    torch.testing.assert_close(slerp(u, torch.zeros_like(u), 0.6), u)


def test_divergent_is_per_sample():
    """The lowest share of the range of cosines; padding and other samples have no say."""
    cosine = torch.tensor([[[0.0, 0.1, 0.9, 1.0]], [[-1.0, 0.5, 0.6, 0.7]]])
    u = torch.tensor([1.0, 0.0]).expand(2, 1, 4, 2)
    w = torch.stack([cosine, (1 - cosine**2).sqrt()], -1)
    valid = torch.tensor([[[True] * 4], [[False, True, True, True]]])
    for share, expected in (
        (0.0, [[1, 0, 0, 0], [0, 1, 0, 0]]),
        (0.15, [[1, 1, 0, 0], [0, 1, 0, 0]]),
        (0.51, [[1, 1, 0, 0], [0, 1, 1, 0]]),
        (1.0, [[1, 1, 1, 1], [0, 1, 1, 1]]),
    ):
        assert divergent((u * w).sum(-1), valid, share)[:, 0].int().tolist() == expected


def merged_by_hand(x, y, rows, t, retain):
    """What the two layers read for one sample: {(head, row): (x', y')}, and which pairs stay apart."""
    pairs = [(h, j) for h in range(x.shape[0]) for j in rows]
    cosine = {p: float(torch.nn.functional.cosine_similarity(x[p], y[p], dim=0)) for p in pairs}
    low, high = min(cosine.values()), max(cosine.values())
    out, own = {}, set()
    for p in pairs:
        if cosine[p] <= low + retain * (high - low):
            out[p] = x[p], y[p]
            own.add(p)
            continue
        angle = math.acos(cosine[p])
        a, b = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
        e = a * x[p] / x[p].norm() + b * y[p] / y[p].norm()
        out[p] = e * x[p].norm(), e * y[p].norm()
    return out, own


@pytest.mark.parametrize(("width", "error"), [(16, 1e-5), (8, 0.02), (4, 0.35)])
def test_merged_pair(width, error):
    """Against loops over samples, heads and rows; codes within half a step of the unit vectors."""
    held, before, _ = settled(MergedStore(0.6, 0.3, width), 2)
    apart = 0
    for which in range(2):
        got = [layer.whole()[which] for layer in held]
        for b, first in enumerate((0, LONG - SHORT)):
            rows = range(first, LONG)
            expected, own = merged_by_hand(before[0][which][b], before[1][which][b], rows, 0.6, 0.3)
            apart += len(own)
            for (h, j), pair in expected.items():
                for mine, theirs in zip(got, pair):
                    exact = torch.equal(mine[b, h, j], theirs)
                    assert exact if (h, j) in own else (mine[b, h, j] - theirs).abs().max() <= error * theirs.norm()
            assert not got[0][b, :, :first].any()
    assert 0 < apart < 4 * HEADS * (LONG + SHORT) / 2
    assert nbytes(held) == sum(layer.nbytes() for layer in held)


def test_merged_bytes():
    """The formula of the card, and what is really stored."""
    assert MergedStore(0.6, 0.05).removed(128) == pytest.approx(0.468, abs=5e-4)
    assert 1 - MergedStore(0.6, 0.05).removed(128) == pytest.approx(0.532, abs=5e-4)
    held, before, _ = settled(MergedStore(0.6, 0.3), 2, dtype=torch.bfloat16)
    expected = 0
    for which in range(2):
        own = [
            len(merged_by_hand(*(before[i][which][b].float() for i in range(2)), rows, 0.6, 0.3)[1])
            for b, rows in enumerate((range(LONG), range(LONG - SHORT, LONG)))
        ]
        merged = max(HEADS * n - o for n, o in zip((LONG, SHORT), own))
        expected += (
            2 * (merged * (SIZE + 2) + max(own) * 2 * SIZE) * 2 + 2 * HEADS * LONG // 4
        )  # two rows of bf16; one index
    assert sum(layer.nbytes() for layer in held) == expected


def test_nothing_merged_is_exact():
    held, before, _ = settled(MergedStore(0.6, 1.0), 2)
    for layer, (keys, values) in zip(held, before):
        for mine, theirs in zip(layer.whole(), (keys, values)):
            assert torch.equal(mine[0], theirs[0])
            assert torch.equal(mine[1, :, LONG - SHORT :], theirs[1, :, LONG - SHORT :])


# -- low rank -------------------------------------------------------------------------------------------------------
def test_factors_are_the_truncated_svd():
    """Each matrix at its own rank; full rank gives the input back."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 20, 12, generator=g)
    ranks = torch.tensor([3, 7, 12])
    left, right = factors(x, ranks)
    assert left.shape == (3, 20, 12) and right.shape == (3, 12, 12)
    for b, r in enumerate(ranks.tolist()):
        u, s, v = torch.linalg.svd(x[b].double())
        torch.testing.assert_close(
            (left[b] @ right[b]).double(), u[:, :r] @ torch.diag(s[:r]) @ v[:r], atol=1e-5, rtol=0
        )
        assert not left[b, :, r:].any() and not right[b, r:].any()
    torch.testing.assert_close(left[2] @ right[2], x[2], atol=1e-5, rtol=0)


def turned(x, positions, sign):
    """(H, n, d) rotated to `positions` (sign 1) or back (-1)."""
    angle = positions[:, None] * 0.7 ** torch.arange(SIZE // 2)
    c, s, (a, b) = angle.cos(), sign * angle.sin(), x.chunk(2, -1)
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def test_low_rank_group():
    """Four layers, keys before their rotation: per sample torch.linalg.svd of what its own rows hold."""
    held, before, _ = settled(LowRankStore(None, (6, 9), 4), 4)
    for b, n in enumerate((LONG, SHORT)):
        for which, r in enumerate((6, 9)):
            x = [layer[which][b, :, -n:] for layer in before]
            if which == 0:
                x = [turned(t, torch.arange(n), -1) for t in x]
            u, s, v = torch.linalg.svd(torch.cat([t.transpose(0, 1).flatten(1) for t in x], 1), full_matrices=False)
            low = ((u[:, :r] * s[:r]) @ v[:r]).unflatten(1, (4, HEADS, SIZE)).permute(1, 2, 0, 3)
            for i, layer in enumerate(held):
                expected = low[i] if which else turned(low[i], torch.arange(n), 1)
                torch.testing.assert_close(layer.whole()[which][b, :, -n:], expected, atol=2e-5, rtol=0)
                assert not layer.whole()[which][b, :, : LONG - n].any()
    assert nbytes(held) == sum(layer.nbytes() for layer in held)


def test_low_rank_card():
    """Fractions of the card at 512 and 768 of 4096, and back from ratio to ranks, tables included."""
    for length, fraction in ((65536, 0.166), (8192, 0.234), (2048, 0.469)):
        assert 640 * (1 / 4096 + 1 / length) == pytest.approx(fraction, abs=5e-4)
        kept = 640 * (Fraction(1, 4096) + Fraction(1, length)) + Fraction(1, 32 * 8)
        store = LowRankStore(1 - kept, (1, 1), 32)
        assert store._split(length, 4096, 8) == (512, 768)


def test_low_rank_bytes():
    """What is stored is what the ratio promises, rounded down; each sample at the rank that it has alone."""
    store = LowRankStore(Fraction(3, 5), (1, 1), 2)
    held, _, _ = settled(store, 2)
    whole = 2 * 2 * 2 * HEADS * LONG * SIZE * 4
    assert 0.38 < nbytes(held) / whole <= 0.4
    ranks = [store._split(n, 2 * HEADS * SIZE, HEADS) for n in (LONG, SHORT)]
    assert ranks[0] != ranks[1] and [x.right.shape[1] for x in held[0].body] == list(ranks[0])
    assert not held[0].body[1].right[1, ranks[1][1] :].any()


def test_low_rank_short_prompts():
    """Ranks that save nothing leave the prompt alone; a ratio that leaves little rank is warned about."""
    held, before, _ = settled(LowRankStore(None, (1000, 1000), 2), 2)
    assert all(layer.body is None and torch.equal(layer.keys, old[0]) for layer, old in zip(held, before))
    with pytest.warns(UserWarning, match=f"{LONG} tokens are few against the {4 * HEADS * SIZE} numbers"):
        settled(LowRankStore(Fraction(1, 2), (1, 1), 4), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settled(LowRankStore(Fraction(1, 2), (1, 1), 2), 2)


# -- sharing --------------------------------------------------------------------------------------------------------
STORES = {"merged": MergedStore(0.6, 0.2), "codes": MergedStore(0.6, 0.2, 4), "low rank": LowRankStore(None, (6, 9), 2)}


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_changes_are_shared(store):
    """Rows chosen, repeated and moved: right per layer, and still one copy for all of them."""
    held, _, _ = settled(store, 2)
    cache = SimpleNamespace(layers=held)
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert nbytes(copied.layers) == sum(layer.nbytes() for layer in copied.layers) == nbytes(held)
    whole = [layer.whole() for layer in held]
    which = torch.tensor([1, 0, 1])
    for layer in held:
        layer.reorder_cache(which)
    assert nbytes(held) == sum(layer.nbytes() for layer in held)
    for layer in held:
        layer.batch_repeat_interleave(2)
    assert nbytes(held) == sum(layer.nbytes() for layer in held)
    for layer in held:
        layer.batch_select_indices(torch.tensor([5]))
        layer.batch_repeat_interleave(3)
    for layer, old in zip(held, whole):
        for mine, theirs in zip(layer.whole(), old):
            assert torch.equal(mine, theirs[[1, 1, 1]])


def test_moves_are_shared():
    """Two devices hold one copy each (meta stands for the second one)."""
    held, _, _ = settled(STORES["low rank"], 2)
    size = nbytes(held)
    moved = [tuple(part.to(torch.device("meta")) for part in layer.body) for layer in held]
    for a, b in zip(*moved):
        assert a.left is b.left and a.tables is b.tables
    assert sum(t.numel() * 4 for bodies in moved for part in bodies for t in part.tensors()) == size
    assert held[0].body[0].to(torch.device("cpu")) is held[0].body[0]


def test_layers_must_hold_the_same_rows():
    held, views, layout = layers_of(2)
    held[1].layout = layout.tail(30)
    for store in STORES.values():
        with pytest.raises(ValueError, match="hold 40 and 30 rows"):
            store.settle(held, views)
