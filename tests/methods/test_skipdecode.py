"""SkipDecode: the worked check of its card, and the bare model in which later tokens leave layers out by hand."""

from fractions import Fraction

import pytest
import torch

import hf_compress
from hf_compress.methods.decoder.skipdecode import SkipDecode, depths
from tests.invariants.reference import (
    FullLength,
    bare,
    batch_of,
    close,
    greedy,
    logits_of,
    longer,
    options,
    shared,
)
from tests.methods.attended import learn
from tests.tiny import TOKEN_KEYS

MODELS = ["llama", "qwen3", "gemma2", "mistral_window", "qwen2_mixed", "llava", "qwen3_vl"]
KNOBS = options("skipdecode")


def test_the_card():
    """32 layers, five tokens, from 32 down to 11: 107.5 layers in all."""
    assert depths(32, 5, 1, Fraction(42, 128)) == (32, 27, 22, 16, 11)
    assert list(SkipDecode(length=5).idle(32, Fraction(42, 128), 2)) == list(range(1, 11))  # 22: the lowest, 21 highest


@pytest.mark.parametrize(("layers", "length", "warmup"), [(4, 4, 1), (32, 64, 1), (28, 33, 3), (32, 1, 1)])
def test_the_ratio_is_met(layers, length, warmup):
    for ratio in (Fraction(0), Fraction(1, 10), Fraction(1, 4), Fraction(3, 10), Fraction(2, 5)):
        try:
            found = depths(layers, length, warmup, ratio)
        except ValueError as error:
            assert "reachable is 0 <= ratio <= " in str(error)
            assert 2 * (1 - ratio) * layers - layers < warmup + 1
            continue
        assert sum(found) == round(layers * length * (1 - ratio)) and max(found) <= layers
        assert list(found) == sorted(found, reverse=True) and min(found) > warmup


def by_hand(name, batch, tokens, method, ratio, before=0):
    """(B, T, V) logits of the bare model at full length; row r of the answer takes part in no layer that it leaves out.

    Args:
        before: rows of an earlier answer, which stand in front of the last `after` rows of the prompt: {row: nth}.
    """
    full, handles = FullLength(name, batch, tokens), []
    nth = dict(before or {}) | {full.prompt + t: t for t in range(tokens.shape[1] - 1)}
    see = []
    for i, layer in enumerate(bare(name).get_decoder().layers):
        out = [row for row, t in nth.items() if i in method.idle(full.layers, ratio, t)]
        mask = full.causal(i).clone()
        mask[..., out] = False
        see.append(mask)

        def leave(_, args, y, out=out):
            y = (y[0] if isinstance(y, tuple) else y).clone()
            y[:, out] = args[0][:, out]
            return y

        handles.append(layer.register_forward_hook(leave))
    try:
        return full.logits(see)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", ["inputs", "equal"])
@pytest.mark.parametrize("name", MODELS)
def test_later_tokens_leave_layers_out(name, kind):
    """Prompt and steps, beyond `length` too; the prompt is the bare model's, and layers store who went through them."""
    model, batch = shared(name), batch_of(name, kind)
    method = SkipDecode(length=4)
    with model.compressed("skipdecode", **KNOBS):
        run = greedy(model, batch, max_new_tokens=7)
        uncached = greedy(model, batch, max_new_tokens=7, use_cache=False)
    close(run.logits, by_hand(name, batch, run.tokens, method, Fraction(1, 4)))
    close(uncached.logits, run.logits)
    plan = depths(4, 4, 1, Fraction(1, 4))
    assert plan[-1] == 2 and sum(plan) == 12
    full = FullLength(name, batch, run.tokens)
    for i, held in enumerate(run.cache.layers):
        went = sum(i not in method.idle(4, Fraction(1, 4), t) for t in range(6))
        if full.windows[i] is None:
            assert len(held.layout) == full.prompt + went
        assert held.get_seq_length() == full.prompt + 6


@pytest.mark.parametrize("name", ["llama", "gemma2", "llava", "qwen2_mixed"])
def test_a_second_turn_sees_what_layers_have_stored(name):
    """It goes through all layers, and its answer begins with all of them again."""
    model, batch, ratio = shared(name), batch_of(name), Fraction(1, 4)
    more = torch.randint(3, 80, (2, 6), generator=torch.Generator().manual_seed(0))
    with model.compressed("skipdecode", **KNOBS):
        first = greedy(model, batch, max_new_tokens=6)
        whole = longer(name, batch, torch.cat([first.tokens, more], 1))
        text = {key: value for key, value in whole.items() if key in TOKEN_KEYS}
        run = greedy(model, text, past_key_values=first.cache)
    length = batch["input_ids"].shape[1]
    earlier = {length + t: t for t in range(5)}  # the sixth token is fed with the second prompt
    close(run.logits, by_hand(name, whole, run.tokens, SkipDecode(length=4), ratio, earlier), atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_beams_and_steps_by_hand(name):
    model, batch = shared(name), batch_of(name)
    with model.compressed("skipdecode", **KNOBS), torch.no_grad():
        beams = [
            model.generate(**batch, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=cached)
            for cached in (True, False)
        ]
        assert torch.equal(*beams)
        run, out, mask = greedy(model, batch), model(**batch, use_cache=True), batch["attention_mask"]
        got = [out.logits[:, -1]]
        for token in run.tokens[:, :-1].T:
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            cache = out.past_key_values
            out = model(input_ids=token[:, None], attention_mask=mask, past_key_values=cache)
            got.append(out.logits[:, -1])
    close(torch.stack(got, 1), run.logits)


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_answers_train_as_they_are_generated(name):
    model, batch = shared(name), batch_of(name)
    with model.compressed("skipdecode", **KNOBS):
        learn(name, batch, greedy(model, batch, max_new_tokens=7))
        assert all(p.grad is not None for p in model.get_decoder().layers[1].parameters())
        model.zero_grad()
        plain = logits_of(model, batch)
    assert torch.equal(plain, logits_of(model, batch))  # prompts go through everything


def test_refusals():
    model, batch = shared("llama"), batch_of("llama", "equal")
    with pytest.raises(ValueError, match=r"reachable is 0 <= ratio <= 0\.25"):
        model.compress("skipdecode", ratio=0.3)
    with pytest.raises(ValueError, match=r"'skipdecode' leaves layers out .* give ratio"):
        model.compress("skipdecode", keep=3)
    for cache in (dict(method="h2o", policy="hold"), dict(method="kivi")):
        knobs = {k: v for k, v in (hf_compress.methods()[cache["method"]].example | cache).items() if k != "method"}
        ratio = [0.25, knobs.pop("ratio", None)]
        with pytest.raises(ValueError, match=f"method='{cache['method']}' acts on the cache of every layer"):
            model.compress(["skipdecode", cache["method"]], ratio=ratio, length=4, **knobs)
    assert model.compression is None
    for knobs in (dict(length=0), dict(warmup=0)):
        with pytest.raises(ValueError, match=f"{next(iter(knobs))}="):
            SkipDecode(**knobs)
    with model.compressed("skipdecode", **KNOBS):
        with pytest.raises(ValueError, match="prompt_lookup_num_tokens: method='skipdecode' runs other layers"):
            model.generate(**batch, prompt_lookup_num_tokens=3, max_new_tokens=3)
        with pytest.raises(ValueError, match="drafting: method='skipdecode'"), model.compression.drafting():
            model.generate(**batch, max_new_tokens=3)
        cache = greedy(model, batch, max_new_tokens=7).cache
        with pytest.raises(ValueError, match="can be taken back at most"):
            cache.crop(-1)
