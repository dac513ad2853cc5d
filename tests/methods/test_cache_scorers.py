"""Rankings of cache entries and what they compose with: against their cards and against slow formulas."""

import sys
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

import hf_compress
from hf_compress.budget import pyramid, shares
from hf_compress.engine.entries import StoredView
from hf_compress.engine.evict import CachePolicy
from hf_compress.engine.rotary import Rotary
from hf_compress.layout import Layout
from hf_compress.methods.cache.a2sf import A2SF
from hf_compress.methods.cache.adakv import AdaKV, blend
from hf_compress.methods.cache.expected import ExpectedAttention, expected_logits
from hf_compress.methods.cache.h2o import H2O
from hf_compress.methods.cache.keydiff import KeyDiff
from hf_compress.methods.cache.kvrandom import RandomEntries
from hf_compress.methods.cache.tova import Tova
from hf_compress.stores import HeldLayer
from hf_compress.tensors import attention
from hf_compress.tensors.select import adaptive, best_slots
from tests import tiny
from tests.invariants.reference import (
    FullLength,
    alone,
    batch_of,
    close,
    embed,
    fresh,
    greedy,
    logits_of,
    shared,
    slots,
)
from tests.invariants.test_cache import assert_masked
from tests.invariants.test_chat import conversation, turn
from tests.tiny import GREEDY, IMG

MODELS = pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl"])
KNOBS = {"a2sf": dict(alpha=0.8, window=2), "adakv": dict(scorer_knobs=dict(window=4))}
METHODS = ["keydiff", "a2sf", "expected", "kvrandom", "adakv"]
PAIRS = pytest.mark.parametrize("method", METHODS)


def on(model, method, ratio=0.5, **knobs):
    return model.compressed(method, ratio=ratio, **(KNOBS.get(method, {}) | knobs))


def prompt_view(keys, queries=None, values=None, pads=(0,), budget=1, rotary=None, layer=0, content=None):
    """The view of a layer at the end of a prompt: keys (B, Hkv, S, d), the first `pads[b]` slots of row b empty."""
    B, S = keys.shape[0], keys.shape[2]
    at = torch.arange(S).expand(B, S)
    valid = at >= torch.tensor(pads)[:, None]
    layout = Layout(at, at, torch.full_like(at, -1), valid, torch.zeros(B, dtype=torch.int64), S)
    held = HeldLayer()
    held.announce(layout)
    held.update(keys, keys if values is None else values)
    record = None if queries is None else (queries, keys, 1.0)
    content = torch.zeros(B, dtype=torch.int64) if content is None else torch.tensor(content)
    return StoredView(held, layer, 4, torch.full((B,), budget), layout, record, rotary, content=content)


def kept(method, view, count=None):
    """Slots that stay of the first row and head."""
    holding = method.holding()
    if holding is not None and holding.running and view.scores is None:
        view.scores = holding.begin(view)
    count = int(view.budget[0]) if count is None else count
    return best_slots(method.score(view), view.valid, torch.tensor([count]))[0][0, 0].tolist()


def rows_of(batch, b):
    return batch["attention_mask"][b].nonzero()[:, 0].tolist()


def best(score, rows, count):
    """The `count` best of some rows, ties to the lower one."""
    return sorted(sorted(rows, key=lambda j: (-float(score[j]), j))[:count])


def head_mean(x, kv_heads):
    """(B, Hq, S) to (B, Hkv, S): mean over the query heads of a group."""
    return x.unflatten(1, (kv_heads, -1)).mean(2)


def held_rows(cache, layer, name, rows):
    return slots(cache, layer, rows, shared(name).config.get_text_config().num_key_value_heads)


# -- keydiff --------------------------------------------------------------------------------------------------------
def test_keydiff_card():
    """Keys (1,0), (1,0), (0,1): the one that differs from the anchor (.667, .333) stays first."""
    view = prompt_view(torch.tensor([[[[1.0, 0], [1, 0], [0, 1]]]]))
    score = KeyDiff().score(view)
    torch.testing.assert_close(score, torch.tensor([[[-0.894, -0.894, -0.447]]]), atol=1e-3, rtol=0)
    assert kept(KeyDiff(), view) == [2]


@pytest.mark.parametrize("anchor", ["unit", "raw"])
def test_keydiff_leaves_padding_out(anchor):
    keys = torch.randn(2, 2, 9, 4) * torch.rand(2, 2, 9, 1) * 5
    score = KeyDiff(anchor=anchor).score(prompt_view(keys, pads=(0, 4)))
    for b, first in enumerate((0, 4)):
        for h in range(2):
            real = [k / k.norm() if anchor == "unit" else k for k in keys[b, h, first:]]
            mean = sum(real) / len(real)
            expected = torch.stack([-torch.cosine_similarity(k, mean, 0) for k in keys[b, h, first:]])
            torch.testing.assert_close(score[b, h, first:], expected)


# -- a2sf and tova --------------------------------------------------------------------------------------------------
CARD = torch.tensor([[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.5, 0.1, 0.4, 0], [0.3, 0.3, 0.1, 0.3]])


def test_a2sf_card():
    """Rows of the h2o card, alpha .5: .825 .45 .3 .3; of C=2 the newest and the best stay."""
    view = prompt_view(torch.eye(4)[None, None], CARD.clamp(min=1e-30).log()[None, None], budget=2)
    method = A2SF(alpha=0.5, window=1)
    torch.testing.assert_close(method.begin(view), torch.tensor([[[0.825, 0.45, 0.3, 0.3]]]))
    assert kept(method, view) == [0, 3]
    assert torch.equal(A2SF(alpha=1.0).begin(view), H2O().begin(view))


@pytest.mark.parametrize("groups", [1, 2])
def test_a2sf_ages_from_the_last_row(groups):
    keys, queries, pads = torch.randn(2, 2, 11, 4), torch.randn(2, 2 * groups, 11, 4), (0, 5)
    got = A2SF(alpha=0.7).begin(prompt_view(keys, queries, pads=pads))
    for b, first in enumerate(pads):
        for h in range(2):
            total = torch.zeros(11)
            for g in range(groups):
                for r in range(first, 11):
                    seen = slice(first, r + 1)
                    row = (keys[b, h, seen] @ queries[b, h * groups + g, r]).softmax(0)
                    total[seen] += 0.7 ** (10 - r) * row
            torch.testing.assert_close(got[b, h, first:], total[first:] / groups)


def test_a2sf_does_not_read_old_rows(monkeypatch):
    """At alpha .9 rows older than 87 count less than 1e-4: they are not computed, and hardly change the sums."""
    read, powers = [], attention._powers
    spy = lambda query, *args: read.append(query.shape[3]) or powers(query, *args)
    monkeypatch.setattr(attention, "_powers", spy)
    view = prompt_view(torch.randn(2, 1, 400, 4), torch.randn(2, 1, 400, 4), pads=(0, 100))
    got = A2SF().begin(view)
    assert sum(read) == 88
    close(got, view.column_sums(weight=0.9 ** (399 - torch.arange(400.0)).expand(2, -1)), atol=1e-3)
    assert sum(read) == 488


def test_tova_card():
    """Mean row .4 .1 .2 .3, C=3: entry 1 goes. The mean is over all heads, two of each group."""
    rows = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.3, 0.5], [0.5, 0.1, 0.3, 0.1], [0.3, 0.1, 0.1, 0.5]])
    torch.testing.assert_close(rows.mean(0), torch.tensor([0.4, 0.1, 0.2, 0.3]))
    queries = torch.randn(1, 4, 4, 4)
    queries[0, :, -1] = rows.log()
    view = prompt_view(torch.eye(4).expand(1, 2, 4, 4), queries, budget=3)
    assert kept(Tova(), view) == [0, 2, 3]
    torch.testing.assert_close(view.scores, rows.mean(0).expand(1, 2, 4))


def running_choice(method, score, rows, budget, incoming):
    """What the method keeps of `rows`, given its score, when `incoming` rows are kept anyway."""
    if method == "tova":
        return best(score, rows, budget - incoming)
    window = (2 if budget > 2 else max(1, budget // 2)) - incoming
    newest = rows[len(rows) - window :]
    return sorted(best(score, rows[: len(rows) - window], budget - incoming - window) + newest)


@MODELS
@pytest.mark.parametrize("method", ["a2sf", "tova"])
def test_running_scores_on_models(method, name):
    """s <- alpha s + A_new (tova: alpha 0, all heads): kept entries at the end of the prompt and at three steps."""
    alpha = KNOBS["a2sf"]["alpha"] if method == "a2sf" else 0.0
    model, batch = shared(name), batch_of(name)
    with on(model, method):
        runs = [greedy(model, batch, max_new_tokens=n) for n in range(1, 5)]
    full = FullLength(name, batch, runs[-1].tokens)
    see = [full.causal(i).expand(-1, full.kv_heads, -1, -1).clone() for i in range(4)]
    score = [torch.zeros(2, full.kv_heads, full.rows) for _ in range(4)]
    stay = [[[rows_of(batch, b)] * full.kv_heads for b in range(2)] for _ in range(4)]
    budgets = [len(rows_of(batch, b)) // 2 for b in range(2)]
    for step, run in enumerate(runs):
        attention = full.run([s.repeat_interleave(full.heads // full.kv_heads, 1) for s in see])[1]
        first = 0 if step == 0 else full.prompt + step - 1
        for i in range(4):
            for row in range(first, full.prompt + step):
                new = head_mean(attention[i][:, :, row], full.kv_heads) * full.valid[:, row, None, None]
                new = new.mean(1, keepdim=True).expand_as(new) if method == "tova" else new
                score[i] = alpha * score[i] + new
            held = held_rows(run.cache, i, name, full.rows)
            for b in range(2):
                for h in range(full.kv_heads):
                    if step == 0:
                        stay[i][b][h] = running_choice(method, score[i][b, h], stay[i][b][h], budgets[b], 0)
                    assert held[b, h].nonzero()[:, 0].tolist() == stay[i][b][h]
                    if step < 3:  # room is made before the next row arrives
                        stay[i][b][h] = running_choice(method, score[i][b, h], stay[i][b][h], budgets[b], 1)
                        stay[i][b][h] = [*stay[i][b][h], full.prompt + step]
                        see[i][b, h, full.prompt + step] = False
                        see[i][b, h, full.prompt + step, stay[i][b][h]] = True


@pytest.mark.parametrize("method", [A2SF(alpha=0.7), Tova(), H2O()])
def test_rows_that_arrive_together_count_one_by_one(method):
    """A second turn: five rows at once (one of them padding in the second sample) or one after the other."""
    keys, queries, start = torch.randn(2, 2, 13, 4), torch.randn(2, 4, 13, 4), torch.rand(2, 2, 8)
    start = start if not isinstance(method, Tova) else start[:, :1].expand(-1, 2, -1)
    valid = torch.ones(2, 13, dtype=torch.bool)
    valid[1, 8] = False
    at, scores = torch.arange(13).expand(2, 13), []

    def rows(some):
        return Layout(at[:, some], at[:, some], at[:, some] * 0 - 1, valid[:, some], at[:, 0] * 0, some.stop)

    for steps in ([slice(8, 13)], [slice(r, r + 1) for r in range(8, 13)]):
        held, policy = HeldLayer(), CachePolicy(method, Fraction(1, 2), None, [0], 1)
        held.announce(rows(slice(0, 8)))
        held.update(keys[:, :, :8], keys[:, :, :8])
        held.side["scores"] = start
        for some in steps:
            held.announce(rows(some))
            held.update(keys[:, :, some], keys[:, :, some])
            policy.steps.after(held, rows(some), (queries[:, :, some], held.keys, 1.0))
        scores.append(held.side["scores"])
    torch.testing.assert_close(*scores)
    assert not torch.equal(scores[0][..., :8], start)


# -- expected -------------------------------------------------------------------------------------------------------
def test_expected_card():
    """mean (1,0), covariance 1/2, keys (1,0) and (0,2) with values of norm 1 and 2, epsilon .01: entry 1 stays."""
    keys, mean, cov = torch.tensor([[[[1.0, 0], [0, 2]]]]), torch.tensor([[[[1.0, 0]]]]), torch.eye(2)[None, None] / 2
    z = expected_logits(keys, mean, cov, 2**-0.5)
    torch.testing.assert_close(z, torch.tensor([[[0.8321, 0.5]]]), atol=1e-4, rtol=0)
    score = (z.softmax(-1) + 0.01) * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(score, torch.tensor([[[0.5923, 0.8555]]]), atol=1e-4, rtol=0)


def test_expected_logit_is_the_log_of_a_mean():
    """What z claims: the logarithm of the mean of exp(s q.k) over normal queries."""
    root, mean, key = torch.randn(3, 3) / 2, torch.randn(3) / 2, torch.randn(3) / 2
    queries = mean + torch.randn(400_000, 3) @ root.T
    z = expected_logits(key.view(1, 1, 1, 3), mean.view(1, 1, 1, 3), (root @ root.T)[None, None], 0.8)
    close(z.flatten(), (0.8 * queries @ key).exp().mean().log()[None], atol=5e-3)


def test_expected_scores_of_short_rows():
    """Rows of no more entries than sinks have no statistics; nothing becomes NaN, and sinks stay."""
    still = (torch.ones(1, 6, 4), torch.zeros(1, 6, 4))
    rotary = Rotary(still, lambda q, k, c, s: (q, k), lambda n: (still[0][:, :1], still[1][:, :1]))
    view = prompt_view(torch.randn(2, 1, 6, 4), torch.randn(2, 2, 6, 4), pads=(0, 3), budget=2, rotary=rotary)
    score = ExpectedAttention().score(view)
    assert score[0].isfinite().tolist() == [[False] * 4 + [True] * 2] and not score.isnan().any()
    assert best_slots(score, view.valid, torch.tensor([5, 2]))[0][1, 0, -2:].tolist() == [3, 4]


def expected_reference(name, batch, method):
    """(B, Hkv, S) per layer that sees everything, row by row, with rotation matrices written out."""
    full = FullLength(name, batch, batch["input_ids"][:, :1])
    decoder, found = full.model.get_decoder(), {}
    handles = [
        (getattr(layer.self_attn, "q_norm", None) or layer.self_attn.q_proj).register_forward_hook(
            lambda _, args, out, i=i: found.update({i: out})
        )
        for i, layer in enumerate(decoder.layers)
    ]
    with torch.no_grad():
        cache = decoder(
            inputs_embeds=embed(name, batch), position_ids=full.positions, attention_mask=batch["attention_mask"]
        ).past_key_values
    for handle in handles:
        handle.remove()
    out = {}
    for i, layer in enumerate(decoder.layers):
        if full.windows[i] is not None:
            continue
        attention, d = layer.self_attn, cache.layers[i].keys.shape[-1]
        q = found[i]
        q = q if q.ndim == 4 and q.shape[1] == full.heads else q.reshape(2, full.rows, full.heads, d).transpose(1, 2)
        out[i] = torch.full((2, full.kv_heads, full.rows), -torch.inf)
        for b in range(2):
            rows = rows_of(batch, b)
            R = mean_rotation(decoder, attention, i, full.positions[..., b, :].max() + 1, method.future, d)
            out[i][b, :, rows[: method.sinks]] = torch.inf
            rows = rows[method.sinks :]
            for h in range(full.kv_heads):
                share = torch.zeros(len(rows))
                groups = full.heads // full.kv_heads
                for g in range(groups):
                    x = q[b, h * groups + g, rows]
                    mean, cov = R @ x.mean(0), R @ torch.cov(x.T, correction=0) @ R.T
                    scale, keys = attention.scaling, cache.layers[i].keys[b, h, rows]
                    z = [scale * k @ mean + scale**2 / 2 * k @ cov @ k for k in keys]
                    share += torch.stack(z).softmax(0) / groups
                out[i][b, h, rows] = (share + method.epsilon) * cache.layers[i].values[b, h, rows].norm(dim=-1)
    return out


def mean_rotation(decoder, attention, layer, first, count, d):
    """(d, d) mean of the matrices that the model multiplies queries with at `count` positions from `first` on."""
    if getattr(attention, "use_rope", True) == 0 or decoder.config.model_type in ("cohere2", "exaone4"):
        return torch.eye(d)  # full layers of these models do not rotate
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    kind = [decoder.config.layer_types[layer]] if decoder.config.model_type == "gemma3_text" else []
    total = torch.zeros(d, d)
    for p in range(int(first), int(first) + count):
        cos, sin = decoder.rotary_emb(torch.zeros(1), torch.tensor([[p]]), *kind)
        n = min(d, cos.shape[-1])
        for c in range(d):
            e = torch.eye(d)[c].view(1, 1, 1, d)
            total[:, c] += torch.cat([apply(e[..., :n], e[..., :n], cos, sin)[0], e[..., n:]], -1).flatten()
    return total / count


FAMILIES = ["llama", "llava", "qwen2_5_vl", "qwen3", "granite", "gemma3_text"]
FAMILIES += ["phi", "glm", "cohere2", "exaone4", "smollm3"]  # rotate some channels, pairs of channels, some layers


@pytest.mark.parametrize("name", FAMILIES)
def test_expected_on_models(name, monkeypatch):
    """Any kind of rotation, and the positions that come next, on M-RoPE too."""
    model, batch, seen = shared(name), batch_of(name), {}
    score = ExpectedAttention.score
    monkeypatch.setattr(ExpectedAttention, "score", lambda self, view: seen.setdefault(view.layer, score(self, view)))
    method = ExpectedAttention(future=6, epsilon=0.01)
    with on(model, "expected", future=6, epsilon=0.01):
        cache = greedy(model, batch, max_new_tokens=1).cache
    reference = expected_reference(name, batch, method)
    assert seen.keys() == reference.keys() and seen
    for i, expected in reference.items():
        held = held_rows(cache, i, name, expected.shape[-1])
        for b in range(2):
            rows = rows_of(batch, b)
            torch.testing.assert_close(seen[i][b, :, rows], expected[b, :, rows], atol=1e-5, rtol=1e-4)
            for h in range(expected.shape[1]):
                assert held[b, h].nonzero()[:, 0].tolist() == best(seen[i][b, h], rows, len(rows) // 2)


@pytest.mark.parametrize(("name", "also"), [("llama", None), ("qwen2_5_vl", None), ("llava", "fastervlm")])
def test_the_next_rotation_is_the_one_that_comes(name, also, monkeypatch):
    """`future_rotation(1)` against the tables of the first decode step, also where the prompt was shortened before."""
    model, batch, ahead, used = shared(name), batch_of(name), [], []
    score = ExpectedAttention.score

    def spy(self, view):
        ahead.append(view.future_rotation(1))
        return score(self, view)

    monkeypatch.setattr(ExpectedAttention, "score", spy)
    names = ["expected"] if also is None else [also, "expected"]
    with model.compressed(names, ratio=0.5):
        attention = model.get_decoder().layers[0].self_attn
        note = lambda _, args, kwargs: used.append(kwargs["position_embeddings"])
        handle = attention.register_forward_pre_hook(note, with_kwargs=True)
        greedy(model, batch, max_new_tokens=2)
        handle.remove()
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    cos, sin = (t.expand(2, 8, -1) for t in used[-1])
    basis = torch.eye(8).expand(2, 1, 8, 8)
    torch.testing.assert_close(ahead[0].expand(2, -1, -1), apply(basis, basis, cos, sin)[0][:, 0])


def test_looking_ahead_leaves_dynamic_frequencies_alone():
    """Dynamic RoPE keeps frequencies for the longest text so far; asking for later positions must not be that text."""
    model = fresh("llama")
    config = model.config
    config.max_position_embeddings = 24
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config)
    before = decoder.rotary_emb.inv_freq.clone()
    with on(model, "expected"):
        logits_of(model, batch_of("llama"))
    assert torch.equal(decoder.rotary_emb.inv_freq, before)
    decoder.rotary_emb(torch.zeros(1), torch.tensor([[500]]))
    assert not torch.equal(decoder.rotary_emb.inv_freq, before)


# -- kvrandom -------------------------------------------------------------------------------------------------------
def test_kvrandom_is_even_and_repeatable():
    keys = torch.zeros(1, 4, 40, 2)
    before, counts = torch.get_rng_state(), torch.zeros(40)
    for seed in range(200):
        views = [prompt_view(keys, budget=10, layer=i) for i in (0, 1)]
        held = [best_slots(RandomEntries(seed=seed).score(v), v.valid, torch.tensor([10]))[0] for v in views]
        again = best_slots(RandomEntries(seed=seed).score(views[0]), views[0].valid, torch.tensor([10]))[0]
        assert torch.equal(held[0], again) and not torch.equal(*held)
        assert not torch.equal(held[0][0, 0], held[0][0, 1])  # heads draw apart
        counts += F.one_hot(held[0], 40).sum((0, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert counts[-1] == 800 and counts.sum() == 8000
    assert (counts[:-1] - 800 * 9 / 39).abs().max() < 60  # five standard deviations of a binomial draw


@pytest.mark.parametrize(
    ("budget", "sinks", "window", "sure"), [(1, 2, 1, [8]), (3, 2, 1, [0, 1, 8]), (2, 4, 3, [7, 8])]
)
def test_kvrandom_protects(budget, sinks, window, sure):
    view = prompt_view(torch.zeros(1, 1, 9, 2), budget=budget)
    assert kept(RandomEntries(sinks=sinks, window=window), view) == sure
    padded = prompt_view(torch.zeros(2, 3, 12, 2), pads=(0, 3), budget=5, content=[7, 8])
    alone_ = prompt_view(torch.zeros(1, 3, 9, 2), budget=5, content=[8])
    method = RandomEntries(seed=3, sinks=sinks, window=window)
    assert torch.equal(method.score(padded)[1, :, 3:], method.score(alone_)[0])


# -- adakv ----------------------------------------------------------------------------------------------------------
def slow_counts(score, budget, floor):
    """Entries per head of one row, (H, S) without padding: floors first, then one after the other from the best."""
    H, S = score.shape
    taken = set()
    for h in range(H):
        sure = int(score[h].isinf().sum())
        sure = max(1, sure + int(max(0, budget - sure) * floor))
        taken |= {(h, j) for j in best(score[h], range(S), sure)}
    rest = sorted((-float(score[h, j]), h, j) for h in range(H) for j in range(S) if (h, j) not in taken)
    taken |= {(h, j) for _, h, j in rest[: H * budget - len(taken)]}
    return [sum(1 for h, _ in taken if h == head) for head in range(H)]


def test_adakv_card():
    """P=2, alpha .5: the ranking gives (3,1); guaranteed floors keep that, blending gives (2,2)."""
    score = torch.tensor([[[0.9, 0.8, 0.7, 0.1], [0.3, 0.2, 0.05, 0.01]]])
    valid, budget = torch.ones(1, 1, 4, dtype=torch.bool), torch.tensor([2])
    for rule, floor, expected in [("guarantee", 0.5, [3, 1]), ("blend", 0.5, [2, 2]), ("blend", 0.0, [3, 1])]:
        counts = AdaKV(floor=floor, floor_rule=rule).head_budget(score, valid, budget)
        assert counts.tolist() == [expected]


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 1.0])
def test_adakv_floors_and_sums(floor):
    valid = torch.ones(2, 1, 20, dtype=torch.bool)
    valid[1, :, :7] = False
    for budget in ([1, 1], [9, 6], [20, 13]):
        score = torch.rand(2, 4, 20) ** 4 * torch.tensor([8.0, 1.0, 2.0, 0.1])[:, None]
        score[:, :, -2:] = torch.inf if min(budget) > 2 else 0.5
        counts = adaptive(score, valid, torch.tensor(budget), floor)
        slow = [slow_counts(score[0], budget[0], floor), slow_counts(score[1, :, 7:], budget[1], floor)]
        assert counts.tolist() == slow
        mixed = blend(counts, torch.tensor(budget), floor)
        assert mixed.sum(1).tolist() == counts.sum(1).tolist() == [4 * b for b in budget]
        assert ((mixed - ((1 - floor) * counts + floor * torch.tensor(budget)[:, None])).abs() < 1.5).all()


def test_adakv_normalize():
    """Head scores times the share that the best P of them make up; protected entries are not part of it."""
    score = torch.tensor([[[torch.inf, 0.4, 0.3, 0.3], [torch.inf, 0.6, 0.1, 0.1]]])
    valid, budget = torch.ones(1, 1, 4, dtype=torch.bool), torch.tensor([2])
    captured = AdaKV(normalize=True)._captured(score, valid, budget)
    torch.testing.assert_close(captured.flatten(), torch.tensor([0.4, 0.75]))
    assert adaptive(score, valid, torch.tensor([3]), 0.0).tolist() == [[4, 2]]
    # of P=2 the shares are .7 and .875: .28 .21 .21 against .525 .0875 .0875
    assert AdaKV(normalize=True, floor=0.0).head_budget(score, valid, torch.tensor([3])).tolist() == [[4, 2]]
    wide = torch.tensor([[[0.5, 0.25, 0.25], [0.9, 0.24, 0.0]]])
    assert AdaKV(floor=0.0).head_budget(wide, valid[..., :3], torch.tensor([2])).tolist() == [[3, 1]]
    first = torch.tensor([1])  # shares .5 and .79: .25 .125 .125 against .711 .19 0
    assert AdaKV(floor=0.0).head_budget(wide, valid[..., :3], first).tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="normalize=True needs scores that are not negative"):
        AdaKV(normalize=True).head_budget(-wide, valid[..., :3], first)


@MODELS
@pytest.mark.parametrize("scorer", ["snapkv", "expected", "keydiff"])
def test_adakv_on_models(name, scorer, monkeypatch):
    """Per layer the best of all heads above the floors; later steps see just these; bytes are entries."""
    model, batch, seen = shared(name), batch_of(name), {}
    cls = hf_compress.methods()[scorer].cls
    score = cls.score
    monkeypatch.setattr(cls, "score", lambda self, view: seen.setdefault(view.layer, score(self, view)))
    knobs = {"snapkv": dict(window=4), "expected": dict(future=8), "keydiff": {}}[scorer]
    with on(model, "adakv", scorer=scorer, scorer_knobs=knobs):
        run = greedy(model, batch, max_new_tokens=4)
        first = greedy(model, batch, max_new_tokens=1).cache
        totals = model.compression.report().totals()
        assert_masked(model, name, batch, run, 4)
    spread, stored = set(), 0
    for i, layer in enumerate(first.layers):
        held, entries = held_rows(first, i, name, batch["input_ids"].shape[1]), 0
        for b in range(2):
            rows = rows_of(batch, b)
            counts = slow_counts(seen[i][b][:, rows], len(rows) // 2, 0.2)
            spread |= {n - len(rows) // 2 for n in counts}
            entries += sum(counts)
            for h, n in enumerate(counts):
                assert held[b, h].nonzero()[:, 0].tolist() == best(seen[i][b, h], rows, n)
        assert entries == held.shape[1] * sum(len(rows_of(batch, b)) // 2 for b in range(2))
        assert layer.keys.shape[2] == layer.values.shape[2] == 0
        bodies = [t.untyped_storage().nbytes() for part in layer.body for t in part.tensors()]
        assert sum(bodies) == 2 * entries * 8 * 4
        stored += sum(bodies) + sum(t.numel() * t.element_size() for t in layer.layout.tensors())
    assert len(spread) > 2 and totals["kv_bytes"] == stored


@pytest.mark.parametrize("scorer", ["h2o", "tova", "a2sf", "pyramidkv", "knorm"])
def test_adakv_leaves_the_rest_to_its_scorer(scorer):
    """Scores, running sums and layer budgets: with equal heads adakv is the scorer itself."""
    model, batch = shared("llava"), batch_of("llava")
    policy = "hold" if "hold" in hf_compress.methods()[scorer].cls().policies else "grow"
    knobs = {"a2sf": dict(window=2), "pyramidkv": dict(window=2, kernel=7, pooling="max"), "knorm": dict(skip_layers=1)}
    with model.compressed(scorer, ratio=0.6, policy=policy, **knobs.get(scorer, {})):
        expected = greedy(model, batch)
    knobs = dict(scorer=scorer, scorer_knobs=knobs.get(scorer), policy=policy)
    with model.compressed("adakv", ratio=0.6, heads="uniform", **knobs):
        assert torch.equal(greedy(model, batch).logits, expected.logits)
    with model.compressed("adakv", ratio=0.6, **knobs):
        run = greedy(model, batch, max_new_tokens=4)
        assert_masked(model, "llava", batch, run, 4)
        mine, rows = greedy(model, batch).cache, batch["input_ids"].shape[1] + 4
    counts = [torch.stack([held_rows(c, i, "llava", rows).sum(-1) for i in range(4)]) for c in (expected.cache, mine)]
    assert torch.equal(*(c.sum(2) for c in counts))  # as many entries in all heads, shared out otherwise
    assert torch.equal(*counts) == (scorer == "tova")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(scorer="adakv"), "is not a ranking"),
        (dict(scorer="kivi"), "is not a ranking.*'snapkv'"),
        (dict(scorer="fastv"), "is not a ranking"),
        (dict(scorer="streaming"), "is not a ranking"),
        (dict(scorer="snapvk"), "snapkv"),
        (dict(scorer_knobs=dict(policy="hold")), "given to adakv itself"),
        (dict(scorer_knobs=dict(windows=4)), "arguments of 'snapkv' alone"),
        (dict(scorer_knobs=[4]), "must be a dict"),
        (dict(policy="hold"), "policy='hold' must be one of"),
        (dict(scorer="tova", floor=2), "floor=2"),
        (dict(floor_rule="none"), "floor_rule='none'"),
    ],
)
def test_adakv_refuses(knobs, message):
    with pytest.raises(ValueError, match=message):
        shared("llama").compress("adakv", ratio=0.5, **knobs)


# -- pyramidkv ------------------------------------------------------------------------------------------------------
def test_pyramid_card():
    """N=4, L=1000, w=8, 500 beyond it on average: 975 658 342 25 beyond it, 2000 in all."""
    assert [n - 8 for n in pyramid(508, 1000, 4, 8)] == [975, 658, 342, 25]


def test_shares_round_by_largest_remainders():
    """3 + 1.5 + .5, the earlier of equal remainders up; what a full one cannot hold goes to the others."""
    assert shares(5, [6, 3, 1]) == [3, 2, 0]
    assert shares(10, [8, 1, 1], [4, 9, 9]) == [4, 3, 3]
    assert shares(7, [0, 0, 0]) == [3, 2, 2]


def test_pyramid_sums():
    g = torch.Generator().manual_seed(0)
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=g))
    for _ in range(500):
        length, layers, window = draw(1, 600), draw(1, 40), draw(0, 40)
        mean = draw(1, length)
        counts = pyramid(mean, length, layers, window)
        assert sum(counts) == layers * mean and len(counts) == layers
        assert list(counts) == sorted(counts, reverse=True)
        assert max(counts) <= length and min(counts) >= min(mean, min(window, mean - 1) + 1)


@MODELS
def test_pyramidkv_on_models(name):
    """SnapKV's choice with the pyramid's budgets, which sum to the uniform ones."""
    model, batch = shared(name), batch_of(name)
    with on(model, "pyramidkv", window=2):
        run = greedy(model, batch, max_new_tokens=3)
        counts = model.compression.last.cache_tokens
        assert_masked(model, name, batch, run, 3)
    lengths = batch["attention_mask"].sum(1).tolist()
    for b, length in enumerate(lengths):
        assert [c[b] for c in counts] == list(pyramid(length // 2, length, 4, 2))
    with model.compressed("snapkv", ratio=0.5, budget="pyramid", window=2):
        assert torch.equal(greedy(model, batch, max_new_tokens=3).logits, run.logits)


# -- what all rankings compose with ---------------------------------------------------------------------------------
def visual_rows(batch, b):
    return [j for j in rows_of(batch, b) if batch["input_ids"][b, j] == IMG]


@pytest.mark.parametrize("kind", ["inputs", "mixed"])
@pytest.mark.parametrize("method", [*METHODS, "snapkv", "h2o", "tova", "knorm"])
def test_scope_visual(method, kind):
    """All text stays and floor(visual * (1 - ratio)) visual entries; rows without images stay whole."""
    model, batch = shared("llava"), batch_of("llava", kind)
    with on(model, method, ratio=0.7, scope="visual", policy="grow"):
        cache = greedy(model, batch, max_new_tokens=1).cache
    for i in range(4):
        held = held_rows(cache, i, "llava", batch["input_ids"].shape[1])
        for b in range(2):
            visual = visual_rows(batch, b)
            text = sorted(set(rows_of(batch, b)) - set(visual))
            assert held[b][:, text].all()
            per_head = held[b][:, visual].sum(1)
            wanted = len(visual) * 3 // 10
            assert per_head.sum() == wanted * len(per_head)
            assert method == "adakv" or (per_head == wanted).all()


def test_scope_text_and_hold():
    """The ratio is that of text; images stay whole, also while decoding at a fixed budget."""
    model, batch = shared("llava"), batch_of("llava")
    with on(model, "h2o", scope="text"):
        cache = greedy(model, batch).cache
    for b in range(2):
        visual = visual_rows(batch, b)
        text = len(rows_of(batch, b)) - len(visual)
        held = held_rows(cache, 0, "llava", batch["input_ids"].shape[1] + 4)[b]
        assert held[:, visual].all() and (held.sum(1) == len(visual) + text // 2).all()


@pytest.mark.parametrize("method", ["tova", "keydiff", "adakv"])
@pytest.mark.parametrize("ratio", [0.5, 0.97])
def test_protect_text(method, ratio):
    """Text stays inside the budget; where it is more than that, the text is the budget, while decoding too."""
    model, batch = shared("llava"), batch_of("llava")
    policy = "grow" if method == "adakv" else "hold"
    with on(model, method, ratio=ratio, protect="text", policy=policy):
        caches = [greedy(model, batch, max_new_tokens=n).cache for n in (1, 6)]
    length = batch["input_ids"].shape[1]
    for new, cache in zip((0, 5), caches):
        held = held_rows(cache, 2, "llava", length + 5)
        for b in range(2):
            rows = rows_of(batch, b)
            text = sorted(set(rows) - set(visual_rows(batch, b)))
            assert held[b][:, text].all() and held[b][:, length : length + new].all()
            budget = max(len(rows) * (1 if ratio == 0.5 else 0.06) // 2, len(text))
            wanted = max(budget, len(text) + new) if policy == "hold" else budget + new
            assert held[b].sum() == wanted * len(held[b])


def packed_bytes(entries):
    """Of one head of 8 channels in 4 bits: the newest 32 as they are (in 16 bits), codes, step and minimum per channel
    and 32 tokens (keys) and per token (values)."""
    packed = max(0, entries - 32)
    return 2 * 8 * 2 * (entries - packed) + packed * 8 + -(-packed // 32) * 8 * 4 + packed * 4


@pytest.mark.parametrize("method", ["snapkv", "keydiff", "expected", "adakv"])
def test_store_packs_what_stays(method):
    """As many entries of the best as the bytes allow, in 4 bits; every byte is accounted for."""
    model, ratio = shared("llama"), 0.8
    prompts = [[1, *torch.randint(3, 80, (n,)).tolist()] for n in (399, 299)]
    batch = tiny.batch("llama", model, prompts)
    rows = batch["input_ids"].shape[1]
    with on(model, method, ratio=ratio, store="kivi4"):
        packed = greedy(model, batch, max_new_tokens=1).cache
        assert model.compression.report().totals()["kv_bytes"] == sum(layer.nbytes() for layer in packed.layers)
        later = greedy(model, batch).cache
    counts = packed.layers[0].layout.valid.sum((1, 2)) // 2
    for row, n in enumerate(counts.tolist()):
        promised = (1 - ratio) * len(prompts[row]) * 2 * 8 * 2
        assert 0.95 * promised < packed_bytes(n) + 2 * n <= promised  # with an index of two bytes per entry
        with on(model, method, ratio=None, keep=n):
            dense = greedy(model, alone("llama", batch, row), max_new_tokens=1).cache
        for i in range(4):
            first = rows - len(prompts[row])
            assert torch.equal(slots(packed, i, rows, 2)[row, :, first:], slots(dense, i, rows - first, 2)[0])
            valid, alive = packed.layers[i].layout.valid[row], dense.layers[i].layout.valid[0]
            for rough, exact in zip(packed.layers[i].whole(), dense.layers[i].whole()):
                error = (exact[0][alive] - rough[row][valid]).abs()
                assert 0 < error.max() < exact.abs().max() / 15 * 1.1  # half of the widest step
    for i, (b, c) in enumerate(zip(packed.layers, later.layers)):
        assert (b.keys.shape[2], c.keys.shape[2], len(b.body[0])) == (32, 36, len(b.layout) - 32)
        older = (slots(packed, i, rows, 2).sum(-1) - 32).clamp(min=0)  # than the newest 32, per head
        if method != "adakv":  # heads of equal length: the shorter row is filled up, as in the bare cache
            older = older.amax(0, keepdim=True).expand_as(older)
        full = sum(packed_bytes(32 + n) - packed_bytes(32) for n in older.flatten().tolist())
        tail, index = 2 * 2 * 2 * 32 * 8 * 4, sum(t.numel() * t.element_size() for t in b.layout.tensors())
        assert sum(t.untyped_storage().nbytes() for t in b.tensors()) == b.nbytes() == full + tail + index


def test_rows_of_short_segments_keep_the_span():
    """A row that is chosen alone out of a batch keeps the slots that the layout counts."""
    model = shared("llama")
    with model.compressed("snapkv", ratio=0.5, window=4, heads="adaptive"):
        cache = greedy(model, batch_of("llama"), max_new_tokens=3).cache
    cache.batch_select_indices(torch.tensor([1]))
    for layer in cache.layers:
        assert layer.whole()[0].shape[2] == layer.whole()[1].shape[2] == len(layer.layout)


def long_batch(model):
    prompts = [[1, *torch.randint(3, 80, (n,)).tolist()] for n in (119, 99)]
    return tiny.batch("llama", model, prompts)


def test_rows_below_an_absolute_budget_have_room_left():
    """keep=20 per head: a prompt of 15 tokens grows to 20 under policy="hold" before anything goes."""
    model, batch = shared("llama"), batch_of("llama")
    for heads in ("uniform", "adaptive"):
        with model.compressed("h2o", keep=20, heads=heads):
            cache = greedy(model, batch, max_new_tokens=9).cache
        held = held_rows(cache, 0, "llama", 24 + 8)
        assert held.sum((1, 2)).tolist() == [40, 40]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(scope="visual", policy="hold"), "scope='visual' with policy='hold'"),
        (dict(scope="visual", protect="text"), "protect='text' has no meaning"),
        (dict(store="kivi4", policy="hold"), "store='kivi4' with policy='hold'"),
        (dict(store="kivi8", policy="grow"), "store='kivi8' alone removes"),
    ],
)
def test_knobs_that_do_not_go_together(knobs, message):
    with pytest.raises(ValueError, match=message):
        shared("llava").compress("tova", ratio=0.3, **knobs)


@pytest.mark.parametrize(
    ("method", "knobs", "message"),
    [
        ("keydiff", dict(anchor="median"), "anchor="),
        ("a2sf", dict(alpha=0), "alpha=0"),
        ("a2sf", dict(alpha=1.5), "alpha=1.5"),
        ("a2sf", dict(window=0), "window=0"),
        ("expected", dict(sinks=-1), "sinks=-1"),
        ("expected", dict(future=0), "future=0"),
        ("expected", dict(epsilon=-1), "epsilon=-1"),
        ("expected", dict(policy="hold"), "policy='hold'"),
        ("kvrandom", dict(seed=-1), "seed=-1"),
        ("kvrandom", dict(policy="hold"), "policy='hold'"),
    ],
)
def test_knobs_are_checked(method, knobs, message):
    with pytest.raises(ValueError, match=message):
        shared("llama").compress(method, ratio=0.5, **knobs)


# -- end to end -----------------------------------------------------------------------------------------------------
@MODELS
@PAIRS
def test_whole_models(method, name):
    """Nothing removed is the bare model; a batch is its rows; eager is sdpa; later steps see what is kept."""
    model, batch = shared(name), batch_of(name)
    plain = greedy(model, batch)
    with on(model, method, ratio=0):
        assert torch.equal(greedy(model, batch).logits, plain.logits)
    with on(model, method):
        run = greedy(model, batch)
        assert torch.equal(run.logits[:, 0], plain.logits[:, 0])  # the prompt saw everything
        assert_masked(model, name, batch, run, 5)
        for row in range(2):
            single = greedy(model, alone(name, batch, row))
            close(single.logits[0], run.logits[row])
            assert torch.equal(single.tokens[0], run.tokens[row])
    with on(shared(name, "eager"), method):
        close(greedy(shared(name, "eager"), batch).logits, run.logits)


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
@PAIRS
def test_ways_to_generate(method, name):
    """Beams, several sequences, prompt lookup, and a second turn on the returned cache."""
    model, batch = shared(name), batch_of(name)
    prompt = batch["input_ids"].shape[1]
    with on(model, method):
        run = greedy(model, batch)
        one = model.generate(**batch, **GREEDY, num_beams=3, num_return_sequences=2)
        per_row = [
            model.generate(**alone(name, batch, b), **GREEDY, num_beams=3, num_return_sequences=2) for b in (0, 1)
        ]
        for b in range(2):
            assert torch.equal(one[2 * b : 2 * b + 2, prompt:], per_row[b][:, -5:])
        torch.manual_seed(0)
        several = model.generate(**batch, **(GREEDY | dict(do_sample=True, top_k=1)), num_return_sequences=3)
        assert torch.equal(several, run.out.sequences.repeat_interleave(3, 0))
        runs = conversation(name, model, batch, turns=2)
        assert torch.equal(runs[0].logits, run.logits)
        for b in range(2):
            sample = alone(name, batch, b)
            first = greedy(model, sample)
            more = runs[1].out.sequences[b : b + 1, prompt + 5 : prompt + 11]
            second = greedy(model, turn(name, first, sample, ids=more), past_key_values=first.cache)
            close(second.logits[0], runs[1].logits[b])
    lookup = alone(name, batch, 0) | dict(prompt_lookup_num_tokens=3)
    with on(model, method):
        if model.compression.context.cache_method.policy == "hold":
            with pytest.raises(ValueError, match="policy='grow'"):
                model.generate(**lookup, **GREEDY)
    with on(model, method, policy="grow"):
        expected = model.generate(**alone(name, batch, 0), **GREEDY)
        assert torch.equal(model.generate(**lookup, **GREEDY), expected)
