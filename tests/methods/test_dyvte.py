"""DyVTE: the worked check of its card, and the bare model without visual columns from the exit of each sample on."""

from fractions import Fraction

import pytest
import torch

from hf_compress.methods.decoder.dyvte import DyVTE
from tests.ecosystem.test_trained import CHECK, engine
from tests.invariants.reference import FullLength, bare, batch_of, close, fresh, greedy, logits_of

MODELS = ["llava", "qwen2_5_vl", "llava_window", "gemma3"]


def test_the_card():
    """Of 8 layers three see the image: .625 is removed; between whole layers the next one sees the rest."""
    assert DyVTE().plan(8, 576, Fraction(5, 8)) == {3: 0}
    assert DyVTE().plan(8, 576, Fraction(9, 16)) == {3: 288, 4: 0}
    assert DyVTE().plan(4, 30, Fraction(1, 10)) == {3: 18}
    for ratio in (Fraction(1, 10), Fraction(2, 5), Fraction(3, 4)):
        plan, left, total = DyVTE().plan(4, 31, ratio), 31, 0
        for layer in range(4):
            left = plan.get(layer, left)
            total += left
        assert total == round(4 * 31 * (1 - ratio))
    with pytest.raises(ValueError, match=r"one layer of 8 at least; reachable is 0 <= ratio <= 0\.875"):
        DyVTE().plan(8, 576, Fraction(9, 10))


def routed(name, seed, bias=0.0):
    model = fresh(name).compress("dyvte", ratio="adaptive", bias=bias)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.compressor.decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model, model.compressor.decoder


def exits(name, batch, routers, bias=0.0):
    """The first layer that each sample goes through without visual rows, by loops over the bare model."""
    full, out = FullLength(name, batch, batch["input_ids"][:, :1]), []
    for b in range(len(full.valid)):
        visual = [r for image in full.visual(b) for r in image]
        states, handles = [], []
        for layer in bare(name).get_decoder().layers:
            handles.append(layer.register_forward_pre_hook(lambda _, args, states=states: states.append(args[0])))
        full.run([full.causal(i) for i in range(full.layers)])  # nothing has left before the exit
        for handle in handles:
            handle.remove()
        real = full.valid[b].nonzero()[:, 0].tolist()
        text, last = [r for r in real if r > max(visual)][:-1], real[-1]
        out.append(full.layers)
        for layer in range(1, full.layers):
            x = states[layer][b]
            feature = torch.cat([x[text].mean(0) if text else x[last], x[last]])
            first, _, second = routers[layer - 1]
            stay, leave = torch.nn.functional.gelu(feature @ first.weight.T) @ second.weight.T
            if leave + bias > stay:
                out[-1] = layer
                break
    return out


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_each_sample_has_its_exit(name):
    found, batch = set(), batch_of(name)
    for seed in range(3):
        model, routers = routed(name, seed)
        run, last = greedy(model, batch), model.compression.last
        expected = exits(name, batch, routers)
        full = FullLength(name, batch, run.tokens)
        for b, leaves in enumerate(expected):
            visual = {r for image in full.visual(b) for r in image}
            for layer, rows in enumerate(last.layer_index):
                assert visual & set(rows[b]) == (visual if layer < leaves else set())
        close(run.logits, full.logits(full.survivors(last.layer_index)))
        close(greedy(model, batch, use_cache=False).logits, run.logits)
        found |= set(expected)
    assert len(found) > 1


@torch.no_grad()
def test_a_bias_moves_the_exit():
    batch = batch_of("llava", side="right")
    for bias, layer in ((1e4, 1), (-1e4, 4)):
        model, routers = routed("llava", 0, bias)
        logits_of(model, batch)
        visual = [sum(s) for s in model.compression.last.visual_tokens]
        text = [n - v for n, v in zip(batch["attention_mask"].sum(1).tolist(), visual)]
        sizes = model.compression.last.layer_tokens
        assert sizes == [[t + v * (i < layer) for t, v in zip(text, visual)] for i in range(4)]
        assert exits("llava", batch, routers, bias) == [layer] * 2


def test_routers_are_wanted_and_saved(tmp_path, monkeypatch):
    """Only where they decide; new ones are refused."""
    batch = batch_of("llava")
    assert not hasattr(fresh("llava").compress("dyvte", ratio=0.5), "compressor")
    model, _ = routed("llava", 1)
    expected = logits_of(model, batch)
    monkeypatch.setattr(engine, "check_trained", CHECK)
    with pytest.raises(ValueError, match="method='dyvte': its module is new"):
        model(**batch)
    model.compressor.decoder.was_trained.fill_(True)
    model.compression.save(tmp_path)
    again = fresh("llava").compress("dyvte", ratio="adaptive", weights=tmp_path)
    assert torch.equal(logits_of(again, batch), expected)
    logits_of(fresh("llava").compress("dyvte", ratio=0.5), batch)


def test_refusals():
    for knobs in (dict(width=0), dict(bias="much")):
        with pytest.raises(ValueError, match=f"{next(iter(knobs))}="):
            DyVTE(**knobs)
