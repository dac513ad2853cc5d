"""Trained connectors: card checks, slow loops, finite differences; every image and every budget stands alone."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from hf_compress.methods.vision import fit, interleaved_vt, mome, segearth, vtg
from hf_compress.methods.vision.slime import SliMEQueries
from hf_compress.modules.experts import Experts, balance
from hf_compress.modules.frames import Frames
from hf_compress.modules.joined import Joined, side_by_side
from hf_compress.modules.positions import middles, sincos
from hf_compress.modules.queries import Queries
from hf_compress.tensors.cells import cells, means
from tests.invariants.reference import alone, batch_of, close, fresh, logits_of
from tests.methods.test_vision_budgets import WHOLE, asked
from tests.methods.test_vision_compressors import On, by_loop, cell_lists, check_gradients, labels, stir

METHODS = ("vtg", "mome", "adaptvision", "segearth", "interleaved_vt", "fit", "slime_queries")
GRIDS = [(1, 1, 1), (4, 6, 6), (5, 7, 11), (6, 6, 36), (6, 4, 1)]


# -- vtg --------------------------------------------------------------------------------------------------------------
def test_vtg_card():
    x = torch.tensor([[[2.0, 0], [0, 2], [1, 1]]])
    out = vtg.gathered(x, x, torch.eye(2))
    torch.testing.assert_close(out, torch.tensor([[[1.575, 0.425], [0.425, 1.575]]]), atol=5e-4, rtol=0)
    share = x[0, :, 0].softmax(0)
    torch.testing.assert_close(share, torch.tensor([0.665, 0.090, 0.245]), atol=5e-4, rtol=0)


def test_vtg_by_loop():
    """Three frames of four tokens; frame vectors between two known ones, few slots are the first of many."""
    module, x = stir(vtg.Slots(8, 6, 2)).double(), torch.randn(1, 12, 8).double()
    out = module(x, [4, 4, 4], 5)
    first, last = module.time.vectors
    moments = [first, (first + last) / 2, last]
    told = torch.stack([x[0, j] + moments[j // 4] for j in range(12)])
    for k in range(5):
        share = torch.stack([module.norm(t) @ module.slots[:, k] for t in told]).softmax(0)
        torch.testing.assert_close(out[0, k], (share[:, None] * told).sum(0))
    torch.testing.assert_close(module(x, [4, 4, 4], 2), out[:, :2])


def test_frames_of_other_sizes():
    module = stir(Frames(3, 4))
    torch.testing.assert_close(module([2, 0, 1]), module.vectors[[0, 0, 2]])


def test_vtg_refuses_more_tokens_than_slots():
    with pytest.raises(ValueError, match=r"slots=3 give at most 3 tokens, and 18 of 6 x 6"):
        fresh("llava").compress("vtg", ratio=0.5, slots=3)


# -- mome -------------------------------------------------------------------------------------------------------------
def test_mome_card_experts():
    module, x = Experts(2, 4, 2, 1), torch.tensor([[[1.0, 2]]])
    with torch.no_grad():
        module.router.weight.copy_(torch.tensor([[0.5, 0.1], [0.2, 0.4], [-0.3, 0.6], [0.1, -0.2]]))
        module.down[:, 0].copy_(torch.tensor([[0.5, 0.5], [1, 0], [0, 1], [1, 1], [1, -1]]))
        module.up[..., 0].copy_(torch.tensor([[1.0, -1], [1, 0], [0, 1], [1, 1], [0, 2]]))
    p = module.router(x).softmax(-1)
    torch.testing.assert_close(p[0, 0], torch.tensor([0.2539, 0.3427, 0.3101, 0.0934]), atol=5e-5, rtol=0)
    picked = torch.zeros_like(p).scatter(-1, p.topk(2, -1).indices, 1.0)
    y = module.mixed(x, p * picked)
    torch.testing.assert_close(y[0, 0], torch.tensor([2.3287, 0.1989]), atol=5e-4, rtol=0)
    for i, expected in ((1, (0, 1.9545)), (2, (2.9960, 2.9960))):
        alone_ = module.mixed(x, F.one_hot(torch.tensor([[i]]), 4).float()) - module.mixed(x, torch.zeros(1, 1, 4))
        torch.testing.assert_close(alone_[0, 0], torch.tensor(expected), atol=1e-4, rtol=0)


def test_experts_by_loop():
    module, x = stir(Experts(6, 5, 2, 3)).double(), torch.randn(2, 3, 6).double()
    out, uneven = module(x)
    often, likely = torch.zeros(5).double(), torch.zeros(5).double()
    for i in range(2):
        for k in range(3):
            normed = module.norm(x[i, k])
            p, y = module.router(normed).softmax(0), x[i, k]
            for e in sorted(range(5), key=lambda e: -p[e].item())[:2]:
                y = y + p[e] * module.up[1 + e] @ F.gelu(module.down[1 + e] @ normed)
                often[e] += 1 / 12
            torch.testing.assert_close(out[i, k], y + module.up[0] @ F.gelu(module.down[0] @ normed))
            likely += p / 6
    torch.testing.assert_close(uneven, 5 * (often * likely).sum())
    even = torch.full((1, 4, 4), 0.25)
    assert float(balance(even, torch.eye(4)[None])) == pytest.approx(1)


def test_mome_card_windows():
    """Rates of the paper, where they divide: 1500 moments at 4; windows as equal as can be where they do not."""
    owner = mome.windows(1500, 1, 1, 375)
    assert owner.tolist() == [t - t % 4 for t in range(1500)]
    sizes = mome.windows(103, 1, 1, 20).unique(return_counts=True)[1]
    assert len(sizes) == 20 and set(sizes.tolist()) == {5, 6}


@pytest.mark.parametrize(("frames", "h", "w"), [(1, 3, 4), (6, 2, 3), (5, 1, 1), (4, 3, 3)])
def test_windows_of_every_budget(frames, h, w):
    """Each is a run of frames of one place, or cells of all frames; runs of places differ by one frame at most."""
    N = h * w
    for keep in range(1, frames * N + 1):
        owner = mome.windows(frames, h, w, keep).view(frames, N)
        assert len(owner.unique()) == keep and (owner.flatten()[owner.unique()] == owner.unique()).all()
        if keep < N:
            assert (owner == owner[0]).all() and (owner < N).all()
            continue
        assert (owner % N == torch.arange(N)).all() and (owner.diff(dim=0) >= 0).all()
        each = [owner[:, j].unique(return_counts=True)[1].tolist() for j in range(N)]
        assert all(max(sizes) - min(sizes) <= 1 for sizes in each)
        assert max(map(len, each)) - min(map(len, each)) <= 1


def test_mome_adds_to_the_loss_while_it_trains():
    model, batch = fresh("llava"), batch_of("llava", "equal")
    batch = dict(batch, labels=labels(batch))
    losses = {}
    for weight in (0, 0.5):
        model.compress("mome", keep=4, balance=weight)
        losses[weight] = [model(**batch).loss, model.train()(**batch).loss]
        model.eval().decompress()
    assert losses[0][0] == losses[0][1] == losses[0.5][0] and losses[0.5][1] > losses[0][1] + 0.25


# -- adaptvision ------------------------------------------------------------------------------------------------------
def test_adaptvision_card():
    """Four tokens of a row side by side and one map, as of 576 tokens 144."""
    module, x = stir(Joined(6, 4)), torch.randn(2, 576, 6)
    expected = module.join(torch.cat([x[:, i::4] for i in range(4)], -1))
    torch.testing.assert_close(module(x, 144), expected)
    torch.testing.assert_close(Joined(6, 4)(x, 144), x.unflatten(1, (144, 4)).mean(2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "keep"), [(12, 5), (7, 7), (9, 1), (30, 4), (8, 2)])
def test_parts_of_windows_one_by_one(tokens, keep):
    x = torch.randn(1, tokens, 3)
    out, group = side_by_side(x, keep, 4), torch.arange(tokens) * keep // tokens
    for k in range(keep):
        mine = (group == k).nonzero()[:, 0].tolist()
        for i in range(4):
            start, end = len(mine) * i // 4, math.ceil(len(mine) * (i + 1) / 4)
            torch.testing.assert_close(out[0, k, 3 * i : 3 * i + 3], x[0, mine[start:end]].mean(0))


# -- segearth ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("side", "keep"), [(8, 4), (7, 4)])
def test_segearth_card(side, keep):
    """A sixteenth is the two convolutions themselves, each rounding up; none of their places is joined with another."""
    module, x, layout = stir(segearth.Halved(6)), torch.randn(1, side**2, 6), cells(side, side, keep)
    picture = module.norm(x).mT.unflatten(-1, (side, side))
    for convolution, norm in zip(module.convolutions, module.norms):
        picture = F.conv2d(picture, convolution.weight, convolution.bias, 2, 1)
        picture = norm(picture.movedim(1, -1)).movedim(-1, 1)
    assert picture.shape[-2:] == (2, 2)
    if side == 8:
        torch.testing.assert_close(module(x, layout), means(x, layout) + module.out(picture.flatten(2).mT))


@pytest.mark.parametrize(("h", "w", "k"), GRIDS)
def test_segearth_place_by_place(h, w, k):
    module, x, layout = stir(segearth.Halved(6)).double(), torch.randn(1, h * w, 6).double(), cells(h, w, k)
    out, grid = module(x, layout), (h, w)
    picture = {divmod(i, w): module.norm(x[0, i]) for i in range(h * w)}
    for convolution, norm in zip(module.convolutions, module.norms):
        half = tuple(-(-n // 2) for n in grid)
        step, there = (2, half) if math.prod(half) >= k else (1, grid)
        made = {}
        for i in range(there[0]):
            for j in range(there[1]):
                y = convolution.bias
                for a in (-1, 0, 1):
                    for b in (-1, 0, 1):
                        if (at := (i * step + a, j * step + b)) in picture:
                            y = y + convolution.weight[:, :, a + 1, b + 1] @ picture[at]
                made[i, j] = norm(y)
        picture, grid = made, there
    for c, mine in enumerate(cell_lists(layout)):
        seen = torch.stack([picture[i // w * grid[0] // h, i % w * grid[1] // w] for i in mine]).mean(0)
        torch.testing.assert_close(out[0, c], x[0, mine].mean(0) + module.out(seen))


# -- interleaved_vt ---------------------------------------------------------------------------------------------------
def test_interleaved_card():
    """16 frames of 196: each 16 means and 8 queries; a frame alone changes itself and its neighbours' queries."""
    module, x = stir(interleaved_vt.Sliding(8, 8)), torch.randn(1, 16, 196, 8)
    out = module(x, (14, 14), [24] * 16)
    assert out.shape == (1, 384, 8)
    torch.testing.assert_close(out[0, :16], means(x[:, 0], cells(14, 14, 16))[0])
    other = x.clone()
    other[0, 5, 50:] += torch.randn(146, 8)
    change = (module(other, (14, 14), [24] * 16) - out).abs().amax(-1)[0].view(16, 24)
    assert (change[:, :16].amax(1) > 1e-4).nonzero().flatten().tolist() == [5]
    assert (change[:, 16:].amin(1) > 1e-5).nonzero().flatten().tolist() == [4, 5, 6]


def test_interleaved_by_loop():
    """Frames of 9, 8, 0 and 1 tokens; those at the ends have one neighbour."""
    module, x = stir(interleaved_vt.Sliding(128, 3)).double(), torch.randn(1, 4, 12, 128).double()
    out, start = module(x, (3, 4), [9, 8, 0, 1])[0], 0
    for t, k in enumerate([9, 8, 0, 1]):
        few = min(3, k // 3)
        if k:
            torch.testing.assert_close(out[start : start + k - few], means(x[:, t], cells(3, 4, k - few))[0])
        seen = torch.cat([x[0, s] for s in (t - 1, t, t + 1) if 0 <= s < 4])
        for i in range(few):
            normed = module.norm(seen)
            told = by_loop(module.first, module.norm_query(module.query[i]), normed, normed, seen)
            again, read = module.again, []
            keys, values = again.key_value(again.norm(seen)).chunk(2, -1)
            for part in (slice(0, 64), slice(64, 128)):
                share = (keys[:, part] @ again.query(again.norm(told))[part] / 8).softmax(0)
                read.append(share @ values[:, part])
            told = module.mlp(told + again.out(torch.cat(read)))
            torch.testing.assert_close(out[start + k - few + i], told)
        start += k


# -- fit --------------------------------------------------------------------------------------------------------------
def test_fit_card():
    assert fit.blocks("(2)4(3)1") == [(2, 4), (3, 1)] and fit.blocks("(0)1") == [(0, 1)]
    for wrong in ("(2)4(2)", "2", "", "(1)a", 3):
        with pytest.raises(ValueError, match=rf"schedule={re.escape(repr(wrong))} must be blocks"):
            fit.FIT(schedule=wrong)


def test_fit_groups_talk_through_latents_alone():
    """After one block without global layers in it (a first block) tokens know their group; after two blocks all."""
    x, layout = torch.randn(1, 24, 8), cells(4, 6, 6)
    other = x.clone()
    other[0, 0] += torch.randn(8)
    for schedule, reach in (("(1)1", {0, 1, 2, 3, 4, 5}), ("(2)0(1)1", {0, 1, 2, 3, 4, 5})):
        module = stir(fit.Interleaved(8, fit.blocks(schedule), 2))
        change = (module(other, layout) - module(x, layout)).abs().amax(-1)[0]
        assert set((change > 1e-6).nonzero()[:, 0].tolist()) == reach
    module = stir(fit.Interleaved(8, fit.blocks("(2)1"), 2))
    module.blocks[0].whole = torch.nn.ModuleList()  # no layer over all latents: a group of two cells stays alone
    change = (module(other, layout) - module(x, layout)).abs().amax(-1)[0]
    assert set((change > 1e-6).nonzero()[:, 0].tolist()) == {0, 1}


def attends(attention, x, y, place=0):
    """`Attention` of rows x to rows y, one head."""
    q = attention.norm(x) + place
    source = q if y is None else attention.norm(y)
    k, v = attention.key_value(source).chunk(2, -1)
    share = (attention.query(q) @ k.T / k.shape[-1] ** 0.5).softmax(-1)
    return x + attention.out(share @ v)


@pytest.mark.parametrize(("h", "w", "k"), GRIDS)
def test_fit_by_loop(h, w, k):
    module = stir(fit.Interleaved(8, [(1, 1), (1, 1)], 2)).double()
    x, layout = torch.randn(1, h * w, 8).double(), cells(h, w, k)
    found = module(x, layout)[0]
    place, mine = sincos(middles((h, w)), 8).double(), cell_lists(layout)
    groups = [sorted(i for cell in mine[g : g + 2] for i in cell) for g in range(0, k, 2)]
    many, few = x[0].clone(), torch.stack([x[0, cell].mean(0) for cell in mine])
    at = place[layout.centres]
    for block in module.blocks:
        for g, own in enumerate(groups):
            layer, latents = block.local[0], slice(2 * g, 2 * g + 2)
            many[own] = layer.mlp(attends(layer.attention, many[own], None, place[own]))
            few[latents] = attends(block.read, few[latents], many[own], at[latents])
        layer = block.whole[0]
        few = layer.mlp(attends(layer.attention, few, None, at))
        if block.back is not None:
            for g, own in enumerate(groups):
                many[own] = attends(block.back, many[own], few[2 * g : 2 * g + 2], place[own])
    torch.testing.assert_close(found, few)


# -- slime_queries ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("whole", [True, False])
def test_slime_queries_by_loop(whole):
    """Three queries of every crop, of which those stay that are most like the question; the image in small as it is."""
    module, x = stir(Queries(8, 3)), torch.randn(2, 4 + 12, 8)
    text, real = torch.randn(2, 3, 8), torch.tensor([[True] * 3, [True, True, False]])
    tokens = asked(x, text, real, grids=[(2, 2), (2, 3), (3, 2)], boxes=[WHOLE, (0, 0, 1, 0.5), (0, 0.5, 1, 1)])
    tokens.module, method = module, SliMEQueries(whole=whole, queries=3)
    answer = method.assign(tokens, keep := 7)
    made = method.make(tokens, answer)
    for i in range(2):
        found = {j: x[i, j] for j in range(4)} if whole else {}
        slots = []
        for start, grid in zip((0, 4, 10), tokens.grids):
            if start or not whole:
                layout = cells(*grid, 3)
                told = module(x[i : i + 1, start : start + grid[0] * grid[1]], layout)[0]
                slots += [(start + at, vector) for at, vector in zip(layout.centres.tolist(), told)]
        words = [F.normalize(t, dim=0) for t, r in zip(text[i], real[i]) if r]
        slots.sort(key=lambda slot: -sum(float(F.normalize(slot[1].detach(), dim=0) @ t) for t in words))
        found |= dict(slots[: keep - len(found)])
        assert answer.kept[i].tolist() == sorted(found)
        torch.testing.assert_close(made[i], torch.stack([found[j] for j in sorted(found)]))
    with pytest.raises(ValueError, match=r"queries=3 of a crop give \d tokens .* and 14 of 16 shall stay"):
        method.assign(tokens, 14)


# -- all of them ------------------------------------------------------------------------------------------------------
MODULES = {
    "vtg": (lambda: On(vtg.Slots(8, 6, 2), [4, 4, 4], 5), (2, 12, 8)),
    "mome": (lambda: Experts(8, 4, 2, 3), (2, 5, 8)),
    "adaptvision": (lambda: On(Joined(8, 4), 5), (2, 12, 8)),
    "segearth": (lambda: On(segearth.Halved(8), cells(3, 4, 3)), (2, 12, 8)),
    "interleaved_vt": (lambda: On(interleaved_vt.Sliding(8, 2), (3, 4), [6, 0, 7]), (2, 3, 12, 8)),
    "fit": (lambda: On(fit.Interleaved(8, [(1, 1), (1, 1)], 2), cells(3, 4, 5)), (2, 12, 8)),
}


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_those_of_finite_differences(name):
    make, shape = MODULES[name]
    check_gradients(make(), torch.randn(shape))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next"])
@pytest.mark.parametrize("method", METHODS)
def test_trained_weights_fill_each_image_alone(method, name):
    """Weights that do something: each sample of a ragged batch as alone, and every parameter learns."""
    model, batch = fresh(name), batch_of(name)
    model.compress(method, ratio=0.5)
    stir(model.compressor)
    whole = logits_of(model, batch)
    for row in range(2):
        close(whole[row, -1], logits_of(model, alone(name, batch, row))[0, -1])
    before = whole[:, -1].clone()
    stir(model.compressor)
    assert not torch.allclose(logits_of(model, batch)[:, -1], before, atol=1e-3)
    model.train()(**batch, labels=labels(batch)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.compressor.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_training_under_autocast(method):
    """As with `Trainer(bf16=True)`: weights in fp32, what enters them in bf16."""
    model, batch = fresh("llava"), batch_of("llava")
    model.compress(method, ratio=0.5)
    stir(model.compressor)
    told = labels(batch)
    expected = model.train()(**batch, labels=told).loss.detach()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, labels=told).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, atol=0, rtol=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.compressor.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_one_checkpoint_serves_every_budget(method, tmp_path):
    """Saved alone, and inside the checkpoint of the model; the budget is chosen behind it."""
    from transformers import AutoModelForImageTextToText

    model, batch = fresh("llava"), batch_of("llava")
    model.compress(method, ratio=0.5)
    stir(model.compressor)
    model.save_pretrained(tmp_path / "whole")
    model.compression.save(tmp_path / "alone")
    found = []
    for keep in (5, 1):
        model.compression.set_budget(keep=keep)
        found.append(logits_of(model, batch))
    model.decompress()
    model.compress(method, keep=5, weights=tmp_path / "alone")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    for keep, expected in zip((5, 1), found):
        for one in (model, again):
            one.compression.set_budget(keep=keep)
            torch.testing.assert_close(logits_of(one, batch), expected)


KNOBS = [
    ("vtg", "slots", 0), ("vtg", "frames", 1.5), ("mome", "experts", 0), ("mome", "top", 17), ("mome", "inner", 0),
    ("mome", "balance", -1), ("adaptvision", "slots", 0), ("interleaved_vt", "queries", 0), ("fit", "latents", 0),
    ("fit", "schedule", "(1)"), ("slime_queries", "queries", 0),
]  # fmt: skip


@pytest.mark.parametrize(("method", "knob", "value"), KNOBS)
def test_knobs(method, knob, value):
    with pytest.raises(ValueError, match=rf"{knob}={re.escape(repr(value))} must be"):
        fresh("llava").compress(method, ratio=0.5, **{knob: value})
