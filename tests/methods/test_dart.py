"""DART against the numbers of its card and a walk from pivot to pivot, row by row."""

import math
from types import SimpleNamespace

import pytest
import torch

from hf_compress.methods.decoder.dart import DART
from tests.invariants.language import FullLength, bare
from tests.invariants.reference import batch_of, close, greedy, logits_of, shared

F6 = [[3, 0, 1], [4, 3, 0], [0, 2, 1], [-5, 1, 2], [3, 4, 1], [-1, -3, 2]]


def view_of(states, norms, image, **changes):
    """The rows of a batch: states (B, S, D), norms (B, S) of keys, image (B, S)."""
    image = torch.as_tensor(image)
    B, S = image.shape
    at = torch.arange(S).expand(B, -1)
    view = SimpleNamespace(
        final=states,
        keys=lambda source: norms[..., None],
        image=image,
        visual=image >= 0,
        removable=image >= 0,
        valid=torch.ones(B, S, dtype=torch.bool),
        prompt=torch.ones(B, S, dtype=torch.bool),
        speaks=at == S - 1,
        first=at,
        last=S - 1 - at,
    )
    vars(view).update(changes)
    return view


def kept(method, view, *counts):
    return [row.nonzero()[:, 0].tolist() for row in method.decide(view, list(counts)).stays(view.valid.shape[1])]


def by_hand(states, norms, visual, asks, keep, v, t):
    """The walk of one prompt over lists of rows."""
    cosine = lambda a, b: float(torch.cosine_similarity(states[a], states[b], dim=0))
    own = sorted(visual, key=lambda i: (-float(norms[i]), i))[:v]
    pivots = own + sorted(asks, key=lambda i: (-float(norms[i]), i))[:t]
    chosen = own[:keep]
    each = math.ceil((keep - len(own)) / len(pivots)) if keep > len(own) else 0
    for pivot in pivots:
        free = sorted((i for i in visual if i not in chosen), key=lambda i: (cosine(i, pivot), i))
        chosen += free[: min(each, keep - len(chosen))]
    return sorted(chosen)


def test_card():
    """Pivot 3 takes 0 and 1 (cosines -.7506 and -.6208), the text pivot (0, 1, 0) takes 5."""
    states = torch.tensor([[*F6, [0, 1, 0]]], dtype=torch.float32)
    view = view_of(states, torch.tensor([[4.0, 7, 3, 8.5, 8, 6, 1]]), [[0] * 6 + [-1]])
    assert kept(DART(visual=1, text=1), view, 4) == [[0, 1, 3, 5, 6]]


@torch.no_grad()
def test_random_prompts_against_the_walk():
    g = torch.Generator().manual_seed(0)
    for trial in range(60):
        n, before, asks, v, t = (int(torch.randint(1, 7, (1,), generator=g)) for _ in range(5))
        n, t = 3 * n, t - 1
        S = before + n + asks
        states, norms = torch.randn(1, S, 5, generator=g), torch.rand(1, S, generator=g)
        image = [-1] * before + [0] * n + [-1] * asks
        keep = int(torch.randint(1, n + 1, (1,), generator=g))
        expected = by_hand(states[0], norms[0], range(before, before + n), range(before + n, S), keep, v, t)
        got = kept(DART(visual=v, text=t), view_of(states, norms, [image]), keep)
        assert got == [[*range(before), *expected, *range(before + n, S)]], trial


def test_ties_go_to_the_lower_index():
    got = kept(DART(visual=1, text=0), view_of(torch.ones(1, 6, 2), torch.ones(1, 6), [[0, 0, 0, 0, 0, -1]]), 3)
    assert got == [[0, 1, 2, 5]]


def test_a_row_that_answers_are_predicted_from_stays():
    """A prompt that ends with its image, and whose last row is like all others."""
    view = view_of(torch.ones(1, 5, 2), torch.ones(1, 5), [[-1, 0, 0, 0, 0]])
    assert kept(DART(visual=1, text=2), view, 2) == [[0, 1, 4]]


def test_samples_of_a_batch_are_as_alone():
    g = torch.Generator().manual_seed(1)
    states, norms = torch.randn(3, 14, 4, generator=g), torch.rand(3, 14, generator=g)
    image = torch.tensor([[0] * 9 + [-1] * 5, [-1] * 3 + [0] * 5 + [1] * 4 + [-1] * 2, [-1] * 14])
    together = kept(DART(), view_of(states, norms, image), 5, 4, 0)
    for b, n in enumerate((5, 4, 0)):
        assert kept(DART(), view_of(states[b : b + 1], norms[b : b + 1], image[b : b + 1]), n) == [together[b]]
    each = kept(DART(scope="per_image"), view_of(states, norms, image), 5, 5, 0)
    shares = [sum(int(image[1, i]) == part for i in each[1]) for part in (0, 1)]
    assert shares == [3, 2]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_keys_and_states_are_those_of_the_model(name):
    """What stays follows from the layer's own keys and the states behind the final norm, computed by hand."""
    model, batch = shared(name), batch_of(name)
    with model.compressed("dart", ratio=0.25, layer=2, visual=2, text=2):
        logits_of(model, batch)
        last = model.compression.last
    full, states, keys = FullLength(name, batch, batch["input_ids"][:, :1]), [], []
    decoder = bare(name).get_decoder()
    attention = decoder.layers[1].self_attn
    hooks = [
        decoder.layers[2].register_forward_pre_hook(lambda _, args: states.append(decoder.norm(args[0]))),
        attention.k_proj.register_forward_hook(lambda _, args, out: keys.append(out)),
    ]
    try:
        full.run([full.causal(i) for i in range(full.layers)])
    finally:
        for hook in hooks:
            hook.remove()
    norms = keys[0].norm(dim=-1)  # rotations leave it as it is
    for b, rows in enumerate(last.layer_index[2]):
        visual = [i for image in full.visual(b) for i in image]
        valid = batch["attention_mask"][b].nonzero()[:, 0].tolist()
        asks = [i for i in valid if i > max(visual)] or valid[-1:]
        count = len(set(rows) & set(visual))
        assert 2 < count < len(visual) - 1
        expected = by_hand(states[0][b], norms[b], visual, asks, count, 2, 2)
        assert sorted(set(rows) & set(visual)) == expected


def test_generation_reads_the_prompt_alone():
    """Without a cache the same rows stay at every step."""
    model, batch = shared("llava"), batch_of("llava")
    with model.compressed("dart", ratio=0.4, layer=1, visual=2, text=2):
        close(greedy(model, batch, use_cache=False).logits, greedy(model, batch).logits)


@pytest.mark.parametrize("knobs", [dict(visual=0), dict(text=-1), dict(visual=1.5)])
def test_bad_knobs(knobs):
    with pytest.raises(ValueError, match=f"{next(iter(knobs))}="):
        DART(**knobs)
