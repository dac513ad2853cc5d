"""Invariants 6 and 7: eviction equals attention masked to what is kept, and the bytes are really gone."""

import pytest
import torch

import hf_compress
from hf_compress.engine import entries
from hf_compress.engine.evict import CachePolicy
from hf_compress.signals import COLUMNS
from hf_compress.stores import HeldLayer
from tests.invariants.reference import (
    FullLength,
    alone,
    batch_of,
    close,
    compressed,
    greedy,
    kernels,
    logits_of,
    matrix,
    of_kind,
    shared,
    slots,
    storages,
    untouched,
    windows,
    within,
)

STEPS = 4


def assert_masked(model, name, batch, run, steps):
    """Step t of `run` saw, beyond the prompt pass, exactly what a run of t steps leaves in the cache."""
    full = FullLength(name, batch, run.tokens)
    see = [full.causal(i).expand(-1, full.heads, -1, -1).clone() for i in range(full.layers)]
    for step in range(2, steps + 1):
        cache = greedy(model, batch, max_new_tokens=step).cache
        row = full.prompt + step - 2  # fed last
        for i in full.evicting:
            see[i][:, :, row] &= slots(cache, i, full.rows, full.heads)
    close(run.logits, full.logits(see))


@kernels("evicting")
def test_equals_masked_attention(method, name, attn):
    """The prompt is untouched, each later step sees the kept entries of every head; ragged batch, padded."""
    model, batch = shared(name, attn), batch_of(name)
    plain = logits_of(model, batch)
    for policy in hf_compress.methods()[method].cls().policies:
        with compressed(model, method, policy=policy):
            untouched(method, attn, logits_of(model, batch), plain)
            run = greedy(model, batch, max_new_tokens=STEPS)
            assert_masked(model, name, batch, run, STEPS)


@pytest.mark.parametrize("name", ["llama", "llava"])
@pytest.mark.parametrize("method", [m for m, s in hf_compress.methods("cache").items() if COLUMNS in s.cls().reads(1)])
def test_sums_come_with_the_attention(method, name, monkeypatch):
    """One pass over the prompt attends and sums; what stays and what is said is as with a second pass, padded batch."""
    model, batch, asked = shared(name), batch_of(name), []
    second = entries.column_sums
    monkeypatch.setattr(entries, "column_sums", lambda *args: asked.append(len(args[-1])) or second(*args))
    with compressed(model, method):
        once = greedy(model, batch, max_new_tokens=STEPS)
        assert not asked
        monkeypatch.setattr(CachePolicy, "attend", lambda *args: None)
        twice = greedy(model, batch, max_new_tokens=STEPS)
        assert len(asked) == len(FullLength(name, batch, once.tokens).evicting)
    close(once.logits, twice.logits)
    for mine, other in zip(once.cache.layers, twice.cache.layers):
        assert torch.equal(mine.layout.index, other.layout.index)


@matrix("evicting")
def test_grow_keeps_every_new_token(method, name):
    """What is kept of the prompt never changes, and nothing generated is evicted."""
    model, batch = shared(name), batch_of(name)
    with compressed(model, method, policy="grow"):
        caches = [greedy(model, batch, max_new_tokens=n).cache for n in (1, 5)]
    full = FullLength(name, batch, batch["input_ids"].new_zeros(2, 5))
    for i in full.evicting:
        first, later = (slots(c, i, full.rows, full.heads) for c in caches)
        assert torch.equal(first[..., : full.prompt], later[..., : full.prompt])
        assert later[..., full.prompt : full.prompt + 4].all()


@matrix("even")
def test_hold_keeps_its_budget(method, name):
    """While decoding the cache stays at the budget of the prompt, newest token included."""
    if "hold" not in hf_compress.methods()[method].cls().policies:
        with pytest.raises(ValueError, match="policy='hold'"):
            shared(name).compress(method, ratio=0.5, policy="hold")
        return
    model, batch = shared(name), batch_of(name)
    with compressed(model, method, policy="hold"):
        cache = greedy(model, batch, max_new_tokens=7).cache
    full = FullLength(name, batch, batch["input_ids"].new_zeros(2, 7))
    budget = batch["attention_mask"].sum(1) // 2
    for i in full.evicting:
        held = slots(cache, i, full.rows, full.heads)
        assert torch.equal(held.sum(-1), budget[:, None].expand(-1, full.heads))
        assert held[..., full.prompt + 5].all()
        assert cache.layers[i].keys.shape[-2] == budget.max()


@pytest.mark.parametrize("keep", [1, 2, 5, 1000])
@matrix("even")
def test_absolute_budgets(method, name, keep):
    """`keep` entries per head, whatever the length; a prompt of fewer tokens stays whole."""
    model, batch = shared(name), batch_of(name)
    with compressed(model, method, keep=keep):
        run = greedy(model, batch, max_new_tokens=STEPS)
        last = model.compression.last
        assert_masked(model, name, batch, run, STEPS)
    lengths = batch["attention_mask"].sum(1).tolist()
    few = [min(keep, n) for n in lengths]
    assert last.cache_tokens == [within(lengths, window) if window else few for window in windows(name)]


@matrix("cache")
def test_bytes_are_storages(method, name):
    """What the report says is what the cache allocates: no view keeps a larger storage alive."""
    model, batch = shared(name), batch_of(name)
    text = model.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    with compressed(model, method):
        with torch.no_grad():
            cache = model(**batch).past_key_values
        totals, rows = model.compression.report().totals(), model.compression.report().rows()
        later = greedy(model, batch).cache
    assert totals["kv_bytes"] == storages(cache) == sum(layer.nbytes() for layer in cache.layers)
    assert totals["kv_bytes"] == sum(row["kv_bytes"] for row in rows)
    assert storages(later) == sum(layer.nbytes() for layer in later.layers)
    full = FullLength(name, batch, batch["input_ids"][:, :1])
    length, heads = batch["input_ids"].shape[1], text.num_key_value_heads
    for i, row in enumerate(rows):
        if method not in of_kind("even"):
            break
        whole = within([length], window)[0] if (window := windows(name)[i]) else length
        entries = length // 2 if i in full.evicting else whole  # of the longest row: shorter ones are filled up
        index = 2 * heads * (2 * entries + 8) if i in full.evicting else 0  # two bytes each; one number of fillers
        assert row["kv_bytes"] == 2 * 2 * heads * entries * size * 4 + index
    slots = sum(within([length], window)[0] if window else length for window in windows(name))
    assert totals["full_kv_bytes"] == 2 * 2 * text.num_key_value_heads * slots * size * 4


@matrix()
def test_bytes_of_every_stage(method, name):
    """Vision and decoder methods shorten the cache too, in every layer by what it was spared."""
    model, batch = shared(name), batch_of(name)
    with compressed(model, method):
        with torch.no_grad():
            cache = model(**batch).past_key_values
        report, last = model.compression.report(), model.compression.last
    assert report.totals()["kv_bytes"] == storages(cache)
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, HeldLayer):  # it keeps a state
            assert last.cache_tokens[i] == [0, 0] and last.cache_bytes[i] == 0
            continue
        assert len(layer.layout) >= max(last.cache_tokens[i])
        assert layer.body is not None or layer.keys.shape[-2] == len(layer.layout)


@matrix("evicting")
def test_rows_keep_what_they_keep_alone(method, name):
    """Per head, in a padded batch and alone, at the end of the prompt and five tokens later."""
    model, batch = shared(name), batch_of(name)
    length = batch["input_ids"].shape[1]
    with compressed(model, method):
        for steps in (1, 6):
            together = greedy(model, batch, max_new_tokens=steps).cache
            for row in range(2):
                sample = alone(name, batch, row)
                single = greedy(model, sample, max_new_tokens=steps).cache
                n = sample["input_ids"].shape[1]
                for i in FullLength(name, batch, batch["input_ids"][:, :1]).evicting:
                    mine = slots(together, i, length + steps, 4)[row, :, length - n :]
                    assert torch.equal(mine, slots(single, i, n + steps, 4)[0])


@matrix("cache")
def test_filled_cache_is_refused(method, name):
    """A cache from before compress() cannot be continued, and one from compress() not without it."""
    model, batch = shared(name), batch_of(name)
    before = greedy(model, batch)
    more = dict(input_ids=before.out.sequences, attention_mask=torch.ones_like(before.out.sequences))
    with compressed(model, method):
        with pytest.raises(ValueError, match="already holds tokens"):
            model.generate(**more, past_key_values=before.cache, max_new_tokens=2)
        inside = greedy(model, batch)
    with pytest.raises(RuntimeError, match="compress"):
        model.generate(**more, past_key_values=inside.cache, max_new_tokens=2)
    other = "knorm" if method != "knorm" else "streaming"
    with compressed(model, other), pytest.raises(ValueError, match="past_key_values was filled under"):
        model.generate(**more, past_key_values=inside.cache, max_new_tokens=2)


@pytest.mark.parametrize("stage", ["fastervlm", "fastv", "knorm"])
@pytest.mark.parametrize("filler", ["snapkv", "adakv", "uniform"])
def test_a_foreign_cache_is_refused_before_it_is_read(filler, stage):
    """Whatever stage would go on with it, and however its slots lie: the refusal names both compressions."""
    model, batch = shared("llava"), batch_of("llava")
    with compressed(model, filler):
        cache = model(**batch, use_cache=True).past_key_values
        held = cache.layers[0].get_seq_length()
    token = batch["input_ids"][:, -1:]
    mask = torch.cat([batch["attention_mask"], torch.ones_like(token)], 1)
    with compressed(model, stage):
        with pytest.raises(ValueError, match=rf"past_key_values was filled under {filler}\(.*, not {stage}\("):
            model(input_ids=token, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values=tuple cannot hold compressed layers"):
            model(**batch, past_key_values=((torch.zeros(1), torch.zeros(1)),))
    assert cache.layers[0].get_seq_length() == held


@matrix("cache")
def test_needs_a_cache(method, name):
    """Without a cache there is nothing to compress: said, not ignored."""
    model, batch = shared(name), batch_of(name)
    with compressed(model, method):
        with pytest.raises(ValueError, match="use_cache=False"):
            model.generate(**batch, use_cache=False, max_new_tokens=2)
        with pytest.raises(ValueError, match="use_cache=False"):
            logits_of(model, batch, use_cache=False)
        text = model.config.get_text_config()
        text.use_cache = False
        try:
            with pytest.raises(ValueError, match="use_cache"):
                logits_of(model, batch)
        finally:
            text.use_cache = True
