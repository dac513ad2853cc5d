"""What a cache method can be, by toys: a ranking over several layers, a score that runs on, a store of its own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from hf_compress.methods.base import CacheMethod, head_size
from hf_compress.methods.holding import Holding
from hf_compress.signals import QUERIES
from hf_compress.stores.packed import Dense
from hf_compress.stores.store import Store
from hf_compress.tensors.select import adaptive
from tests import tiny
from tests.invariants.reference import FullLength, batch_of, close, greedy, shared, slots
from tests.invariants.test_cache import assert_masked
from tests.toys import toy

STEPS = 5


def draws(layer, heads, rows):
    """(heads, rows), no two alike."""
    return torch.rand(heads, rows, generator=torch.Generator().manual_seed(layer))


class Pairs(CacheMethod):
    """The heads of every two neighbouring layers share one budget."""

    ragged = True

    def groups(self, layers):
        return [layers[i : i + 2] for i in range(0, len(layers), 2)]

    def score(self, view):
        _, H, S = view.shape
        return draws(view.layer, H, S).expand(view.shape).gather(2, view.order.clamp(min=0).expand(view.shape))

    def head_budget(self, score, valid, budget):
        return adaptive(score, valid, budget, 0.0)


@pytest.mark.parametrize("name", ["llama", "qwen2_mixed", "llava"])
def test_layers_that_share_a_budget(name):
    """What stays of two layers are the best entries of all their heads; decoding sees exactly that."""
    model, batch = shared(name), batch_of(name)
    with toy(Pairs, "cache") as key, model.compressed(key, ratio=0.5):
        run = greedy(model, batch, max_new_tokens=STEPS)
        assert_masked(model, name, batch, run, STEPS)
        cache = greedy(model, batch, max_new_tokens=1).cache
    full = FullLength(name, batch, batch["input_ids"][:, :1])
    for group in Pairs().groups(full.evicting):
        held = torch.cat([slots(cache, i, full.rows, full.kv_heads) for i in group], 1)
        for b, valid in enumerate(full.valid):
            L = int(valid.sum())
            score = torch.cat([draws(i, full.kv_heads, full.rows)[:, :L] for i in group])
            expected = torch.zeros(len(score), full.rows, dtype=torch.bool)
            first = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.argmax(1, keepdim=True), True)
            ranked = score.masked_fill(first, 2.0).flatten().argsort(descending=True)[: len(score) * (L // 2)]
            rows = valid.nonzero()[:, 0]
            expected[ranked // L, rows[ranked % L]] = True  # every head is sure of its best entry
            assert torch.equal(held[b], expected)


class Tall(Holding, CacheMethod):
    """Entries whose values are large, while decoding too."""

    policy = "hold"

    def score(self, view):
        return view.values.sum(-1)


class Learnt(Tall):
    """The same, as a module says it."""

    def module(self, model):
        return nn.Linear(head_size(model), 1, bias=False)

    def score(self, view):
        return view.module(view.values)[..., 0]


def test_a_score_that_is_trained(tmp_path):
    """Its module ranks, as it is now, at the end of a prompt and at every step; it is saved and read again."""
    model, batch = tiny.build("llama"), batch_of("llama")
    with toy(Tall, "cache") as key, model.compressed(key, ratio=0.5, policy="hold"):
        expected = greedy(model, batch, max_new_tokens=STEPS)
    with toy(Learnt, "cache") as key:
        model.compress(key, ratio=0.5, policy="hold")
        with torch.no_grad():
            other = greedy(model, batch, max_new_tokens=STEPS)
            model.compressor.cache.weight.fill_(1)
            found = greedy(model, batch, max_new_tokens=STEPS)
        model.compression.save(tmp_path)
        model.decompress()
        model.compress(key, ratio=0.5, policy="hold", weights=tmp_path)
        again = greedy(model, batch, max_new_tokens=STEPS)
    for run in (found, again):
        close(run.logits, expected.logits)
        assert all(torch.equal(a.keys, b.keys) for a, b in zip(run.cache.layers, expected.cache.layers))
    assert not all(torch.equal(a.keys, b.keys) for a, b in zip(other.cache.layers, expected.cache.layers))


class Peaks(Holding, CacheMethod):
    """Keep the newest entry and those that one row has looked at most, whichever it was."""

    policy = "hold"
    any_order = True

    def reads(self, depth):
        return {QUERIES}

    def begin(self, view):
        return view.window_attention(torch.ones_like(view.lengths[:, 0, 0]))

    def advance(self, score, new):
        return torch.maximum(score, new)

    def score(self, view):
        newest = view.order >= view.lengths + view.incoming - 1
        return view.scores.masked_fill(newest, torch.inf)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])  # entries are overwritten, or moved up
@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_a_running_score(name, attn):
    """Head by head, step by step against a list of rows and their best attention so far."""
    model, batch = shared(name, attn), batch_of(name)
    with toy(Peaks, "cache") as key, model.compressed(key, ratio=0.5, policy="hold"):
        caches = [greedy(model, batch, max_new_tokens=n).cache for n in range(1, STEPS + 1)]
        run = greedy(model, batch, max_new_tokens=STEPS)
    full = FullLength(name, batch, run.tokens)
    groups = full.heads // full.kv_heads
    see = [full.causal(i).expand(-1, full.heads, -1, -1).clone() for i in range(full.layers)]
    best: dict[tuple[int, int, int], dict[int, float]] = {}
    for step in range(STEPS):
        row, attention = full.prompt + step - 1, full.run(see)[1]
        for i in range(full.layers):
            held = slots(caches[step], i, full.rows, full.kv_heads)
            for b in range(2):
                prompt = batch["attention_mask"][b].nonzero()[:, 0].tolist()
                budget = len(prompt) // 2
                for h in range(full.kv_heads):
                    seen = attention[i][b, h * groups : (h + 1) * groups, row].mean(0)
                    mine = best.setdefault(
                        (i, b, h), dict.fromkeys(full.valid[b, : full.prompt].nonzero()[:, 0].tolist(), 0.0)
                    )
                    for j in list(mine) + [row]:
                        mine[j] = max(mine.get(j, 0.0), float(seen[j]))
                    while len(mine) > budget:
                        mine.pop(min((j for j in mine if j != row), key=lambda j: mine[j]))
                    assert held[b, h].nonzero()[:, 0].tolist() == sorted(mine)
                    left = dict(mine)  # of which one more goes before the next row
                    if step < STEPS - 1:
                        left.pop(min(left, key=lambda j: left[j]))
                        best[i, b, h] = left
                        see[i][b, h * groups : (h + 1) * groups, row + 1] = False
                        see[i][b, h * groups : (h + 1) * groups, row + 1, [*left, row + 1]] = True
    close(run.logits, full.logits(see))


class Halved(Store):
    """The prompt in half precision."""

    def settle(self, held, views: Sequence | None):
        for layer in held if views is not None else ():
            layer.pack(Dense(layer.keys.half()), Dense(layer.values.half()))


class Half(CacheMethod):
    """Stores everything, some of it in 16 bits."""

    def packing(self):
        return Halved()


@torch.no_grad()
def test_a_store():
    """Steps read what is stored: as a bare model does whose cache was rounded by hand."""
    model, batch = shared("llama"), batch_of("llama")
    with toy(Half, "cache") as key, model.compressed(key):
        run = greedy(model, batch, max_new_tokens=STEPS)
        last = model.compression.last
    mask = batch["attention_mask"]
    at = (mask.cumsum(1) - 1).clamp(min=0)
    cache = model(**batch, position_ids=at).past_key_values
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.half().float(), layer.values.half().float()
    for t in range(STEPS - 1):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        where, given = at[:, -1:] + t + 1, run.tokens[:, t : t + 1]
        out = model(input_ids=given, attention_mask=mask, position_ids=where, past_key_values=cache)
        close(run.logits[:, t + 1], out.logits[:, -1])
    assert 2 * sum(last.cache_bytes) == last.full_cache_bytes


def test_scores_of_another_shape_are_refused():
    class Flat(Pairs):
        def score(self, view):
            return super().score(view)[:, 0]

    model, wanted = shared("llama"), pytest.raises(ValueError, match=r"score: \(2, 24\) is not \(B, Hkv, S\)")
    with toy(Flat, "cache") as key, model.compressed(key, ratio=0.5), wanted:
        model(**batch_of("llama"))
