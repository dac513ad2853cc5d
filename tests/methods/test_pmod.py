"""p-MoD: the worked checks of its card, and the bare model whose rows wait, and whose MLPs are gated, by hand."""

import math
from fractions import Fraction

import pytest
import torch

from hf_compress.methods.decoder.pmod import PMoD, counts
from tests.ecosystem.test_trained import CHECK, engine
from tests.invariants.reference import (
    FullLength,
    bare,
    batch_of,
    close,
    fresh,
    greedy,
    logits_of,
    longer,
    options,
)
from tests.tiny import TOKEN_KEYS

MODELS = ["llava", "qwen2_5_vl", "qwen3_vl", "llava_window", "internvl", "gemma3", "cohere2_vision"]
KNOBS = options("pmod")
CARD = [576] * 8 + [486, 464, 440, 414, 388, 360, 331, 302, 273, 244, 215, 187, 161, 135, 111, 89] + [86] * 8


def test_the_card():
    assert counts(32, 576, 0.0) == CARD
    assert list(PMoD().plan(32, 576, 1 - Fraction(sum(CARD), 32 * 576)).values()) == CARD
    gate = 1 + 0.2 * math.tanh(0.5)
    assert gate == pytest.approx(1.0924, abs=1e-4) and gate * 3 + 3 == pytest.approx(6.277, abs=1e-3)


@pytest.mark.parametrize(("layers", "tokens"), [(4, 31), (32, 576), (28, 333)])
def test_the_ratio_is_met(layers, tokens):
    for percent in range(0, 85, 7):
        ratio = Fraction(percent, 100)
        plan = PMoD().plan(layers, tokens, ratio)
        assert sum(plan.values()) == round(layers * tokens * (1 - ratio))
        assert all(a >= b - 1 for a, b in zip(plan.values(), list(plan.values())[1:]))
    with pytest.raises(ValueError, match=r"reachable is 0 <= ratio <= 0\.85"):
        PMoD().plan(layers, tokens, Fraction(9, 10))


def routed(name, scale=3.0):
    """A compressed model whose routers say something, and what they are."""
    model = fresh(name).compress("pmod", **KNOBS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.compressor.decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / parameter.shape[-1] ** 0.5)
    return model, model.compressor.decoder


def by_hand(name, batch, tokens, routers):
    """(B, L, V) logits of the bare model at full length, and which rows of the prompt went through each layer."""
    full, through = FullLength(name, batch, tokens), []
    ratio = Fraction(str(KNOBS["ratio"]))
    visual = [[r for image in full.visual(b) for r in image] for b in range(len(full.valid))]
    layers = bare(name).get_decoder().layers
    for layer in range(full.layers + 1):  # one layer more is settled at a time
        seen, handles = {}, []
        for i, rows in enumerate(through):
            handles += hooks(layers[i], full, rows, visual, routers, i)
        if layer < full.layers:
            note = lambda _, args, seen=seen: seen.update(x=args[0])
            handles.append(layers[layer].register_forward_pre_hook(note))
        done = through + [[list(range(full.prompt))] * len(visual)] * (full.layers - layer)
        try:
            logits = full.run(full.survivors(done))[0]
        finally:
            for handle in handles:
                handle.remove()
        if layer == full.layers:
            return logits, through
        through.append([])
        for b, images in enumerate(visual):
            says = routers(seen["x"][b])[:, layer].tolist()
            plan = PMoD().plan(full.layers, len(images), ratio) if images else {}
            best = sorted(images, key=lambda r: (-says[r], r))[: plan.get(layer, 0)]
            real = full.valid[b, : full.prompt].nonzero()[:, 0].tolist()
            through[-1].append([r for r in real if r in best or r not in images])


def hooks(layer, full, rows, visual, routers, i):
    """Rows of the prompt that are not among `rows` wait, all visual ones are gated: where any of their sample waits."""
    wait, gated = (torch.zeros_like(full.valid) for _ in range(2))
    for b, (mine, images) in enumerate(zip(rows, visual)):
        wait[b, [r for r in images if r not in mine]] = True
        if wait[b].any():
            gated[b, images] = True
    gate = {}

    def enter(_, args):
        gate["g"] = torch.where(gated, 1 + 0.2 * routers(args[0])[..., i].tanh(), 1.0)[..., None]

    def scale(_, args, out):
        return out * gate["g"]

    def leave(_, args, out):
        y = out[0] if isinstance(out, tuple) else out
        return torch.where(wait[..., None], args[0] * gate["g"], y)

    end = getattr(layer, "post_feedforward_layernorm", layer.mlp)  # a norm behind the MLP would undo it
    return [
        layer.register_forward_pre_hook(enter),
        end.register_forward_hook(scale),
        layer.register_forward_hook(leave),
    ]


@pytest.mark.parametrize("kind", ["inputs", "equal"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_rows_take_layers_or_wait(name, kind):
    """Prompt and steps, with and without a cache; the cache of a layer holds who took it."""
    model, routers = routed(name)
    batch = batch_of(name, kind)
    run, last = greedy(model, batch), model.compression.last
    uncached = greedy(model, batch, use_cache=False)
    expected, through = by_hand(name, batch, run.tokens, routers)
    assert last.layer_index == through and len({len(rows[0]) for rows in through}) > 2
    close(run.logits, expected[:, batch["input_ids"].shape[1] - 1 :])
    close(uncached.logits, run.logits)


@torch.no_grad()
def test_right_padding():
    model, routers = routed("llava")
    batch = batch_of("llava", side="right")
    got = logits_of(model, batch)
    expected, _ = by_hand("llava", batch, batch["input_ids"][:, :1], routers)
    for b, mask in enumerate(batch["attention_mask"].bool()):
        close(got[b, mask], expected[b, mask])


@torch.no_grad()
def test_a_turn_of_text_sees_what_layers_hold():
    name = "llava"
    model, routers = routed(name)
    batch, more = batch_of(name), torch.randint(3, 80, (2, 5), generator=torch.Generator().manual_seed(1))
    first = greedy(model, batch, max_new_tokens=3)
    whole = longer(name, batch, torch.cat([first.tokens, more], 1))
    text = {key: value for key, value in whole.items() if key in TOKEN_KEYS}
    run = greedy(model, text, past_key_values=first.cache)
    tokens = torch.cat([first.tokens, more, run.tokens], 1)
    expected, _ = by_hand(name, batch, tokens, routers)
    close(run.logits, expected[:, whole["input_ids"].shape[1] - 1 :], atol=2e-4)
    beams = [model.generate(**batch, max_new_tokens=5, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)


def test_routers_learn_and_are_saved(tmp_path, monkeypatch):
    """Gradients are those of the loss; untrained ones are refused; weights come back."""
    monkeypatch.setattr(engine, "check_trained", CHECK)
    model, batch = fresh("llava").compress("pmod", **KNOBS), batch_of("llava")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[labels >= 90] = -100
    with pytest.raises(ValueError, match="method='pmod': its module is new"):
        model(**batch)
    model.train()
    assert not any(p.any() for p in model.compressor.parameters())
    model(**batch, labels=labels, use_cache=False).loss.backward()
    assert all(p.grad.any() for p in model.compressor.parameters())
    model, routers = routed("llava", scale=0.5)
    loss = model.train()(**batch, labels=labels, use_cache=False).loss
    loss.backward()
    grad, step, losses = routers.bias.grad[2].item(), 0.01, []
    with torch.no_grad():  # all rows of the layer alike: nothing else is chosen
        for change in (step, -step):
            routers.bias[2] += change
            losses.append(model(**batch, labels=labels, use_cache=False).loss.item())
            routers.bias[2] -= change
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(grad, rel=0.05, abs=2e-4)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing: method='pmod' takes part in what layers do"):
        model(**batch, labels=labels)
    model.gradient_checkpointing_disable()
    expected = logits_of(model.eval(), batch)
    model.compression.save(tmp_path)
    again = fresh("llava").compress("pmod", weights=tmp_path, **KNOBS)
    assert torch.equal(logits_of(again, batch), expected)
