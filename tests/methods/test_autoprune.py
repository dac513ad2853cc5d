"""autoprune against the numbers of its card, a loop over all pairs, and the model with rows merged by hand."""

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from hf_compress.methods.decoder.autoprune import AutoPrune, information, share
from tests.invariants.language import FullLength
from tests.invariants.reference import batch_of, close, greedy, logits_of, shared
from tests.methods.test_decoder_merging import ARCHITECTURES, asking, compare, recycling
from tests.methods.test_mustdrop import looks_by_hand


def view_of(a, visual):
    """A layer whose voters have the attention a (H, t, S)."""
    a = torch.as_tensor(a)
    mask = torch.zeros(1, a.shape[-1], dtype=torch.bool)
    mask[:, visual] = True
    return SimpleNamespace(visual=mask, attention=lambda source, voters, of: of(a[None]).mean(-2))


def test_information_of_the_card():
    """.1552 bits, and so a slope of .3690."""
    found = information(view_of([[[0.30, 0.10, 0.05, 0.05], [0.05, 0.05, 0.30, 0.10]]], range(4)), None)
    assert float(found) == pytest.approx(0.1552, abs=1e-4) and 0.4 - 0.2 * float(found) == pytest.approx(
        0.3690, abs=1e-4
    )


def by_hand(a, visual):
    """The sum of the definition, over heads, rows of text and visual rows."""
    total = 0.0
    for head in a.tolist():
        joint = [[row[v] / len(head) for v in visual] for row in head]
        for row in joint:
            for v, p in enumerate(row):
                total += p * math.log2(p * len(head) / sum(other[v] for other in joint)) if p else 0
    return total


def test_information_by_hand():
    g = torch.Generator().manual_seed(0)
    for H, t, S in ((1, 1, 5), (2, 3, 8), (4, 7, 20)):
        a = torch.rand(H, t, S, generator=g).mul_(4).softmax(-1)
        a[0, 0, 2] = 0
        visual = list(range(1, S - 1))
        assert float(information(view_of(a, visual), None)) == pytest.approx(by_hand(a, visual), abs=1e-5)


@pytest.mark.parametrize(
    ("slope", "values"),
    [(0.4, [0.7475, 0.7116, 0.3975, 0.0224, 0.0014]), (0.2, [0.7078, 0.6040, 0.3787, 0.1082, 0.0299])],
)
def test_curve_of_the_card(slope, values):
    assert [0.75 * share(slope, i, 14.9) for i in (1, 8, 15, 24, 31)] == pytest.approx(values, abs=5e-5)


def test_steep_curves_are_steps():
    assert [share(40, i, 0) for i in (1, 79)] == pytest.approx([1, 0])


def test_toy_of_the_card():
    """T=4, V=8, B=4, x=1.5: in proportion 3.204, 2.665, 2.131."""
    parts = [share(0.4, i, 1.5) for i in (1, 2, 3)]
    assert [8 * p / sum(parts) for p in parts] == pytest.approx([3.204, 2.665, 2.131], abs=5e-4)


@pytest.mark.parametrize("layers", [3, 4, 6, 28, 32])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.6])
@pytest.mark.parametrize("slope", [0, 0.1, 0.4])
def test_every_curve_has_the_budget(layers, ratio, slope):
    method = AutoPrune()
    total = round(layers * 576 * (1 - ratio))
    if not 576 + layers - 1 <= total:
        with pytest.raises(ValueError, match="reachable is"):
            method.plan(layers, 576, Fraction(str(ratio)))
        return
    counts = method.curve(layers, 576, total, slope)
    assert sum(counts) == total and counts == sorted(counts, reverse=True) and counts[-1] >= 1
    assert method.plan(layers, 576, Fraction(str(ratio))) == dict.fromkeys(range(1, layers))


def test_the_least_budget():
    assert AutoPrune().curve(4, 8, 11, 0.4) == [8, 1, 1, 1]
    with pytest.raises(ValueError, match=r"0 <= ratio <= 0\.6562"):
        AutoPrune().plan(4, 8, Fraction(7, 10))


def test_samples_that_know_lose_their_rows_late():
    flat, steep = (AutoPrune().curve(32, 576, 32 * 144, slope) for slope in (0.1, 0.4))
    assert flat[-1] > steep[-1] and flat[2] < steep[2]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_counts_follow_the_maps(name):
    """Without clusters: generation equals masked columns, and counts are those of the information in the maps."""
    model, batch = shared(name), batch_of(name)
    with model.compressed("autoprune", ratio=0.4, recycled=0, gain=2.0, tower=False):
        run, last = greedy(model, batch), model.compression.last
        together = model.compression.last.layer_tokens
    full = FullLength(name, batch, run.tokens)
    close(run.logits, full.logits(full.survivors(last.layer_index)))
    maps = full.run(full.survivors(last.layer_index))[1][1]
    visual = [{i for image in full.visual(b) for i in image} for b in range(2)]
    asks = asking(full, visual, batch["input_ids"].shape[1])
    for b, mine in enumerate(visual):
        alive = sorted(mine & set(last.layer_index[1][b]))
        mi = by_hand(maps[b][:, asks[b]], alive)
        text = int(batch["attention_mask"][b].sum()) - len(mine)
        curve = AutoPrune().curve(4, len(mine), round(4 * len(mine) * 0.6), max(0, 0.4 - 2 * mi))
        assert [n[b] - text for n in together] == curve


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_autoprune_on_models(name, side):
    def put_of(batch, tokens, kept):
        full, prompt = FullLength(name, batch, tokens), batch["input_ids"].shape[1]
        visual = [{i for image in full.visual(b) for i in image} for b in range(2)]
        return recycling((1, 2, 3), kept, visual, asking(full, visual, prompt), prompt, merged, first=1)

    merged = []
    compare("autoprune", dict(ratio=0.4, tower=False), name, side, put_of)
    assert merged


@torch.no_grad()
def test_the_tower_has_a_say_in_the_first_cut():
    """What [CLS] looks at, plus .3 of the bits per row of text times what the text looks at."""
    model, batch = shared("llava"), batch_of("llava")
    with model.compressed("autoprune", ratio=0.4, recycled=0):
        run, last = greedy(model, batch), model.compression.last
    full, cls, image = FullLength("llava", batch, run.tokens), looks_by_hand("llava", batch), 0
    close(run.logits, full.logits(full.survivors(last.layer_index)))
    maps = full.run(full.survivors(last.layer_index))[1][0]
    for b in range(2):
        score = {}
        visual = [i for rows in full.visual(b) for i in rows]
        asks = asking(full, [set(visual)] * 2, full.prompt)[b]
        told = by_hand(maps[b][:, asks], visual) / len(asks)
        for rows in full.visual(b):
            score |= {j: float(cls[image, i] + 0.3 * told * maps[b][:, asks, j].mean()) for i, j in enumerate(rows)}
            image += 1
        stay = set(visual) & set(last.layer_index[1][b])
        order = sorted((j != full.prompt - 1, -score[j], j) for j in visual)
        assert 0 < len(stay) < len(visual) and stay == {j for *_, j in order[: len(stay)]}


@torch.no_grad()
def test_keep_is_a_mean_over_layers():
    model, batch = shared("llava"), batch_of("llava")
    with model.compressed("autoprune", keep=20):
        logits_of(model, batch)
        last = model.compression.last
    for b, images in enumerate(last.visual_tokens):
        text = int(batch["attention_mask"][b].sum()) - sum(images)
        assert sum(n[b] - text for n in last.layer_tokens) == 4 * 20 * len(images)


@pytest.mark.parametrize(
    "knobs", [dict(layer=0), dict(slope=-1), dict(gain=-0.1), dict(start=-1), dict(recycled=1), dict(tower=1)]
)
def test_bad_knobs(knobs):
    with pytest.raises(ValueError, match=f"{next(iter(knobs))}="):
        AutoPrune(**knobs)
