"""gsearch against the numbers of its card, and the search for rows against a look at every number."""

from fractions import Fraction

import pytest
import torch

from hf_compress import Schedule
from hf_compress.calibrate import row_schedule
from hf_compress.calibrate.rows import _search
from hf_compress.methods.decoder.gsearch import GSearch
from tests.invariants.language import FullLength
from tests.invariants.reference import alone, batch_of, logits_of, shared, unchanged
from tests.tiny import LLAVA_TOKENS


def test_curve_of_the_card():
    """T=8, s=1, c=3.5: 15 13 10 6 3 1 0 of 16 behind layer 0, and one stays where none would."""
    plan = GSearch(slope=1).plan(8, 16, 1 - Fraction(16 + 15 + 13 + 10 + 6 + 3 + 1 + 1, 128))
    assert plan == {1: 15, 2: 13, 3: 10, 4: 6, 5: 3, 6: 1, 7: 1}


@pytest.mark.parametrize("tokens", [25, 144, 576, 2880])
@pytest.mark.parametrize("ratio", [0, 0.1, 0.5, 0.75, 0.9])
def test_the_ratio_is_met(ratio, tokens):
    """To half a cut of all layers together, falling, never empty."""
    plan = GSearch().plan(32, tokens, Fraction(str(ratio)))
    counts = [plan.get(i, tokens) for i in range(32)]
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 1
    assert abs(sum(counts) - 32 * tokens * (1 - ratio)) <= max(1, tokens // 50) / 2 + 1


def test_small_cuts_are_put_together():
    plan = GSearch().plan(32, 576, Fraction(1, 2))
    assert len(set(plan.values())) < 31 and {576 - n for n in plan.values()} <= {*range(0, 577, 11), 575}


def test_reach():
    with pytest.raises(ValueError, match=r"before layers \(2, 3\) of 4: of 10 .* 0 <= ratio <= 0\.45"):
        GSearch(layer=2).plan(4, 10, Fraction(1, 2))
    with pytest.raises(ValueError, match=r"layer=4 .* 1 <= layer < 4"):
        GSearch(layer=4).plan(4, 10, Fraction(1, 2))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("voters", ["text", "last"])
@torch.no_grad()
def test_the_voters_choose(name, voters):
    """Behind layer 0 those stay to which its rows of text behind the image, or the last row, attend most."""
    model, batch = shared(name), batch_of(name)
    with model.compressed("gsearch", ratio=0.5, voters=voters):
        logits_of(model, batch)
        last = model.compression.last
    full = FullLength(name, batch, batch["input_ids"][:, :1])
    maps = full.run(full.survivors([last.layer_index[0]] * full.layers))[1][0].mean(1)
    for b, rows in enumerate(last.layer_index[1]):
        visual = [i for image in full.visual(b) for i in image]
        valid = batch["attention_mask"][b].nonzero()[:, 0].tolist()
        asks = [i for i in valid if i > max(visual)] if voters == "text" else valid[-1:]
        score = maps[b, asks or valid[-1:]].mean(0).tolist()
        stay = set(rows) & set(visual)
        assert 0 < len(stay) < len(visual)
        assert stay == set(sorted(visual, key=lambda i: (-score[i], i))[: len(stay)])


# -- search -----------------------------------------------------------------------------------------------------------
def test_bisection_finds_the_smallest():
    """Every layer, with all behind it, has the least of all numbers that are good."""
    need = [0, 7, 7, 3, 1, 1]
    good = lambda levels: all(n >= m for n, m in zip(levels, need))
    assert _search([20] * 6, 1, good, False) == [20, 7, 7, 3, 1, 1]
    assert _search([20] * 6, 3, good, False) == [20, 20, 20, 3, 1, 1]


@torch.no_grad()
def test_row_schedule():
    """What it finds says what the bare model says; a row less in any layer that was lowered does not."""
    model, batch = shared("llava"), batch_of("llava")
    one = alone("llava", batch, 0)
    with unchanged(model):
        found = row_schedule(model, [batch, one], progress=False)
    assert found.unit == "rows" and found.levels[0] == LLAVA_TOKENS and list(found.levels) == sorted(found.levels)[::-1]
    plain = [model(**b).logits[:, -1].argmax(-1) for b in (batch, one)]

    def agrees(levels):
        with model.compressed("gsearch", schedule=Schedule(levels, "rows")):
            return all(torch.equal(model(**b).logits[:, -1].argmax(-1), p) for b, p in zip((batch, one), plain))

    assert agrees(found.levels)
    for layer, n in enumerate(found.levels):
        if 1 < n < found.levels[layer - 1]:
            assert not agrees([*found.levels[:layer], *[n - 1] * (4 - layer)])
    half = row_schedule(model, [batch], agreement=0.5, progress=False)
    with model.compressed("gsearch", schedule=half):
        assert int((model(**batch).logits[:, -1].argmax(-1) == plain[0]).sum()) >= 1


def test_refusals():
    model, batch = shared("llava"), batch_of("llava")
    for batches, knobs, message in (
        ([], {}, "batches=list"),
        (batch, {}, "batches=dict"),
        ([batch, None], {}, r"batches\[1\]=None must be what the model is called with"),
        ([batch], {"agreement": 0}, "agreement=0"),
        ([batch], {"method": "snapkv"}, "method='snapkv' must be one of"),
        ([{"input_ids": torch.tensor([[5, 6]])}], {}, r"batches\[0\] shows no image"),
    ):
        with unchanged(model), pytest.raises(ValueError, match=message):
            row_schedule(model, batches, **knobs)
    for knobs in ({"voters": "all"}, {"slope": 0}, {"layer": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(knobs))}="):
            GSearch(**knobs)
