"""AIM against the numbers of its card and slow references."""

from fractions import Fraction

import pytest
import torch

from hf_compress import budget
from hf_compress.methods.decoder.aim import AIM, AIMMerge
from tests.invariants.language import FullLength, bare, embed
from tests.invariants.reference import batch_of, close, greedy, logits_of, shared


class Some:
    """Tokens with these embeddings (n, N, D)."""

    def __init__(self, x):
        self.embeddings, self.count, self.device = x, x.shape[1], x.device

    def __len__(self):
        return len(self.embeddings)


def merged(rows, keep):
    x = torch.tensor([rows], dtype=torch.float32)
    return AIMMerge().assign(Some(x), keep).apply(x)[0]


def test_one_step_of_the_card():
    """(1,0) (1,.1) (0,1) (0,2) (1,1) (-1,0), two merges: the pairs 0, 1 and 2, 3 become their means."""
    got = merged([(1, 0), (1, 0.1), (0, 1), (0, 2), (1, 1), (-1, 0)], 4)
    assert {tuple(round(v, 4) for v in row) for row in got.tolist()} == {(1, 0.05), (0, 1.5), (1, 1), (-1, 0)}


def test_members_of_a_step_count_alike():
    """A group of an earlier step counts as one token in the next: means of means, written out."""
    g = torch.Generator().manual_seed(0)
    for n, keep in ((9, 3), (16, 4), (7, 2), (12, 12), (5, 1)):
        x = torch.randn(2, n, 6, generator=g)
        got = AIMMerge().assign(Some(x), keep)
        for i, rows in enumerate(x):
            groups = [([j], rows[j]) for j in range(n)]
            while len(groups) > keep:
                r = min(len(groups) // 2, len(groups) - keep)
                groups = by_hand(groups, r)
            groups = sorted(groups, key=lambda group: min(group[0]))
            assert got.kept[i].tolist() == [min(members) for members, _ in groups]
            torch.testing.assert_close(got.apply(x)[i], torch.stack([v for _, v in groups]))


def by_hand(groups, r):
    """One step of bipartite matching over (members, vector), in the order of the release."""
    even, odd = groups[::2], groups[1::2]
    sim = [[float(torch.cosine_similarity(a[1], b[1], dim=0)) for b in odd] for a in even]
    order = sorted(range(len(even)), key=lambda i: -max(sim[i]))
    join = {i: sim[i].index(max(sim[i])) for i in order[:r]}
    out = [even[i] for i in order[r:]]
    for k, (members, vector) in enumerate(odd):
        mine = [even[i] for i, target in join.items() if target == k]
        every = members + [m for more, _ in mine for m in more]
        out.append((every, torch.stack([vector, *(v for _, v in mine)]).mean(0)))
    return out


def test_the_ramp_of_the_paper():
    """28 layers: everything up to 14, .875 .75 .625 .5 .375 .25 .125 for 15 to 21, nothing from 22 on."""
    method = AIM()
    parts = method.parts(28, None, Fraction(835, 1000), None)
    (_, merging, _), (_, ramp, _) = parts["vision"], parts["decoder"]
    assert float(1 - ramp) == pytest.approx(0.6607, abs=1e-4) and float(1 - merging) == pytest.approx(0.25, abs=1e-3)
    plan = method.plan(28, 800, ramp)
    assert [plan.get(i, 800) for i in range(28)] == [800] * 15 + [700, 600, 500, 400, 300, 200, 100] + [0] * 6


@pytest.mark.parametrize("layers", [4, 12, 28, 32])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.75, 0.9])
def test_the_ratio_is_met(layers, ratio):
    parts = AIM().parts(layers, None, Fraction(str(ratio)), None)
    left = budget.kept(1000, parts["vision"][1])
    plan = AIM().plan(layers, left, parts["decoder"][1])
    counts = [plan.get(i, left) for i in range(layers)]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) / (1000 * layers) == pytest.approx(1 - ratio, abs=0.02 if layers > 4 else 0.1)


def test_nothing_is_removed_at_ratio_zero():
    parts = AIM().parts(12, None, Fraction(0), None)
    assert parts["vision"][1] == 0 and set(AIM().plan(12, 50, parts["decoder"][1]).values()) == {50}


def test_importance_of_the_card():
    """Five products of a uniform weight with M = [1 0 0], [.7311 .2689 0], [.2119 .5761 .2119]."""
    m = torch.tensor([[1.0, 0, 0], [0.7311, 0.2689, 0], [0.2119, 0.5761, 0.2119]])
    asked = []

    class View:
        prompt = torch.ones(1, 3, dtype=torch.bool)

        def received(self, weight, *, source, sharpness):
            asked.append((source, sharpness))
            return weight @ m

    score = AIM().score(View())
    torch.testing.assert_close(score, torch.tensor([[0.9961, 0.0038, 0.0001]]), atol=1e-4, rtol=0)
    assert asked == [("own", 10.0)] * 5


@torch.no_grad()
def test_counts_fall_and_text_stays():
    """On a model: fewer visual rows enter, fewer go on from layer to layer, text is whole."""
    model, batch = shared("llava"), batch_of("llava")
    with model.compressed("aim", ratio=0.3):
        logits_of(model, batch)
        last = model.compression.last
    full = FullLength("llava", batch, batch["input_ids"][:, :1])
    visual = [{r for rows in full.visual(b) for r in rows} for b in range(2)]
    before = [len(visual[b] & set(last.layer_index[0][b])) for b in range(2)]
    assert all(n <= len(v) for n, v in zip(before, visual))
    for b in range(2):
        counts = [len(visual[b] & set(rows[b])) for rows in last.layer_index]
        assert counts == sorted(counts, reverse=True) and counts[-1] < counts[0]
        text = set(batch["attention_mask"][b].nonzero()[:, 0].tolist()) - visual[b]
        assert all(text <= set(rows[b]) for rows in last.layer_index)


@pytest.mark.parametrize("name", ["llava", "internvl", "llava_onevision"])
@torch.no_grad()
def test_generation_equals_the_prompt_merged_by_hand(name):
    """Means stand at the first members, all others are masked; later layers see what the layers before them left."""
    model, batch = shared(name), batch_of(name)
    with model.compressed("aim", ratio=0.5):
        run, last = greedy(model, batch), model.compression.last
    held = last.layer_index
    full = FullLength(name, batch, run.tokens)
    order = full.columns(held[0]).long().cumsum(1).sub(1).clamp(min=0)
    full, x = FullLength(name, batch, run.tokens, order), embed(name, batch)
    for b in range(2):
        for rows, left, crops in zip(full.images(b), last.visual_left[b], last.visual_crops[b]):
            for crop in crops:
                at = torch.tensor(rows)[crop.rows]
                stay = [i for i, row in enumerate(at.tolist()) if row in held[0][b]]
                answer = AIMMerge().assign(Some(x[b, at][None]), len(stay))
                assert answer.kept[0].tolist() == stay and len(stay) <= left
                x[b, at[answer.kept[0]]] = answer.apply(x[b, at][None])[0]
    put = lambda _, args: (torch.cat([x, args[0][:, x.shape[1] :]], 1), *args[1:])
    handle = bare(name).get_decoder().layers[0].register_forward_pre_hook(put)
    try:
        close(run.logits, full.logits(full.survivors(held)))
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(ratio=0.5, importance="page"), "importance='page' must be one of"),
        (dict(ratio=0.5, temperature=0), "temperature=0 must be a number above 0"),
    ],
)
def test_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        shared("llava").compress("aim", **knobs)


def test_combined_with_a_method_of_one_of_its_stages():
    with pytest.raises(ValueError, match=r"'fastervlm' and 'aim' both act in the vision stage"):
        shared("llava").compress(["fastervlm", "aim"], ratio=0.5)
