"""mustdrop against the numbers of its card, and rows looked at one by one on models."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from hf_compress.methods.decoder.mustdrop import MustDrop
from tests.invariants.language import FullLength, bare
from tests.invariants.reference import batch_of, close, greedy, logits_of, shared


def view_of(rows, key=()):
    """Visual rows at 0 .. V-1 that the text behind looks at with `rows` (t, V)."""
    a = torch.tensor([[*row, *[0.0] * len(rows)] for row in rows])
    t, S = a.shape
    at = torch.arange(S)[None]
    visual = at < S - t
    marked = torch.zeros(1, S)
    marked[0, list(key)] = 1

    def attention(source, voters, over):
        assert voters[0].tolist() == [False] * (S - t) + [True] * t
        return (a.amax(0) if over == "max" else a.mean(0))[None]

    return SimpleNamespace(
        visual=visual, removable=visual, valid=at >= 0, prompt=at >= 0, first=at, last=S - 1 - at, speaks=at == S - 1,
        image=torch.where(visual, 0, -1), memory={"key": marked}, attention=attention,
    )  # fmt: skip


M = [[0.30, 0.0004, 0.0002, 0.01], [0.20, 0.0002, 0.0004, 0.0006]]


def kept(method, keep=None, key=()):
    stays = method.decide(view_of(M, key), None if keep is None else [keep]).stays(6)[0]
    return [i for i in range(4) if stays[i]]


def test_thresholds_of_the_card():
    """G = .5 .0006 .0006 .0106 of .5118: (.001, .001) drops none, (.01, .01) drops 1 and 2; key tokens stay."""
    assert kept(MustDrop()) == [0, 1, 2, 3]
    assert kept(MustDrop(share=0.01, peak=0.01)) == [0, 3]
    assert kept(MustDrop(share=0.01, peak=0.01), key=[2]) == [0, 2, 3]


def test_ranks_are_the_same_order():
    assert [kept(MustDrop(), n) for n in (1, 2, 3)] == [[0], [0, 3], [0, 1, 3]]
    assert [kept(MustDrop(), n, [1, 2]) for n in (1, 2, 3)] == [[1], [1, 2], [0, 1, 2]]


def test_plan():
    """Four cuts of 32 layers by one factor."""
    assert MustDrop().boundaries(32) == (3, 7, 11, 15) and MustDrop().boundaries(4) == (1, 2, 3)
    half = 1 - Fraction(3 * 512 + 4 * 256 + 4 * 128 + 4 * 64 + 17 * 32, 32 * 512)
    assert MustDrop().plan(32, 512, half) == {3: 256, 7: 128, 11: 64, 15: 32}


def looks_by_hand(name, batch):
    """(images, N): what the [CLS] row of the tower attends to, mean over heads."""
    model = bare(name)
    tower, seen = model.base_model.vision_tower, []
    layers = tower.encoder.layers if hasattr(tower, "encoder") else tower.vision_model.encoder.layers
    block = layers[model.config.vision_feature_layer].self_attn
    hook = block.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(kwargs.get("hidden_states", args[0] if args else None)),
        with_kwargs=True,
    )
    try:
        model.base_model.get_image_features(batch["pixel_values"])
    finally:
        hook.remove()
    x = seen[0]
    heads = lambda y: y.view(*x.shape[:2], -1, block.head_dim).transpose(1, 2)
    q, k = heads(block.q_proj(x)), heads(block.k_proj(x))
    return (q[:, :, :1] @ k.mT * block.scale).softmax(-1)[:, :, 0, 1:].mean(1)


def keys_by_hand(name, batch):
    """Per sample, the rows of the tokens of highest [CLS] attention, ceil(.08 N) of every image."""
    cls = looks_by_hand(name, batch)
    full, out, image = FullLength(name, batch, batch["input_ids"][:, :1]), [], 0
    for b in range(len(batch["input_ids"])):
        mine = set()
        for rows in full.visual(b):
            order = cls[image].argsort(descending=True, stable=True)[: -(-8 * len(rows) // 100)]
            mine |= {rows[i] for i in order.tolist()}
            image += 1
        out.append(mine)
    return out


@pytest.mark.parametrize("budget", [0.4, "adaptive"])
@torch.no_grad()
def test_rows_on_a_model(budget):
    """Key tokens are those of the tower; at every cut those that look largest stay, or those above a threshold."""
    model, batch = shared("llava"), batch_of("llava")
    knobs = {"share": 0.03, "peak": 0.03} if budget == "adaptive" else {}
    with model.compressed("mustdrop", budget, truncate=False, **knobs):
        run, last = greedy(model, batch), model.compression.last
    method, keys = MustDrop(**knobs), keys_by_hand("llava", batch)
    full = FullLength("llava", batch, run.tokens)
    close(run.logits, full.logits(full.survivors(last.layer_index)))
    maps = full.run(full.survivors(last.layer_index))[1]
    dropped = 0
    for layer in (1, 2, 3):
        for b in range(2):
            visual = {i for image in full.visual(b) for i in image}
            asks = [i for i in range(full.prompt) if full.valid[b, i] and i > max(visual)] or [full.prompt - 1]
            alive, stay = visual & set(last.layer_index[layer - 1][b]), visual & set(last.layer_index[layer][b])
            m = maps[layer - 1][b].mean(0)
            total = float(m[asks][:, sorted(alive)].sum())
            above = {
                j: max(float(m[asks, j].sum()) / (method.share * total), float(m[asks, j].max()) / method.peak)
                for j in alive
            }
            order = sorted((j != full.prompt - 1, j not in keys[b], -above[j], j) for j in alive)
            wanted = [j for *_, j in order[: len(stay)]]
            if budget == "adaptive":
                wanted = [j for j in alive if above[j] >= 1 or j in keys[b] or j == full.prompt - 1]
            assert stay == set(wanted) and stay
            dropped += len(alive) - len(stay)
    assert dropped


@pytest.mark.parametrize("name", ["llava", "llava_window", "internvl"])
@torch.no_grad()
def test_truncated_caches(name):
    """What is generated sees in every layer what reached the last one."""
    model, batch = shared(name), batch_of(name)
    with model.compressed("mustdrop", ratio=0.4):
        run, last = greedy(model, batch), model.compression.last
    full = FullLength(name, batch, run.tokens)
    late, left = torch.arange(full.rows)[:, None] >= full.prompt, full.columns(last.layer_index[-1])[:, None, None]
    close(run.logits, full.logits([see & (left | ~late) for see in full.survivors(last.layer_index)]))


@torch.no_grad()
def test_ratio_is_met_and_zero_is_nothing():
    model, batch = shared("llava"), batch_of("llava")
    plain = logits_of(model, batch)
    with model.compressed("mustdrop", ratio=0.0):
        assert torch.equal(logits_of(model, batch), plain)
    with model.compressed("mustdrop", keep=24):
        logits_of(model, batch)
        last = model.compression.last
    for b, images in enumerate(last.visual_tokens):
        text = int(batch["attention_mask"][b].sum()) - sum(images)
        assert abs(sum(n[b] - text for n in last.layer_tokens) - 4 * 24 * len(images)) <= 4


@pytest.mark.parametrize("knobs", [dict(share=0), dict(peak=2), dict(key=1), dict(truncate=1), dict(layers=(2, 1))])
def test_bad_knobs(knobs):
    with pytest.raises(ValueError, match=f"{next(iter(knobs))}="):
        MustDrop(**knobs)
