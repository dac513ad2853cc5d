"""ZipVL: the worked check of its card, and the bare model whose unimportant rows skip attention by hand."""

from fractions import Fraction

import pytest
import torch

from hf_compress.methods.decoder.zipvl import ZipVL, holding, probes
from hf_compress.tensors.rows import best_rows
from tests.invariants.reference import batch_of, close, greedy, logits_of, longer, options, shared
from tests.methods.attended import Among, best, learn
from tests.tiny import TOKEN_KEYS

MODELS = ["llama", "qwen3", "mistral_window", "qwen2_mixed", "llava", "qwen2_5_vl", "qwen3_vl"]
OTHERS = ["gemma2", "gemma3", "paligemma"]  # capped logits, or blocks of images that see ahead: scores know of neither
KNOBS = options("zipvl")
PROBES = {k: KNOBS[k] for k in ("recent", "spread")}


def test_the_card():
    a = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.6, 0.1, 0.3, 0], [0.2, 0.1, 0.1, 0.6]]).sum(0)[None]
    assert [holding(a, share) for share in (0.6, 0.9, 0.975)] == [[2], [3], [4]]
    seen_by, every = torch.tensor([4.0, 3, 2, 1]), torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(a / seen_by, torch.tensor([[0.575, 0.7 / 3, 0.2, 0.6]]))
    assert best_rows(a / seen_by, every, [2])[0].nonzero()[:, 0].tolist() == [0, 3]
    assert best_rows(a, every, [2])[0].nonzero()[:, 0].tolist() == [0, 1]


def asks(rows, recent=PROBES["recent"], spread=PROBES["spread"]):
    """The last rows, and the first of every part."""
    n = len(rows)
    return {r for i, r in enumerate(rows) if i >= n - recent or i == 0 or i * spread // n != (i - 1) * spread // n}


def test_probes():
    prompt = torch.zeros(2, 40, dtype=torch.bool)
    prompt[0, 5:38], prompt[1] = True, True
    for b, row in enumerate(probes(prompt, 3, 7)):
        rows = prompt[b].nonzero()[:, 0].tolist()
        assert set(row.nonzero()[:, 0].tolist()) == asks(rows, 3, 7)
    assert probes(prompt, 3, 64)[0].equal(prompt[0]) and probes(prompt, 3, 0).sum(1).tolist() == [3, 3]


@pytest.mark.parametrize("ratio", [Fraction(1, 10), Fraction(1, 2), Fraction(9, 10)])
def test_the_ratio_is_met(ratio):
    plan = ZipVL().plan(28, 999, ratio)
    assert sum(plan.values()) == round(28 * 999 * (1 - ratio)) and max(plan.values()) - min(plan.values()) <= 1


def by_hand(name, batch, tokens, prompts=None, rule=None, discards=True):
    """(B, L, V) logits, and what was chosen; by the ratio of the example, or by the rule."""
    full = Among(name, batch, tokens, range(4), discards, prompts)
    method, ratio = ZipVL(), Fraction(str(KNOBS["ratio"]))

    def pick(layer, rows, maps):
        voters = asks(rows)
        mass = {j: float(maps[:, sorted(voters), j].mean()) for j in rows}
        worth = {j: mass[j] / max(1, sum(i >= j for i in voters)) for j in rows}
        count = method.plan(4, len(rows) - 1, ratio).get(layer)
        if rule is not None:
            falling, held, p = sorted(mass.values(), reverse=True), 0.0, 0
            while held < rule * sum(falling):
                held, p = held + falling[p], p + 1
            count = p - 1
        return [best(rows[:-1], worth, count) | {rows[-1]}] * full.heads

    chosen = full.choose(pick)
    return full.under(chosen)[0], chosen


@pytest.mark.parametrize("kind", ["inputs", "equal"])
@pytest.mark.parametrize("name", MODELS)
def test_important_rows_attend_among_themselves(name, kind):
    """Prompt and steps, which see what the cache of each layer keeps; with and without a cache."""
    model, batch = shared(name), batch_of(name, kind)
    with model.compressed("zipvl", **KNOBS):
        run, last = greedy(model, batch), model.compression.last
        report = str(model.compression.report())
        uncached = greedy(model, batch, use_cache=False)
    expected, chosen = by_hand(name, batch, run.tokens)
    prompt = batch["input_ids"].shape[1]
    close(run.logits, expected[:, prompt - 1 :])
    close(uncached.logits, run.logits)
    real = batch["attention_mask"].bool()
    for layer, held in enumerate(run.cache.layers):
        rows = [int(chosen[layer][b, 0, :prompt][real[b]].sum()) for b in range(len(real))]
        assert last.attended[layer] == rows
        if held.window is None:
            assert last.cache_tokens[layer] == rows
    assert "attended" in report


@pytest.mark.parametrize("name", OTHERS)
def test_steps_see_what_the_prompt_has_left(name):
    model, batch = shared(name), batch_of(name)
    with model.compressed("zipvl", **KNOBS):
        run = greedy(model, batch)
        close(greedy(model, batch, use_cache=False).logits, run.logits)
    assert not torch.allclose(greedy(model, batch).logits, run.logits, atol=0.1)


@pytest.mark.parametrize("name", ["llama", "qwen2_mixed", "llava"])
def test_the_rule_and_whole_caches(name):
    model, batch = shared(name), batch_of(name)
    for discard in (True, False):
        with model.compressed("zipvl", ratio="adaptive", mass=0.8, discard=discard, **PROBES):
            run, last = greedy(model, batch), model.compression.last
        expected, _ = by_hand(name, batch, run.tokens, rule=0.8, discards=discard)
        close(run.logits, expected[:, batch["input_ids"].shape[1] - 1 :])
        assert len({tuple(rows) for rows in last.attended.values()}) > 1
        if name == "llama":
            assert (last.cache_tokens == last.layer_tokens) is not discard


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral_window", "llava"])
@torch.no_grad()
def test_right_padding(name, attn):
    model, batch = shared(name, attn), batch_of(name, side="right")
    with model.compressed("zipvl", **KNOBS):
        got = logits_of(model, batch)
    expected, _ = by_hand(name, batch, batch["input_ids"][:, :1])
    for b, mask in enumerate(batch["attention_mask"].bool()):
        close(got[b, mask], expected[b, mask])


@pytest.mark.parametrize("name", ["llama", "qwen2_mixed", "llava"])
def test_a_second_turn_chooses_rows_of_its_own(name):
    model, batch = shared(name), batch_of(name)
    more = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(0))
    with model.compressed("zipvl", **KNOBS):
        first = greedy(model, batch, max_new_tokens=4)
        whole = longer(name, batch, torch.cat([first.tokens, more], 1))
        text = {key: value for key, value in whole.items() if key in TOKEN_KEYS}
        run = greedy(model, text, past_key_values=first.cache)
    length, end = batch["input_ids"].shape[1], whole["input_ids"].shape[1]
    expected, _ = by_hand(name, whole, run.tokens, [(0, length), (length + 3, end)])  # the last token said is fed then
    close(run.logits, expected[:, end - 1 :], atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_beams_and_training(name):
    model, batch = shared(name), batch_of(name)
    with model.compressed("zipvl", **KNOBS):
        found = [model.generate(**batch, max_new_tokens=5, num_beams=3, use_cache=cached) for cached in (True, False)]
        assert torch.equal(*found)
        learn(name, batch, greedy(model, batch))
        assert all(
            p.grad.isfinite().all() and p.grad.any() for p in model.get_decoder().layers[1].self_attn.parameters()
        )
        model.zero_grad()


def test_refusals():
    for knobs in (dict(mass=0), dict(recent=0), dict(spread=-1), dict(discard=1), dict(scope="per_image")):
        with pytest.raises(ValueError, match=f"{next(iter(knobs))}="):
            ZipVL(**knobs)
    with pytest.raises(ValueError, match="method='zipvl' takes rows out of the cache of its layers"):
        shared("llama").compress(["zipvl", "snapkv"], ratio=0.5)
