"""Stores across layers on whole models: the bare model continues on a cache edited by hand, and says the same."""

import math

import pytest
import torch
from transformers import DynamicCache

from tests.invariants.reference import (
    alone,
    bare,
    batch_of,
    close,
    embed,
    extend,
    greedy,
    logits_of,
    prompt_positions,
    shared,
)
from tests.invariants.test_chat import turn

RANKS = dict(key_rank=7, value_rank=9)
MERGE = dict(start=0, retain=0.2)
RUNS = {"minicache": MERGE, "xkv": RANKS}
METHODS = pytest.mark.parametrize("method", list(RUNS))
MODELS = pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl"])


# -- by hand --------------------------------------------------------------------------------------------------------
@torch.no_grad()
def continued(name, batch, tokens, edit):
    """(B, T, V) logits of the bare model over `tokens`, on a prompt cache whose layers `edit(keys, values)` changed.

    `edit` takes and gives lists of (B, Hkv, L, d) and knows the positions and which rows are valid.
    """
    model, L = bare(name), batch["input_ids"].shape[1]
    decoder = model.get_decoder()
    x = embed(name, batch, tokens[:, :-1])
    positions = extend(prompt_positions(name, batch), tokens.shape[1] - 1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(tokens[:, :-1])], 1)
    cache = DynamicCache(config=decoder.config)
    first = decoder(
        inputs_embeds=x[:, :L], position_ids=positions[..., :L], attention_mask=mask[:, :L], past_key_values=cache
    )
    cos, sin = decoder.rotary_emb(x, positions[..., :L])
    rotary = lambda t, sign: t * cos[:, None] + sign * half(t) * sin[:, None]
    keys, values = edit([c.keys for c in cache.layers], [c.values for c in cache.layers], mask[:, :L].bool(), rotary)
    for layer, k, v in zip(cache.layers, keys, values):
        layer.keys, layer.values = k, v
    rest = decoder(inputs_embeds=x[:, L:], position_ids=positions[..., L:], attention_mask=mask, past_key_values=cache)
    return model.lm_head(torch.cat([first.last_hidden_state[:, -1:], rest.last_hidden_state], 1))


def half(t):
    a, b = t.chunk(2, -1)
    return torch.cat([-b, a], -1)


def merge(keys, values, valid, rotary):
    """MiniCache on layers (0, 1) and (2, 3)."""
    return tuple([y for i in (0, 2) for y in merge_pair(x[i], x[i + 1], valid)] for x in (keys, values))


def merge_pair(x, y, valid, t=0.6):
    x, y = x.clone(), y.clone()
    for b in range(len(x)):
        pairs = [(b, h, j) for h in range(x.shape[1]) for j in valid[b].nonzero()[:, 0].tolist()]
        cosine = {p: float(x[p] @ y[p] / (x[p].norm() * y[p].norm())) for p in pairs}
        low, high = min(cosine.values()), max(cosine.values())
        for p in pairs:
            if cosine[p] > low + MERGE["retain"] * (high - low):
                angle = math.acos(cosine[p])
                u, w = x[p] / x[p].norm(), y[p] / y[p].norm()
                e = (math.sin((1 - t) * angle) * u + math.sin(t * angle) * w) / math.sin(angle)
                x[p], y[p] = e * x[p].norm(), e * y[p].norm()
    return x, y


def truncate(keys, values, valid, rotary):
    """xKV on all four layers."""
    keys = [rotary(k, -1) for k in keys]
    out = []
    for x, r in ((keys, RANKS["key_rank"]), (values, RANKS["value_rank"])):
        x = torch.stack(x, 2)  # (B, Hkv, layers, L, d)
        for b in range(len(x)):
            rows = x[b][:, :, valid[b]].movedim(2, 0)
            u, s, v = torch.linalg.svd(rows.flatten(1).double(), full_matrices=False)
            low = ((u[:, :r] * s[:r]) @ v[:r]).float().view(rows.shape)
            x[b][:, :, valid[b]] = low.movedim(0, 2)
        out.append(list(x.unbind(2)))
    return [rotary(k, 1) for k in out[0]], out[1]


EDITS = {"minicache": merge, "xkv": truncate}


# -- whole models ---------------------------------------------------------------------------------------------------
@METHODS
@MODELS
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_bare_model_on_the_edited_cache(method, name, attn):
    """The prompt is untouched, every later step and a second turn read what the method makes of it."""
    model, batch = shared(name, attn), batch_of(name)
    plain = logits_of(model, batch)
    with model.compressed(method, **RUNS[method]):
        assert torch.equal(logits_of(model, batch), plain)
        first = greedy(model, batch)
        more = turn(name, first, batch)
        second = greedy(model, more, past_key_values=first.cache)
    prompt = batch["input_ids"].shape[1]
    expected = continued(name, batch, second.out.sequences[:, prompt:], EDITS[method])
    close(first.logits, expected[:, :5])
    close(second.logits, expected[:, -5:])
    assert (expected[:, 1] - greedy(model, batch).logits[:, 1]).abs().max() > 0.1  # it does matter


@pytest.mark.parametrize(
    ("method", "knobs"),
    [("minicache", dict(ratio=0)), ("xkv", dict(ratio=0)), ("minicache", dict(retain=1.0)), ("xkv", {})],
)
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_nothing_to_do_is_the_bare_model(method, knobs, name):
    """Ratio 0, no pair merged, or ranks that a short prompt does not need: bit for bit."""
    model, batch = shared(name), batch_of(name)
    expected = greedy(model, batch)
    with model.compressed(method, **knobs):
        run = greedy(model, batch)
    assert torch.equal(run.logits, expected.logits)


@METHODS
@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_batch_is_one_by_one(method, name):
    model, batch = shared(name), batch_of(name)
    with model.compressed(method, **RUNS[method]):
        together = greedy(model, batch)
        for row in range(2):
            single = greedy(model, alone(name, batch, row))
            close(together.logits[row], single.logits[0])


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_a_prompt_too_short_to_gain_stays_exact_beside_a_longer_one(name):
    model, batch = shared(name), batch_of(name)
    plain = [greedy(model, alone(name, batch, row)).logits for row in range(2)]
    unlike = set()
    for rank in range(2, 13):
        with model.compressed("xkv", group=2, key_rank=rank, value_rank=rank):
            together, singles = greedy(model, batch), [greedy(model, alone(name, batch, row)) for row in range(2)]
        for row, single in enumerate(singles):
            close(together.logits[row], single.logits[0])
        unlike.add(tuple(torch.equal(single.logits, bare) for single, bare in zip(singles, plain)))
    assert len({both for both in unlike if len(set(both)) == 2}) == 1  # for some ranks only one of them is packed


@METHODS
def test_generation(method):
    """Beams and several sequences are those of a batch of copies, and layers go on sharing; lookup is greedy."""
    model, batch = shared("llama"), batch_of("llama")
    options = dict(max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    with model.compressed(method, **RUNS[method]):
        beams = model.generate(**batch, **options, num_beams=3, num_return_sequences=2)
        for row in range(2):
            sample = alone("llama", batch, row)
            single = model.generate(**sample, **options, num_beams=3, num_return_sequences=2)
            assert torch.equal(beams.sequences[2 * row : 2 * row + 2, -5:], single.sequences[:, -5:])
        sample = alone("llama", batch, 0)
        expected = model.generate(**sample, **options).sequences
        assert torch.equal(model.generate(**sample, **options, prompt_lookup_num_tokens=2).sequences, expected)
    assert stored(beams.past_key_values) == sum(layer.nbytes() for layer in beams.past_key_values.layers)


def stored(cache):
    """Bytes of all different storages of a cache."""
    tensors = []
    for layer in cache.layers:
        tensors += [layer.keys, layer.values]
        for body in layer.body or ():
            for value in vars(body).values():
                tensors += [value] if torch.is_tensor(value) else getattr(value, "parts", ())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        ("minicache", dict(ratio=0.15)),
        ("minicache", dict(ratio=0.5)),
        ("xkv", dict(ratio=0.5, group=2)),
        ("xkv", RANKS),
    ],
)
@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl"])
@pytest.mark.filterwarnings("ignore:xkv:UserWarning")
def test_bytes_are_storages(method, knobs, name):
    """What is shared is counted once, by layers, reports and storages alike; the ratio is kept in bfloat16."""
    model, batch = shared(name), batch_of(name, "equal")
    with model.compressed(method, **knobs):
        cache = greedy(model, batch, max_new_tokens=1).cache
        totals, rows = model.compression.report().totals(), model.compression.report().rows()
    assert totals["kv_bytes"] == stored(cache) == sum(layer.nbytes() for layer in cache.layers)
    assert totals["kv_bytes"] == sum(row["kv_bytes"] for row in rows) < totals["full_kv_bytes"]
    if method == "xkv" and "ratio" in knobs:
        assert 0.45 < totals["kv_bytes"] / totals["full_kv_bytes"] <= 0.5


@pytest.mark.parametrize(
    ("ratio", "pairs", "bits"), [(0.05, 1, 16), (0.15, 1, 16), (0.18, 2, 16), (0.36, 2, 8), (0.5, 2, 4)]
)
def test_minicache_ratio_chooses_layers_and_bits(ratio, pairs, bits):
    """Of heads of 8: a pair of four layers removes .178, .237 or .297 of all bytes, last pairs first."""
    model, batch = shared("llama"), batch_of("llama")
    with model.compressed("minicache", ratio=ratio):
        cache = greedy(model, batch, max_new_tokens=1).cache
    merged = [layer.body is not None for layer in cache.layers]
    assert merged == [False] * (4 - 2 * pairs) + [True] * 2 * pairs
    assert cache.layers[-1].body[0].bits == bits


def test_minicache_default_start():
    """The upper half of the layers."""
    model, batch = shared("llama"), batch_of("llama")
    for knobs, expected in (({}, [0, 0, 1, 1]), (dict(start=1), [0, 1, 1, 0]), (dict(start=0), [1, 1, 1, 1])):
        with model.compressed("minicache", **knobs):
            cache = greedy(model, batch, max_new_tokens=1).cache
        assert [int(layer.body is not None) for layer in cache.layers] == expected


@pytest.mark.parametrize(
    ("method", "knobs", "match"),
    [
        ("minicache", dict(ratio=0.6), r"removes 0\.5938 of the bytes; ask for 0 to 0\.5938"),
        ("minicache", dict(ratio=0.4, bits=16), r"ask for 0 to 0\.3562"),
        ("minicache", dict(ratio=0.2, start=1), "start=1"),
        ("minicache", dict(start=3), "no two are left"),
        ("minicache", dict(bits=2), "bits=2"),
        ("minicache", dict(retain=1.5), "retain=1.5"),
        ("minicache", dict(keep=5), "keep=5"),
        ("minicache", dict(policy="hold"), "policy='hold'"),
        ("xkv", dict(group=0), "group=0"),
        ("xkv", dict(policy="hold"), "policy='hold'"),
    ],
)
def test_refusals(method, knobs, match):
    with pytest.raises(ValueError, match=match):
        shared("llama").compress(method, **knobs)
    assert shared("llama").__dict__.get("compression") is None


@METHODS
def test_decoder_methods_between_layers_are_refused(method):
    """FastV drops rows in front of layer 1, MiniCache may start behind it."""
    model, batch = shared("llava"), batch_of("llava")
    both = model.compressed(["fastv", method], ratio=[0.4, None], layer=1, **RUNS[method])
    with both, pytest.raises(ValueError, match="a decoder method drops rows between them"):
        model.generate(**batch, max_new_tokens=2)
    with model.compressed(["fastv", "minicache"], ratio=[0.4, None], layer=1, start=2):
        greedy(model, batch)
        cached = model.compression.last.cache_tokens
    assert cached[1] < cached[0] and cached[1] == cached[3]
