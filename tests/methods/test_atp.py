"""ATP: the worked check of its card, and the bare model whose columns are masked as loops over its attention say."""

from fractions import Fraction
from math import isqrt
from types import SimpleNamespace

import pytest
import torch

from hf_compress.methods.decoder.atp import ATP, ATPGrid
from tests.ecosystem.test_trained import CHECK, engine
from tests.invariants.reference import FullLength, batch_of, close, fresh, greedy, logits_of, shared

AT = (1, 2, 3)  # of four layers


def test_the_card():
    """A grid of 4 x 4: .25 on every other row and column; a threshold of .2 keeps those four."""
    place = torch.tensor([[[0, i // 4, i % 4] for i in range(16)]])
    spatial = ATPGrid().note(SimpleNamespace(place=place))["grid"] * (1 - 3 / ATP().step ** 2)
    assert (spatial[0] > 0.2).nonzero()[:, 0].tolist() == [0, 2, 8, 10] and spatial.max() == 0.25
    assert ATP().boundaries(32) == (5, 15, 25) and ATP().boundaries(4) == AT


def by_hand(batch, tokens, stays):
    """Logits, and the rows of every layer; `stays(cut, total, shown, a, b, grid)` says of one sample which of its
    visual rows stay.

    `a` and `b` are what its visual rows, and its text behind the last image, attend to, mean over them and heads.
    """
    full = FullLength("llava", batch, tokens)
    alive = [full.valid[b, : full.prompt].nonzero()[:, 0].tolist() for b in range(len(full.valid))]
    through = []
    for layer in range(full.layers):
        if layer in AT:
            maps = full.run(full.survivors(through + [alive] * (full.layers - layer)))[1][layer - 1].mean(1)
            for b, images in enumerate(full.visual(b) for b in range(len(alive))):
                every = [r for image in images for r in image]
                grid = set()
                for image in images:
                    side = isqrt(len(image))
                    grid |= {r for i, r in enumerate(image) if i // side % 2 == 0 and i % side % 2 == 0}
                shown, text = [r for r in alive[b] if r in every], [r for r in alive[b] if r > max(every)]
                seen = [maps[b, rows].mean(0).tolist() for rows in (shown, text)]
                left = stays(AT.index(layer), len(every), shown, *seen, grid)
                alive[b] = [r for r in alive[b] if r not in shown or r in left]
        through.append([list(rows) for rows in alive])
    return full.run(full.survivors(through))[0], through


@torch.no_grad()
def test_the_grid_and_then_what_is_attended_to():
    model, batch = shared("llava"), batch_of("llava")
    with model.compressed("atp", ratio=0.4):
        run, last = greedy(model, batch), model.compression.last
        uncached = greedy(model, batch, use_cache=False)

    def stays(cut, total, shown, a, b, grid):
        count = ATP().plan(4, total, Fraction(2, 5))[AT[cut]]
        return set(sorted(shown, key=lambda r: (r not in grid, -(a[r] + b[r]), r))[:count])

    expected, through = by_hand(batch, run.tokens, stays)
    assert last.layer_index == through
    close(run.logits, expected[:, batch["input_ids"].shape[1] - 1 :])
    close(uncached.logits, run.logits)


def learnt(seed=0):
    """A compressed model whose thresholds follow from the prompt."""
    model = fresh("llava").compress("atp", ratio="adaptive")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for first, second in model.compressor.decoder:
            first.weight.copy_(torch.randn(first.weight.shape, generator=generator) * 3)
            second.weight.copy_(torch.randn(second.weight.shape, generator=generator) * 0.2)
            second.bias.copy_(torch.tensor([-4.0, 2.0]))
    return model, model.compressor.decoder


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_thresholds_follow_from_the_prompt(side):
    model, maps = learnt()
    batch = batch_of("llava", side=side)
    tokens, got = batch["input_ids"][:, :1], logits_of(model, batch)
    last = model.compression.last

    def stays(cut, total, shown, a, b, grid):
        if not shown:
            return set()
        means = torch.tensor([sum(x[r] for r in shown) / len(shown) for x in (a, b)])
        first, second = maps[cut]
        least, far = (second.weight @ (first.weight @ means + first.bias) + second.bias).sigmoid().tolist()
        return {r for r in shown if (a[r] + b[r]) / 2 > least or 0.25 * (r in grid) > far}

    expected, through = by_hand(batch, tokens, stays)
    assert last.layer_index == through and len({tuple(map(len, rows)) for rows in through}) > 1
    for b, rows in enumerate(through[-1]):
        close(got[b, rows], expected[b, rows])


def test_thresholds_learn_and_are_saved(tmp_path, monkeypatch):
    """From the loss of the answers and from what they cost; where a budget says how many stay there are none."""
    monkeypatch.setattr(engine, "check_trained", CHECK)
    batch = batch_of("llava")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[labels >= 90] = -100
    labels[:, :-3] = -100
    assert not hasattr(fresh("llava").compress("atp", ratio=0.4), "compressor")
    model, maps = learnt()
    with pytest.raises(ValueError, match="method='atp': its module is new"):
        model(**batch)
    model.train()
    out = model(**batch, labels=labels, use_cache=False)
    assert out.loss > model.loss_function(out.logits, labels, vocab_size=100)  # what rows cost
    out.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for cut in maps for p in cut[1].parameters())
    expected = logits_of(model.eval(), batch)
    model.compression.save(tmp_path)
    again = fresh("llava").compress("atp", ratio="adaptive", weights=tmp_path)
    assert torch.equal(logits_of(again, batch), expected)


def test_refusals():
    for knobs in (dict(step=1), dict(target=2), dict(layers=(3, 2))):
        with pytest.raises(ValueError, match=f"{next(iter(knobs))}="):
            ATP(**knobs)
