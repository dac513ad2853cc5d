"""fitprune against the numbers of its card, and the fit against maps looked at row by row."""

from fractions import Fraction
from itertools import accumulate, pairwise

import pytest
import torch

from hf_compress import budget
from hf_compress.calibrate import fitted_schedule
from hf_compress.methods.decoder.fitprune import GONE, PUBLISHED, FitPrune, tolerance
from tests.invariants.language import FullLength
from tests.invariants.reference import alone, batch_of, logits_of, shared, unchanged


@pytest.mark.parametrize(("setting", "mean"), list(zip(PUBLISHED, [492.53, 362.47, 244.97, 130.59, 72.84])))
def test_published_counts(setting, mean):
    """The lists of the release, exactly, at the means that they have before each layer."""
    counts = [576 - gone for gone in accumulate(setting)][:31]
    plan = FitPrune().plan(32, 576, 1 - Fraction(576 + sum(counts), 32 * 576))
    assert list(plan.values()) == counts and (576 + sum(counts)) / 32 == pytest.approx(mean, abs=0.005)


def test_settings_remove_ever_more():
    assert all(a <= b for fewer, many in pairwise(GONE) for a, b in zip(fewer, many))


@pytest.mark.parametrize("layers", [4, 6, 28, 32, 40])
@pytest.mark.parametrize("ratio", [0, 0.1, 0.3, 0.5, 0.7])
def test_the_ratio_is_met(layers, ratio):
    plan = FitPrune().plan(layers, 500, Fraction(str(ratio)))
    counts = [plan.get(i, 500) for i in range(layers)]
    assert counts == sorted(counts, reverse=True)
    assert abs(sum(counts) - layers * 500 * (1 - ratio)) <= layers / 2


def test_reach():
    with pytest.raises(ValueError, match=r"before layers \(2, 3\) of 4: of 10 .* 0 <= ratio <= 0\.45"):
        FitPrune(layer=2).plan(4, 10, Fraction(1, 2))
    with pytest.raises(ValueError, match=r"layer=4 .* 1 <= layer < 4"):
        FitPrune(layer=4).plan(4, 10, Fraction(1, 2))
    with pytest.raises(ValueError, match="layer=0"):
        FitPrune(layer=0)


def test_tolerances_of_the_card():
    """text .6 .1 .4 .2, image .1 .5 .2 .2: nothing goes with .3, 3 with .5, 2 and 3 with .7."""
    found = tolerance(torch.tensor([0.6, 0.1, 0.4, 0.2]), torch.tensor([0.1, 0.5, 0.2, 0.2]))
    gone = [[i for i, t in enumerate(found.tolist()) if t <= alpha + 1e-6] for alpha in (0.3, 0.5, 0.7)]
    assert gone == [[], [3], [2, 3]]


def shares(maps, visual, asks):
    """{row: (text, image)} from a map (H, L, L), row by row."""
    best = maps.amax(0)
    mean = lambda j, rows: sum(float(best[i, j]) for i in rows) / len(rows)
    return {j: (mean(j, asks), mean(j, visual)) for j in visual}


def rows_of(full, batch, b):
    visual = [i for image in full.visual(b) for i in image]
    valid = batch["attention_mask"][b].nonzero()[:, 0].tolist()
    return visual, [i for i in valid if i > max(visual)] or valid[-1:]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("side", "rank"), [("left", "product"), ("right", "product"), ("left", "fair"), ("left", "text")]
)
@torch.no_grad()
def test_the_lowest_go(name, side, rank):
    """Two cuts, each by the layer before it, with what is left."""
    model, batch = shared(name), batch_of(name, side=side)
    with model.compressed("fitprune", ratio=0.4, layer=2, rank=rank):
        logits_of(model, batch)
        last = model.compression.last
    full = FullLength(name, batch, batch["input_ids"][:, :1])
    for layer in (2, 3):
        held = [*last.layer_index[:layer], *[last.layer_index[layer - 1]] * (4 - layer)]
        maps = full.run(full.survivors(held))[1][layer - 1]
        for b in range(2):
            visual, asks = rows_of(full, batch, b)
            alive, stay = (set(last.layer_index[at][b]) & set(visual) for at in (layer - 1, layer))
            score = shares(maps[b], sorted(alive), asks)
            see = {j: sum(i >= j for i in alive) for j in alive}
            worth = {j: t * {"product": i, "fair": i / see[j], "text": 1.0}[rank] for j, (t, i) in score.items()}
            best = [j for _, j in sorted((-w, j) for j, w in worth.items())]
            assert 0 < len(stay) < len(alive) and stay == set(best[: len(stay)])


# -- the fit ----------------------------------------------------------------------------------------------------------
def may_go(score, alpha):
    """Rows that are, by both, among the lowest that together have at most alpha of the sum."""
    out = []
    for by in (0, 1):
        order = sorted(score, key=lambda j: score[j][by])
        total, mass, mine = sum(s[by] for s in score.values()), 0.0, set()
        for j in order:
            mass += score[j][by]
            if mass > alpha * total + 1e-9:
                break
            mine.add(j)
        out.append(mine)
    return out[0] & out[1]


@torch.no_grad()
def test_fitted_schedule():
    """Levels are what one tolerance leaves, layer by layer; their mean comes as near to the ratio as tolerances do."""
    model, batch = shared("llava"), batch_of("llava")
    batches = [batch, alone("llava", batch, 1)]
    with unchanged(model):
        found = fitted_schedule(model, batches, ratio=0.4, progress=False)
    scores, images, n = [], 0, 0
    for one in batches:
        full = FullLength("llava", one, one["input_ids"][:, :1])
        maps = full.run([full.causal(i) for i in range(4)])[1]
        for b in range(len(one["input_ids"])):
            visual, asks = rows_of(full, one, b)
            scores.append([shares(maps[layer][b], visual, asks) for layer in range(3)])
            images, n = images + len(full.visual(b)), len(full.visual(b)[0])

    def levels(alpha):
        left = [n]
        for layer in range(3):
            gone = [set().union(*(may_go(s[i], alpha) for i in range(layer + 1))) for s in scores]
            total = sum(len(s[0]) - len(g) for s, g in zip(scores, gone))
            left.append(max(1, round(total / images)))
        return left

    tried = {tuple(levels(alpha / 200)) for alpha in range(201)}
    assert found.levels in tried
    assert abs(sum(found.levels) - 4 * n * 0.6) <= min(abs(sum(t) - 4 * n * 0.6) for t in tried)
    with model.compressed("fitprune", schedule=found):
        logits_of(model, batch)
        assert budget.cost(found) == sum(found.levels) / 4
        kept = [rows[1] - rows[0] for rows in zip(*model.compression.last.layer_tokens)]
    assert len(kept) == 2


def test_fit_refusals():
    model, batch = shared("llava"), batch_of("llava")
    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    for batches, knobs, message in (
        ([], {"ratio": 0.5}, "batches=list"),
        ([batch], {"ratio": 0.9}, "cannot be reached"),
        ([batch], {"ratio": 1}, "ratio=1"),
        ([text], {"ratio": 0.5}, r"batches\[0\] shows no image"),
    ):
        with unchanged(model), pytest.raises(ValueError, match=message):
            fitted_schedule(model, batches, **knobs)
    with unchanged(shared("llama")), pytest.raises(ValueError, match="visual tokens"):
        fitted_schedule(shared("llama"), [text], ratio=0.5)
    with model.compressed("fastv", ratio=0.4, layer=1), pytest.raises(ValueError, match="model is compressed"):
        fitted_schedule(model, [batch], ratio=0.5)
