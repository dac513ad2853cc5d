"""CATP against the numbers of its card, and prompts of several images looked at row by row."""

from fractions import Fraction
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from hf_compress import budget
from hf_compress.methods.decoder.catp import CATP, likeness
from hf_compress.tensors.diversity import facilities
from tests.invariants.language import FullLength, bare, embed
from tests.invariants.reference import batch_of, close, greedy, shared


def value(picks, similar, bonus):
    return sum(max(similar[i][j] for j in picks) for i in range(len(similar))) + sum(bonus[j] for j in picks)


SIMILAR, TEXT = [[1, 0.9, 0.1], [0.9, 1, 0.2], [0.1, 0.2, 1]], [0.2, 0.9, 0.5]


def test_values_of_the_card():
    """f{0,1} = 2.97, f{0,2} = 3.39, f{1,2} = 3.88; greedily 1 comes first (2.73)."""
    bonus = [0.7 * t for t in TEXT]
    assert [value(c, SIMILAR, bonus) for c in combinations(range(3), 2)] == pytest.approx([2.97, 3.39, 3.88], abs=1e-6)
    assert max(range(3), key=lambda j: value([j], SIMILAR, bonus)) == 1
    assert value([1], SIMILAR, bonus) == pytest.approx(2.73)


def test_facilities_of_the_card():
    """Vectors with the similarities of the card, as cosines: 2 s - 1."""
    cosines = 2 * torch.tensor(SIMILAR, dtype=torch.float64) - 1
    values, vectors = torch.linalg.eigh(cosines)
    assert values.min() > 0
    x = (vectors * values.sqrt()).float()[None]
    assert facilities(x, torch.tensor([[0.7 * t for t in TEXT]]), 2).tolist() == [[1, 2]]


def test_facilities_by_hand():
    g = torch.Generator().manual_seed(0)
    for n, d, k in ((1, 3, 1), (5, 2, 5), (12, 4, 6), (20, 6, 3)):
        x, bonus = torch.randn(2, n, d, generator=g), torch.rand(2, n, generator=g)
        for b, found in enumerate(facilities(x, bonus, k).tolist()):
            unit = F.normalize(x[b].double(), dim=-1)
            similar, picks = ((unit @ unit.T + 1) / 2).tolist(), []
            for _ in range(k):
                rest = [j for j in range(n) if j not in picks]
                picks.append(max(rest, key=lambda j: (value([*picks, j], similar, bonus[b].tolist()), -j)))
            assert found == picks


def test_ranking_of_the_card():
    """News .02 -.01 .05 and likeness .1 .5 0 make .08 .30 .05."""
    news, like = torch.tensor([0.02, -0.01, 0.05]), torch.tensor([0.1, 0.5, 0.0])
    torch.testing.assert_close(news.clamp(min=0) + 0.6 * like, torch.tensor([0.08, 0.30, 0.05]))


def test_shares_of_the_card():
    """T=32, K=6: R = ratio / .875; half of it goes before the language model."""
    parts = CATP().parts(32, None, Fraction(7, 10), None)
    assert parts["vision"][1] == Fraction(4, 10) and CATP().first(32) == 7
    before, inside = 1 - parts["vision"][1], 1 - parts["decoder"][1]
    assert before * inside == Fraction(3, 10)
    assert parts["decoder"][0].boundaries(32) == range(7, 9)
    with pytest.raises(ValueError, match=r"0 <= ratio < 0\.875"):
        CATP().parts(32, None, Fraction(9, 10), None)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_onevision"])
@torch.no_grad()
def test_demonstrations_go_first(name):
    """Generation equals masked columns; both cuts take those that rank lowest, and together they meet the budget."""
    model, batch = shared(name), batch_of(name)
    with model.compressed("catp", ratio=0.4, layer=2):
        run, last = greedy(model, batch), model.compression.last
    kept, full = last.layer_index, FullLength(name, batch, run.tokens)
    order = None
    if bare(name).base_model.__class__.__name__.startswith("Llava"):  # numbered anew behind the first part
        order = full.columns(kept[0]).long().cumsum(1).sub(1).clamp(min=0)
        full = FullLength(name, batch, run.tokens, order)
    states, hooks = {}, []
    for i in (2, 3):
        note = lambda _, args, i=i: states.update({i: args[0]})
        hooks.append(bare(name).get_decoder().layers[i].register_forward_pre_hook(note))
    try:
        logits, maps = full.run(full.survivors(kept, order))
    finally:
        for hook in hooks:
            hook.remove()
    close(run.logits, logits[:, full.prompt - 1 :])
    for b in range(2):
        images = [set(image) & set(kept[0][b]) for image in full.visual(b)]
        shown, query = set().union(*images[:-1]), images[-1]
        text = [i for i in kept[0][b] if i > max(query)] or kept[0][b][-1:]
        asks = sorted({*text, *query})
        news = (maps[1][b, :, full.prompt - 1] - maps[0][b, :, full.prompt - 1]).mean(0).clamp(min=0)
        x = states[2][b]
        among = shown or query
        score = {j: float(news[j] + 0.6 * F.cosine_similarity(x[j], x[asks].mean(0), dim=0)) for j in among}
        if not shown:  # nothing is like the question's
            score = {j: float(maps[1][b, :, full.prompt - 1, j].mean()) for j in among}
        stay = among & set(kept[2][b])
        assert 0 < len(stay) < len(among) and stay == best(score, len(stay))
        if shown:
            assert query <= set(kept[2][b])
            x = states[3][b]
            score = {j: float(F.cosine_similarity(x[j], x[sorted(stay)].mean(0), dim=0)) for j in query}
            left = query & set(kept[3][b])
            assert 0 < len(left) < len(query) and left == best(score, len(left)) and stay <= set(kept[3][b])
        whole = sum(map(len, full.visual(b)))
        total = sum(len(set(rows[b]) & (shown | query)) for rows in kept)
        assert abs(1 - total / (4 * whole) - 0.4) < (1 + len(images)) / whole


def best(score, count):
    return set(sorted(score, key=lambda j: (-score[j], j))[:count])


@torch.no_grad()
def test_first_part():
    """Per image: what represents it and is like the text behind it."""
    model, batch = shared("llava"), batch_of("llava")
    with model.compressed("catp", ratio=0.4, layer=2):
        greedy(model, batch, max_new_tokens=1)
        last = model.compression.last
    full, x = FullLength("llava", batch, batch["input_ids"][:, :1]), embed("llava", batch)
    for b in range(2):
        for rows, kept in zip(full.visual(b), last.visual_kept[b], strict=True):
            text = [i for i in range(full.prompt) if full.valid[b, i] and i > max(rows)]
            text = [i for i in text if not any(i in image for image in full.visual(b))]
            unit = F.normalize(x[b, rows].double(), dim=-1)
            bonus = [0.0] * len(rows)
            if text:
                bonus = (0.35 * (1 + unit @ F.normalize(x[b, text].double().mean(0), dim=0))).tolist()
            similar, picks = ((unit @ unit.T + 1) / 2).tolist(), []
            for _ in range(budget.kept(len(rows), CATP(layer=2).parts(4, None, Fraction(2, 5), None)["vision"][1])):
                rest = [j for j in range(len(rows)) if j not in picks]
                picks.append(max(rest, key=lambda j: (value([*picks, j], similar, bonus), -j)))
            assert kept == sorted(picks)


def test_likeness_to_nothing():
    assert likeness(torch.ones(1, 3, 2), torch.zeros(1, 3, dtype=torch.bool)).tolist() == [[0.0] * 3]


@pytest.mark.parametrize("knobs", [dict(layer=1), dict(relevance=-1), dict(context=-1)])
def test_bad_knobs(knobs):
    with pytest.raises(ValueError, match=f"{next(iter(knobs))}="):
        CATP(**knobs)
