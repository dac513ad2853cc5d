"""KVzip: what is kept against the attention of the bare model over prompt and repetition, and whole generations."""

import functools
from types import SimpleNamespace

import pytest
import torch

import hf_compress
from hf_compress.engine.evict import CachePolicy
from hf_compress.evaluate.prompts import encode_rows, reply
from hf_compress.evaluate.tasks import load_task
from hf_compress.layout import Layout
from hf_compress.methods.cache.kvzip import KVzip
from hf_compress.signals import Repetition
from hf_compress.stores import HeldLayer
from tests.invariants.reference import (
    FullLength,
    alone,
    bare,
    batch_of,
    close,
    embed,
    greedy,
    logits_of,
    prompt_positions,
    rerun,
    shared,
    slots,
)
from tests.invariants.test_cache import assert_masked
from tests.invariants.test_chat import everything_after, steps_of, turn

MODELS = pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl", "qwen2_mixed"])
LEVELS = pytest.mark.parametrize("level", ["pair", "uniform"])
ASKED = dict(chunk=7, anchor=3, prefix=2, later=3, instruction_ids=[5, 6], next_ids=[7], suffix_ids=[9, 10])


# -- choices --------------------------------------------------------------------------------------------------------
def evicted(method, scores, ratio=None, keep=None):
    """Per layer, sample and head the slots that stay; scores (layers, B, Hkv, S)."""
    N, B, _, S = scores.shape
    index = torch.arange(S).expand(B, -1)
    valid = torch.ones(B, S, dtype=torch.bool)
    layout = Layout(index, index, torch.full_like(index, -1), valid, torch.zeros(B, dtype=torch.int64), S)
    held = [HeldLayer() for _ in range(N)]
    for layer, score in zip(held, scores):
        layer.announce(layout)
        layer.update(*torch.randn(2, *score.shape, 4))
    cache = SimpleNamespace(layers=held)
    CachePolicy(method, ratio, keep, list(range(N)), N).after_passes(cache, dict(enumerate(scores)))
    out = []
    for layer in held:
        index, valid = (
            t.expand(B, scores.shape[2], -1) if t.ndim == 3 else t[:, None].expand(-1, scores.shape[2], -1)
            for t in (layer.layout.index, layer.layout.valid)
        )
        out.append([[i[v].tolist() for i, v in zip(*sample)] for sample in zip(index, valid)])
    return out


@LEVELS
def test_card(level):
    """Scores .9 .1 .5 .7 .3 .2, half kept: {0, 2, 3}."""
    scores = torch.tensor([0.9, 0.1, 0.5, 0.7, 0.3, 0.2])[None, None, None]
    assert evicted(KVzip(prefix=0, level=level), scores, ratio=0.5) == [[[[0, 2, 3]]]]


def test_one_budget_for_all_heads_and_layers():
    """By sorted lists per sample: exact sums, ends outside the ratio, one entry for every head."""
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 2, 2, 12, generator=g) * torch.tensor([1.0, 0.1, 3.0])[:, None, None, None]
    got = evicted(KVzip(prefix=2, later=1), scores, ratio=0.5)
    for b in range(2):
        places = [(i, h, j) for i in range(3) for h in range(2) for j in range(2, 11)]
        chosen = best(scores[:, b], places, 3 * 2 * 4)
        for i in range(3):
            for h in range(2):
                assert got[i][b][h] == sorted([0, 1, 11] + [j for layer, head, j in chosen if (layer, head) == (i, h)])
    one = evicted(KVzip(prefix=0), scores, keep=1)
    assert all(len(head) == 1 for layer in one for sample in layer for head in sample)
    assert evicted(KVzip(prefix=2), scores, keep=50) == [[[list(range(12))] * 2] * 2] * 3


def test_repetitions():
    """Chunks of the context without its ends; the next one is told where it starts; images stay whole."""
    method = KVzip(**ASKED | dict(chunk=5))
    assert method.repeats([-1] * 16) == [
        Repetition(2, 7, 2, 2, (5, 6), (9, 10)),
        Repetition(7, 12, 4, 2, (7,), (9, 10)),
        Repetition(12, 13, 9, 2, (7,), (9, 10)),
    ]
    spans = [(one.first, one.stop, one.hint) for one in KVzip(chunk=5).repeats([-1] * 6 + [0] * 8 + [1] * 3 + [-1] * 5)]
    assert spans == [(4, 14, 4), (14, 19, 6), (19, 22, 11)]
    assert KVzip().repeats([-1] * 4) == KVzip(later=30).repeats([-1] * 20) == []
    assert KVzip(instruction_ids=[3], chunk=6).repeats([-1] * 14)[1].before == (3,)


# -- against the bare model -----------------------------------------------------------------------------------------
@functools.cache
@torch.no_grad()
def received(name, row, **knobs):
    """(layers, Hkv, L) of one unpadded sample: the largest share of attention while the bare model repeats it.

    The repetition follows the prompt in one sequence without a cache; of the attention of its rows only the first
    entries, the chunk and the repetition itself count.
    """
    model, sample = bare(name), alone(name, batch_of(name), row)
    method, ids = KVzip(**{k: list(v) if isinstance(v, tuple) else v for k, v in knobs.items()}), sample["input_ids"]
    x, at = embed(name, sample)[0], prompt_positions(name, sample)
    at = at if at.ndim == 3 else at[None]
    visual = torch.where(ids[0] == 90, 0, -1).tolist()
    text = model.config.get_text_config()
    out = torch.zeros(text.num_hidden_layers, text.num_key_value_heads, len(x))
    table = model.get_input_embeddings()
    for one in method.repeats(visual):
        words = [table(torch.tensor(part, dtype=torch.int64)) for part in (one.before, one.after)]
        lead = torch.cat([words[0], x[one.hint : one.first], words[1]])
        more = at[:, 0, one.first : one.stop]
        start = int(at.max()) + 1
        more = torch.cat(
            [torch.arange(start, start + len(lead)).expand(len(at), -1), more - more.min() + start + len(lead)], 1
        )
        fed = torch.cat([x, lead, x[one.first : one.stop]])[None]
        positions = torch.cat([at, more[:, None]], 2)
        any_text = torch.full((1, fed.shape[1]), 5)
        blank = dict(input_ids=any_text, attention_mask=torch.ones_like(any_text))
        sequence = FullLength(name, blank, any_text[:, :1])
        where = positions if len(at) > 1 else positions[0]
        change = lambda kwargs, fed=fed, where=where: dict(kwargs, inputs_embeds=fed, position_ids=where)
        attention = rerun(model, blank, change, [sequence.causal(i) for i in range(len(out))])[1]
        own = [*range(one.sinks), *range(one.first, one.stop), *range(len(x), fed.shape[1])]
        for i, a in enumerate(attention):
            rows = a[0, :, len(x) :]
            share = rows[..., one.first : one.stop] / rows[..., own].sum(-1, keepdim=True)
            share = share.unflatten(0, (out.shape[1], -1)).amax((1, 2))
            out[i, :, one.first : one.stop] = torch.maximum(out[i, :, one.first : one.stop], share)
    return out


def best(scores, places, count):
    """The `count` best places (layer, head, row), ties to the first."""
    return sorted(places, key=lambda p: (-float(scores[p]), p))[:count]


@MODELS
@pytest.mark.parametrize(
    "knobs", [{}, {k: tuple(v) if isinstance(v, list) else v for k, v in ASKED.items()}], ids=["plain", "asked"]
)
def test_kept_entries(name, knobs):
    """Both levels, of a padded batch: the best of each sample, over heads and layers or in each head."""
    model, batch = shared(name), batch_of(name)
    L, prefix, later = batch["input_ids"].shape[1], knobs.get("prefix", 4), knobs.get("later", 0)
    acting = [i for i, w in enumerate(FullLength(name, batch, batch["input_ids"][:, :1]).windows) if w is None]
    for level in ("pair", "uniform"):
        with model.compressed("kvzip", ratio=0.5, level=level, **knobs):
            run = greedy(model, batch, max_new_tokens=1)
            counted = model.compression.report().totals()["prompt_tokens"]
        assert counted == batch["attention_mask"].sum()  # not those of the passes
        for b in range(2):
            scores = received(name, b, **knobs)[acting]
            n = scores.shape[2]
            places = [(i, h, j) for i in range(len(acting)) for h in range(2) for j in range(prefix, n - later)]
            count = (n - prefix - later) // 2
            chosen = best(scores, places, len(acting) * 2 * count)
            if level == "uniform":
                heads = {place[:2] for place in places}
                chosen = [p for head in heads for p in best(scores, [p for p in places if p[:2] == head], count)]
            for i, layer in enumerate(acting):
                held = slots(run.cache, layer, L, 2)[b]
                for h in range(2):
                    rows = {*range(prefix), *range(n - later, n), *(j for a, c, j in chosen if (a, c) == (i, h))}
                    assert held[h].nonzero()[:, 0].tolist() == sorted(L - n + j for j in rows)


# -- whole generations ----------------------------------------------------------------------------------------------
@LEVELS
@pytest.mark.parametrize(
    ("name", "attn"),
    [(name, "sdpa") for name in ("llama", "llava", "qwen2_5_vl", "qwen2_mixed")]
    + [("llama", "eager"), ("llava", "eager")],
)
def test_equals_masked_attention(level, name, attn):
    """The prompt is untouched, every later step and a second turn see what is kept."""
    model, batch = shared(name, attn), batch_of(name)
    plain = logits_of(model, batch)
    with model.compressed("kvzip", ratio=0.5, level=level, chunk=11):
        assert torch.equal(logits_of(model, batch), plain)
        first = greedy(model, batch)
        assert_masked(model, name, batch, first, 5)
        second = greedy(model, turn(name, first, batch), past_key_values=first.cache)
    full = FullLength(name, batch, everything_after(batch, [first, second]))
    see = [full.causal(i).expand(-1, full.heads, -1, -1).clone() for i in range(full.layers)]
    for i in range(full.layers):
        if full.windows[i] is None:
            see[i][:, :, full.prompt :] &= slots(second.cache, i, full.rows, full.heads)[:, :, None]
    close(second.logits, full.logits(see)[:, steps_of([first, second], full.prompt)[1]])


@LEVELS
@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_batch_beams_and_lookup(level, name):
    model, batch = shared(name), batch_of(name)
    options = dict(max_new_tokens=5, do_sample=False, suppress_tokens=[90, 91])
    with model.compressed("kvzip", ratio=0.5, level=level, chunk=11):
        together = greedy(model, batch)
        beams = model.generate(**batch, **options, num_beams=3, num_return_sequences=2)
        for row in range(2):
            sample = alone(name, batch, row)
            close(together.logits[row], greedy(model, sample).logits[0])
            single = model.generate(**sample, **options, num_beams=3, num_return_sequences=2)
            assert torch.equal(beams[2 * row : 2 * row + 2, -5:], single[:, -5:])
        looked_up = model.generate(**sample, **options, prompt_lookup_num_tokens=2)
        assert torch.equal(looked_up, model.generate(**sample, **options))


def counted(model, run):
    """How often the decoder runs during `run()`."""
    calls = []
    handle = model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    try:
        run()
    finally:
        handle.remove()
    return len(calls)


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_ratio_zero_costs_nothing(name):
    model, batch = shared(name), batch_of(name)
    expected = greedy(model, batch).logits
    with model.compressed("kvzip", ratio=0):
        assert torch.equal(greedy(model, batch).logits, expected)
        assert counted(model, lambda: logits_of(model, batch)) == 1
    with model.compressed("kvzip", ratio=0.5, chunk=10):
        longest = int(batch["attention_mask"].sum(1).max()) - 4
        passes = counted(model, lambda: logits_of(model, batch)) - 1
        assert passes == -(-longest // 10) if name == "llama" else 1 < passes < longest / 10


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_bytes(name):
    """Exactly the entries of the ratio in all, the ends beside it, one index per entry."""
    model, batch = shared(name), batch_of(name, "equal")
    with model.compressed("kvzip", ratio=0.5):
        cache = greedy(model, batch, max_new_tokens=1).cache
        totals, tokens = model.compression.report().totals(), model.compression.last.cache_tokens
    n = batch["input_ids"].shape[1]
    entries = 4 * ((n - 4) // 2 + 4)
    assert sum(t[0] for t in tokens) == entries and len({t[0] for t in tokens}) > 1
    data = sum(part.flat.untyped_storage().nbytes() for layer in cache.layers for part in layer.body)
    assert data == 2 * 2 * entries * 8 * 4
    assert data < totals["kv_bytes"] == sum(layer.nbytes() for layer in cache.layers)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_behind_a_vision_method(name):
    """Passes continue at the positions of a shortened prompt; rows are as alone, and later steps as masked."""
    model, batch = shared(name), batch_of(name)
    seen = []
    note = lambda module, args, kwargs: seen.append((args[1] if len(args) > 1 else kwargs["position_ids"]).clone())
    with model.compressed(["divprune", "kvzip"], ratio=0.5):
        handle = model.get_decoder().rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
        try:
            together = greedy(model, batch, max_new_tokens=3)
        finally:
            handle.remove()
        for row in range(2):
            close(together.logits[row], greedy(model, alone(name, batch, row), max_new_tokens=3).logits[0])
    prompt, again, step = seen[:3]
    for b in range(2):
        last = int(prompt[..., b, :].max())
        assert int(again[..., b, :][..., 0].min()) == last + 1 == int(step[..., b, 0].max())


def test_behind_a_decoder_method():
    """Layers that hold different rows cannot share one ranking; each by itself they are served."""
    model, batch = shared("llava"), batch_of("llava")
    both = model.compressed(["fastv", "kvzip"], ratio=[0.4, 0.5], layer=1)
    with both, pytest.raises(ValueError, match="a decoder method drops rows between them"):
        model.generate(**batch, max_new_tokens=2)
    with model.compressed(["fastv", "kvzip"], ratio=[0.4, 0.5], layer=1, level="uniform"):
        together = greedy(model, batch)
        counts = model.compression.last.cache_tokens
        for row in range(2):
            close(together.logits[row], greedy(model, alone("llava", batch, row)).logits[0])
    assert counts[1] == counts[2] == counts[3] < counts[0]


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        (dict(policy="hold"), "policy='hold'"),
        (dict(level="head"), "level='head'"),
        (dict(chunk=0), "chunk=0"),
        (dict(prefix=-1), "prefix=-1"),
        (dict(instruction_ids=["repeat"]), "instruction_ids='repeat'"),
        (dict(store="kivi4"), "level='pair' shares one budget"),
        (dict(heads="adaptive"), "use level='uniform'"),
    ],
)
def test_refusals(knobs, match):
    with pytest.raises(ValueError, match=match):
        shared("llama").compress("kvzip", ratio=0.8, **knobs)


# -- what it is worth ------------------------------------------------------------------------------------------------
def test_image_ranking_beats_random_eviction():
    """Images of the built-in Qwen2.5-VL, repeated on three axes: the question comes after the compression."""
    model, processor = hf_compress.load_demo("qwen")
    processor.tokenizer.padding_side = "left"
    task = load_task("demo:scenes", 80)
    lengths = [len(ids) for ids in processor.tokenizer(task.questions)["input_ids"]]
    rows = [i for i, n in enumerate(lengths) if n == max(set(lengths), key=lengths.count)]
    batch = encode_rows(processor, rows, [task.questions[i] for i in rows], task.shown(rows), "two-turn")
    right = {}
    for method in ("kvzip", "kvrandom"):
        with model.compressed(method, ratio=0.94):
            said = [r["answer"] for r in reply(model, processor, batch)]
        right[method] = sum(answer in task.answers[i] for i, answer in zip(rows, said)) / len(rows)
    assert right["kvzip"] > right["kvrandom"] + 0.1
