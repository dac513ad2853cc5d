"""Token Sparse Attention: the worked check of its card, and the bare model whose heads read what was chosen by hand."""

from fractions import Fraction

import pytest
import torch

from hf_compress.methods.decoder.token_sparse import TokenSparse, removed
from tests.invariants.reference import batch_of, close, greedy, logits_of, longer, options, shared
from tests.methods.attended import Among, best, learn
from tests.tiny import TOKEN_KEYS

MODELS = ["llama", "qwen3", "gemma2", "mistral_window", "qwen2_mixed", "llava", "qwen2_5_vl", "gemma3"]
KNOBS = options("token_sparse")
W, POOL, LAYERS = KNOBS["window"], 7, (2, 3)


def test_the_card():
    share, every = torch.tensor([0.4, 0.3, 0.2, 0.08, 0.015, 0.005]), torch.ones(1, 6, dtype=torch.bool)
    assert [removed(share, c) for c in (0.004, 0.03, 0.2)] == [0, 3, 4]
    for least, coverage, left in ((2, 0.005, 6), (2, 0.2, 2), (3, 0.2, 3), (1024, 0.2, 6)):
        assert TokenSparse(least=least, coverage=coverage)._rule(share[None], every) == [left]


@pytest.mark.parametrize("layers", [None, (1,), (5, 9, 30)])
def test_the_ratio_is_met(layers):
    method = TokenSparse(layers=layers)
    for ratio in (Fraction(1, 50), Fraction(1, 40), Fraction(3, 10)):
        if ratio * 32 > len(method.boundaries(32)):
            with pytest.raises(ValueError, match=r"reachable is 0 <= ratio <= "):
                method.plan(32, 1000, ratio)
            continue
        plan = method.plan(32, 1000, ratio)
        assert sum(1000 - n for n in plan.values()) == round(1000 * 32 * ratio)
        assert max(plan.values()) - min(plan.values()) <= 1 and list(plan) == list(method.boundaries(32))


def by_hand(name, batch, tokens, prompts=None, per="head", rule=None):
    """(B, L, V) logits, and what was chosen; a quarter is spared, or what the rule (coverage, least) says."""
    full = Among(name, batch, tokens, LAYERS, prompts=prompts)

    def pick(layer, rows, maps):
        window, before = rows[-W:], rows[:-W]
        score = [{} for _ in maps]
        for of_head, a in zip(score, maps.tolist()):
            votes = [sum(a[i][j] for i in window) / len(window) for j in before]
            for k, j in enumerate(before):
                of_head[j] = sum(votes[max(0, k - POOL // 2) : k + POOL // 2 + 1]) / POOL
        count = TokenSparse(window=W).plan(4, len(before), Fraction(1, 4))[layer]
        if rule is not None and before:
            mean, low, below = sorted(sum(s[j] for s in score) for j in before), 0.0, 0
            for value in mean:
                low += value / sum(mean)
                below += low < rule[0]
            count = max(min(len(before), rule[1]), len(before) - (below + 1 if below else 0))
        shares = 1 if per == "head" else full.heads // full.kv_heads
        out = []
        for h in range(full.heads):
            group = range(h // shares * shares, h // shares * shares + shares)
            out.append(best(before, {j: sum(score[g][j] for g in group) for j in before}, count) | set(window))
        return out

    chosen = full.choose(pick)
    return full.under(chosen)[0], chosen


@pytest.mark.parametrize("kind", ["inputs", "equal"])
@pytest.mark.parametrize("name", MODELS)
def test_heads_attend_among_their_rows(name, kind):
    """Prompt and steps, which see everything; with and without a cache."""
    model, batch = shared(name), batch_of(name, kind)
    with model.compressed("token_sparse", **KNOBS):
        run, last = greedy(model, batch), model.compression.last
        uncached = greedy(model, batch, use_cache=False)
    expected, chosen = by_hand(name, batch, run.tokens)
    prompt = batch["input_ids"].shape[1]
    close(run.logits, expected[:, prompt - 1 :])
    close(uncached.logits, run.logits)
    real = batch["attention_mask"].bool()
    for layer in LAYERS:
        rows = [chosen[layer][b, 0, :prompt][real[b]].sum() for b in range(len(real))]
        assert last.attended[layer] == rows and any(n < m for n, m in zip(rows, real.sum(1)))
    assert last.cache_tokens == last.layer_tokens or any(held.window for held in run.cache.layers)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral_window", "llava"])
@torch.no_grad()
def test_right_padding_and_groups_of_heads(name, attn):
    model, batch = shared(name, attn), batch_of(name, side="right")
    with model.compressed("token_sparse", per="kv", **KNOBS):
        got = logits_of(model, batch)
    expected, _ = by_hand(name, batch, batch["input_ids"][:, :1], per="kv")
    for b, mask in enumerate(batch["attention_mask"].bool()):
        close(got[b, mask], expected[b, mask])


@pytest.mark.parametrize("name", ["llama", "gemma2", "llava"])
def test_the_rule(name):
    """Every sample has a count of its own."""
    model, batch = shared(name), batch_of(name)
    with model.compressed("token_sparse", ratio="adaptive", window=W, least=3, coverage=0.3):
        run, last = greedy(model, batch), model.compression.last
    expected, _ = by_hand(name, batch, run.tokens, rule=(0.3, 3))
    close(run.logits, expected[:, batch["input_ids"].shape[1] - 1 :])
    assert last.attended[2] != last.attended[3]
    with model.compressed("token_sparse", ratio="adaptive"):  # short prompts are left as they are
        again = greedy(model, batch)
    close(again.logits, greedy(model, batch).logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "llava"])
def test_a_second_turn_chooses_rows_of_its_own(name):
    model, batch = shared(name), batch_of(name)
    more = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(0))
    with model.compressed("token_sparse", **KNOBS):
        first = greedy(model, batch, max_new_tokens=4)
        whole = longer(name, batch, torch.cat([first.tokens, more], 1))
        text = {key: value for key, value in whole.items() if key in TOKEN_KEYS}
        run = greedy(model, text, past_key_values=first.cache)
    length, end = batch["input_ids"].shape[1], whole["input_ids"].shape[1]
    expected, _ = by_hand(name, whole, run.tokens, [(0, length), (length + 3, end)])  # the last token said is fed then
    close(run.logits, expected[:, end - 1 :], atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_beams(name):
    model, batch = shared(name), batch_of(name)
    with model.compressed("token_sparse", **KNOBS):
        found = [model.generate(**batch, max_new_tokens=5, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_it_trains(name):
    """Answers see the whole prompt, and do not choose; gradients are there."""
    model, batch = shared(name), batch_of(name)
    with model.compressed("token_sparse", **KNOBS):
        whole = learn(name, batch, greedy(model, batch))
        grads = [p.grad for p in model.get_decoder().layers[2].self_attn.parameters()]
        assert all(g.isfinite().all() and g.any() for g in grads)
        model.zero_grad()
        model.train().gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="gradient checkpointing: method='token_sparse' takes part"):
            model(**whole)
        model.gradient_checkpointing_disable()
        model.eval()


def test_refusals():
    for knobs in (dict(window=0), dict(pool=4), dict(per="layer"), dict(coverage=0), dict(least=-1), dict(layers=())):
        with pytest.raises(ValueError, match=f"{next(iter(knobs))}="):
            TokenSparse(**knobs)
    with pytest.raises(ValueError, match="scope='per_image'"):
        TokenSparse(scope="per_image")
    model = shared("llama")
    for cache in ("kivi", "adakv"):
        with pytest.raises(ValueError, match=f"method='{cache}' takes part in the attention"):
            model.compress(["token_sparse", cache], ratio=[0.25, None if cache == "kivi" else 0.5], **{"window": 4})
    places = torch.cat([torch.arange(12), torch.arange(14)])[None]
    with model.compressed("token_sparse", **KNOBS), pytest.raises(ValueError, match="position_ids: several samples"):
        model(input_ids=torch.arange(26)[None] + 5, position_ids=places, use_cache=False)
    assert model.compression is None
