"""transprune against the numbers of its card, and transitions taken by hand from the parts of the layers."""

from fractions import Fraction

import pytest
import torch

from hf_compress.methods.decoder.transprune import TransPrune, _shares, transition
from tests.invariants.language import FullLength, bare
from tests.invariants.reference import batch_of, close, greedy, logits_of, shared


def test_transitions_of_the_card():
    """(1,0) (1,0) (2,0) to (1,0) (0,2) (-2,0): lengths 1 2 1, weights .0900 .2447 .6652; the sums keep 0 and 2."""
    x, y = torch.tensor([(1.0, 0), (1, 0), (2, 0)]), torch.tensor([(1.0, 0), (0, 2), (-2, 0)])
    ratio, cosine = (y.norm(dim=-1) / x.norm(dim=-1))[None], torch.cosine_similarity(x, y, dim=-1)[None]
    every = torch.ones(1, 3, dtype=torch.bool)
    found = transition(ratio, cosine, every)
    torch.testing.assert_close(found, torch.tensor([[0.0900, 0.4895, 0.6652]]), atol=5e-5, rtol=0)
    scaled = _shares(found, every)
    torch.testing.assert_close(scaled, torch.tensor([[0.0723, 0.3932, 0.5344]]), atol=1e-4, rtol=0)
    total = scaled + _shares(torch.tensor([[0.5, 0.1, 0.4]]), every)
    torch.testing.assert_close(total, torch.tensor([[0.5723, 0.4932, 0.9344]]), atol=1e-4, rtol=0)


def test_padding_takes_no_part():
    valid = torch.tensor([[False, True, True]])
    found = transition(torch.ones(1, 3), torch.tensor([[-1.0, 0.2, 0.2]]), valid)
    assert found.tolist() == [[0.0, 0.5, 0.5]]


def test_plan_of_the_paper():
    """504 360 72 of 576 before 7, 9 and 12 of 32: a mean of 236.25; other targets are powers of the shares."""
    assert TransPrune().plan(32, 576, 1 - Fraction(945, 4) / 576) == {7: 504, 9: 360, 12: 72}
    with pytest.raises(ValueError, match=r"0 <= ratio <= 0\.77"):
        TransPrune().plan(32, 576, Fraction(79, 100))
    assert TransPrune(layers=(9, 12)).plan(32, 576, 1 - Fraction(9 * 576 + 3 * 360 + 20 * 72, 32 * 576)) == {
        9: 360,
        12: 72,
    }


@pytest.mark.parametrize("layers", [4, 6, 28, 32, 80])
@pytest.mark.parametrize("ratio", [0, 0.1, 0.4, 0.6])
def test_the_ratio_is_met(layers, ratio):
    at, plan = TransPrune().boundaries(layers), TransPrune().plan(layers, 1000, Fraction(str(ratio)))
    left, total = 1000, 0
    for layer in range(layers):
        assert plan.get(layer, left) <= left and (layer not in plan or layer in at)
        left = plan.get(layer, left)
        total += left
    assert abs(total - layers * 1000 * (1 - ratio)) <= layers / 2


def by_hand(parts, alive):
    """{row: transition} of one sample: parts are (x, y) of (L, D)."""
    out = dict.fromkeys(alive, 0.0)
    for x, y in parts:
        x, y = x[alive].double(), y[alive].double()
        weight = (1 - torch.cosine_similarity(x, y, dim=-1)).softmax(0)
        for i, value in zip(alive, (y.norm(dim=-1) / x.norm(dim=-1) * weight).tolist()):
            out[i] += value
    return out


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_window", "gemma3"])
@torch.no_grad()
def test_rows_stay_by_transitions_and_attention(name, side):
    """Cuts before 1 and 3: the second one counts what layer 0, layers 1 and 2 have changed."""
    model, batch = shared(name), batch_of(name, side=side)
    with model.compressed("transprune", ratio=0.4, layers=(1, 3)):
        logits_of(model, batch)
        last = model.compression.last
    full = FullLength(name, batch, batch["input_ids"][:, :1])
    layers, seen, hooks = bare(name).get_decoder().layers, {}, []
    for i, layer in enumerate(layers):
        for part in (layer.self_attn, layer.mlp):

            def note(_, args, kwargs, out, i=i):
                x = args[0] if args else kwargs["hidden_states"]
                seen.setdefault(i, []).append((x, out[0] if isinstance(out, tuple) else out))

            hooks.append(part.register_forward_hook(note, with_kwargs=True))
    try:
        for layer in (1, 3):
            seen.clear()
            held = [*last.layer_index[:layer], *[last.layer_index[layer - 1]] * (4 - layer)]
            maps = full.run(full.survivors(held))[1][layer].mean(1)
            for b in range(2):
                visual = {i for image in full.visual(b) for i in image}
                valid = batch["attention_mask"][b].nonzero()[:, 0].tolist()
                asks = [i for i in valid if i > max(visual)] or valid[-1:]
                alive, stay = visual & set(last.layer_index[layer - 1][b]), visual & set(last.layer_index[layer][b])
                moved = dict.fromkeys(alive, 0.0)
                for i in range(layer):
                    rows = by_hand([(x[b], y[b]) for x, y in seen[i]], last.layer_index[i][b])
                    moved = {j: moved[j] + rows[j] for j in alive}
                asked = {j: float(maps[b, asks, j].mean()) for j in alive}
                score = {j: moved[j] / sum(moved.values()) + asked[j] / sum(asked.values()) for j in alive}
                assert 0 < len(stay) < len(alive)
                assert stay == set(sorted(alive, key=lambda j: (-score[j], j))[: len(stay)])
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_generation_reads_the_prompt_alone(name):
    """Without a cache the same rows stay at every step."""
    model, batch = shared(name), batch_of(name)
    with model.compressed("transprune", ratio=0.4):
        close(greedy(model, batch, use_cache=False).logits, greedy(model, batch).logits)


@pytest.mark.parametrize("layers", [(0, 1), (3, 2), (1, 2, 3, 4), 2])
def test_bad_knobs(layers):
    with pytest.raises(ValueError, match="layers="):
        TransPrune(layers=layers)
