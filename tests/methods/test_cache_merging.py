"""Methods that merge what they evict: cards, slow formulas on random entries, whole models."""

import itertools

import pytest
import torch

from hf_compress.methods.cache.ems import EMS
from hf_compress.methods.cache.lookm import LookM
from hf_compress.tensors.kvmerge import leaving, nearest, pour
from hf_compress.tensors.ranking import tiered
from tests.invariants.reference import alone, batch_of, close, greedy, logits_of, shared, slots, untouched
from tests.methods.edited import LONG, Random, assert_entries, best, edited_logits
from tests.tiny import IMG

IMAGES = (range(3, 15), range(2, 11))
MERGERS = ["lookm", "ems"]
OPTIONS = {"lookm": {}, "ems": {"window": 4, "kernel": 3, "tau": 0.1}}  # prompts of 15 tokens, random directions


# -- pieces ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("merging", "merged"), [("averaged", (0.9, 0.3)), ("pivotal", (0.95, 0.15)), ("weighted", (0.82, 0.24))]
)
def test_lookm_card(merging, merged):
    """Kept key (1, 0), dropped (.8, .6), cosine .8."""

    class View:
        keys = torch.tensor([[[[1.0, 0], [0.8, 0.6]]]])
        values = torch.tensor([[[[4.0, 0, 0], [0, 2, 6]]]])
        valid = torch.ones(1, 1, 2, dtype=torch.bool)

    keys, values = LookM(merging=merging).merge(View(), torch.zeros(1, 1, 1, dtype=torch.long), None)
    torch.testing.assert_close(keys, torch.tensor([[[merged]]]))
    share = {"averaged": (0.5, 0.5), "pivotal": (0.75, 0.25), "weighted": (0.5, 0.4)}[merging]
    expected = share[0] * torch.tensor([4.0, 0, 0]) + share[1] * torch.tensor([0.0, 2, 6])
    torch.testing.assert_close(values[0, 0, 0], expected)


def test_ems_card():
    """Local .1 .3, global 8 2, their means .2 and 5: the larger of (.1, .32) and (.3, .08)."""

    class View:
        budget, lengths = torch.tensor([[[2]]]), torch.tensor([[[3]]])
        order, valid = torch.arange(3)[None, None], torch.ones(1, 1, 3, dtype=torch.bool)

        def window_attention(self, rows):
            assert rows.tolist() == [1]
            return torch.tensor([[[0.1, 0.3, 0.6]]])

        def column_sums(self):
            return torch.tensor([[[8.0, 2.0, 1.0]]])

        def once(self, key, make):
            return make()

    for combine, expected in (("max", [0.32, 0.3, 0.6]), ("sum", [0.42, 0.38, 0.64])):
        score = EMS(window=1, kernel=1, combine=combine).importance(View())
        torch.testing.assert_close(score, torch.tensor([[expected]]))
    pooled = EMS(window=1, kernel=3).importance(View())
    torch.testing.assert_close(pooled, torch.tensor([[[0.32, 0.32, 0.6]]]))  # the window does not lend its score


def test_tiers_keep_the_order():
    score = torch.rand(2, 3, 50) * 1e4
    score[..., ::7] = 1e-8 * (1 + torch.rand(2, 3, 8))
    tier = torch.randint(0, 4, (2, 3, 50))
    ranked = tiered(score, tier).flatten(1).argsort(dim=1, descending=True, stable=True)
    for b in range(2):
        s, t = score[b].flatten().tolist(), tier[b].flatten().tolist()
        assert ranked[b].tolist() == sorted(range(150), key=lambda i: (-t[i], -s[i], i))


def test_leaving_and_pour():
    """What is neither kept nor forbidden leaves, and sums arrive at the targets."""
    kept = torch.tensor([[[0, 3], [1, 2]]])
    valid = torch.tensor([[[True, True, True, True, False]]])
    at, gone = leaving(kept, None, valid)
    assert [at[0, h][gone[0, h]].tolist() for h in range(2)] == [[1, 2], [0, 3]]
    real = torch.tensor([[[False, True], [True, True]]])
    at, gone = leaving(kept, real, valid)
    assert [at[0, h][gone[0, h]].tolist() for h in range(2)] == [[0, 1, 2], [0, 3]] and at.shape[-1] == 3
    x, weight = torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3)
    target = torch.tensor([[[1, 0, 1], [0, 0, 0]]])
    out = pour(x, target, weight, 2)
    for h, k in itertools.product(range(2), range(2)):
        expected = sum((weight[0, h, i] * x[0, h, i] for i in range(3) if target[0, h, i] == k), torch.zeros(4))
        torch.testing.assert_close(out[0, h, k], expected)


def test_two_negative_cosines_are_no_match(monkeypatch):
    """The product of cosines, -1 where either is negative; in blocks as in one piece."""
    x, y = torch.randn(2, 2, 3, 9, 4).unbind(0), torch.randn(2, 2, 3, 5, 4).unbind(0)
    cosines = [torch.cosine_similarity(a[:, :, :, None], b[:, :, None], dim=-1) for a, b in zip(x, y)]
    product = torch.where((cosines[0] < 0) | (cosines[1] < 0), -1.0, cosines[0] * cosines[1])
    allowed = torch.rand(2, 1, 9, 5) > 0.3
    allowed[:, :, :, 3:] = False
    product = product.masked_fill(~allowed, -torch.inf)
    for columns, block in ((5, 256), (3, 256), (5, 4), (3, 4)):
        monkeypatch.setattr("hf_compress.tensors.kvmerge.BLOCK", block)
        similarity, target = nearest(list(zip(x, y)), lambda part, k=columns: allowed[:, :, part, :k])
        torch.testing.assert_close(similarity, product.amax(-1))
        torch.testing.assert_close(product.gather(-1, target[..., None])[..., 0], similarity)


# -- slow formulas --------------------------------------------------------------------------------------------------
def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


def lookm_by_hand(prompt, b, h, budget, merging, text, rotated):
    rows, sums = prompt.rows(b), prompt.group_attention(b, h).sum(0).tolist()
    images = [r for r in rows if prompt.visual[b, r]]
    recent = rows[len(rows) - max(1, budget // 2) :]
    sure = set(recent) | ({r for r in rows if images and r not in images} if text == "hard" else set())
    rest = [r for r in rows if r not in sure]
    ranked = sorted(rest, key=lambda r: (r in images, -sums[r], r))
    kept = sorted(sure) + ranked[: max(0, budget - len(sure))]
    keys, values = prompt.keys[b, h], prompt.values[b, h]
    members = {c: [] for c in kept}
    for e in rows:
        if e not in members:
            nearest = max(sorted(kept), key=lambda c: cosine(keys[e], keys[c]))
            members[nearest].append(e)

    def mean(x, c):
        parts = [x(c)]
        for e in members[c]:
            share = {"averaged": x(e), "pivotal": (x(e) + x(c)) / 2, "weighted": cosine(keys[e], keys[c]) * x(e)}
            parts.append(share[merging])
        return torch.stack(parts).mean(0)

    out = {}
    for c in kept:
        if rotated:
            key = mean(lambda r: keys[r], c)
        else:
            key = prompt.turned(mean(lambda r: prompt.turned(keys[r], b, r, -1), c), b, c, 1)
        out[c] = key, mean(lambda r: values[r], c), 0.0
    return out


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("visual", [IMAGES, (IMAGES[0], range(0)), (range(0), range(0))], ids=["both", "one", "text"])
@pytest.mark.parametrize("merging", ["averaged", "pivotal", "weighted"])
def test_lookm_by_hand(groups, visual, merging):
    """Budgets that text fits into and one that it does not; ragged batch, left padded."""
    prompt = Random(groups, visual=visual)
    for ratio, text, rotated in (("1/2", "hard", True), ("3/4", "hard", False), ("3/4", "soft", True)):
        held = prompt.settle(LookM(merging=merging, text=text, rotated=rotated), ratio)
        for b, h in itertools.product(range(2), range(2)):
            budget = prompt.lengths[b] // {"1/2": 2, "3/4": 4}[ratio]
            expected = lookm_by_hand(prompt, b, h, budget, merging, text, rotated)
            if text == "hard" and ratio == "3/4" and visual[b]:
                assert len(expected) > budget  # all text stays
            assert_entries(prompt.held(held, b, h), expected)


def ems_ranking(prompt, b, h, window, kernel, combine):
    rows, attention = prompt.rows(b), prompt.group_attention(b, h)
    old, recent = rows[: len(rows) - window], rows[len(rows) - window :]
    local, whole = attention[recent].sum(0), attention[rows].sum(0)
    scaled = whole * local[old].mean() / whole[old].mean()
    score = torch.maximum(local, scaled) if combine == "max" else local + scaled
    out = {r: float(score[r]) for r in recent}
    for r in old:
        out[r] = max(float(score[i]) for i in old if abs(i - r) <= kernel // 2)
    return out, old, recent


def alike(prompt, b, h, e, c):
    k, v = (cosine(x[b, h, e], x[b, h, c]) for x in (prompt.keys, prompt.values))
    return -1.0 if k < 0 or v < 0 else k * v


def joined(prompt, b, h, centre, members, score, method):
    """Key and value of a centre with its members in it."""
    together = [centre, *members]
    total = sum(score[r] for r in together)
    value = sum(score[r] * prompt.values[b, h, r] for r in together) / total
    key = prompt.keys[b, h, centre]
    if members and method.merge_keys:
        flat = sum(score[r] * prompt.turned(prompt.keys[b, h, r], b, r, -1) for r in together) / total
        key = prompt.turned(flat, b, centre, 1)
    return key, value, 0.0


def ems_by_hand(prompt, b, budget, method):
    """{head: entries} of one sample."""
    window, heads = method.window if budget > method.window else max(1, budget // 2), range(prompt.kv_heads)
    P = budget - window
    ranked, tiers, scores, old, recent = {}, {}, {}, [], []
    for h in heads:
        scores[h], old, recent = ems_ranking(prompt, b, h, window, method.kernel, method.combine)
        ranked[h] = best(scores[h], old, int(method.gamma * P))
        redundant = [
            c
            for i, c in enumerate(ranked[h])
            if any(alike(prompt, b, h, c, t) >= method.tau for t in ranked[h][: min(i, P)])
        ]
        centres = ranked[h][: P - P * len(redundant) // len(ranked[h])]
        for r in old:
            tiers[h, r] = 3 if r in centres else 0 if r not in ranked[h] else 1 if r in redundant else 2
    kept = {h: list(recent) for h in heads}
    pool = [(h, r) for h in heads for r in old]
    order = sorted(pool, key=lambda at: (-tiers[at], -scores[at[0]][at[1]], at))
    if method.heads == "adaptive":
        sure = [(h, r) for h in heads for r in sorted(old, key=lambda r: order.index((h, r)))[: int(P * method.floor)]]
        for h, r in sure + [at for at in order if at not in sure][: P * len(heads) - len(sure)]:
            kept[h].append(r)
    else:
        for h in heads:
            kept[h] += [r for i, r in order if i == h][:P]
    out = {}
    for h in heads:
        groups = {c: [] for c in kept[h]}
        for e in ranked[h]:
            if e not in groups:
                c = max(sorted(groups), key=lambda c: alike(prompt, b, h, e, c))
                if alike(prompt, b, h, e, c) >= method.tau:
                    groups[c].append(e)
        out[h] = {c: joined(prompt, b, h, c, members, scores[h], method) for c, members in groups.items()}
        out[h]["members"] = sum(map(len, groups.values()))
    return out


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "knobs",
    [{}, {"heads": "uniform"}, {"combine": "sum", "merge_keys": False}, {"gamma": 1.5, "floor": 0.0, "tau": 0.1}],
    ids=["defaults", "uniform", "sum", "gamma"],
)
def test_ems_by_hand(groups, knobs):
    """Ragged batch, left padded; heads with different budgets and slack."""
    method = EMS(**({"window": 3, "kernel": 3, "tau": 0.05} | knobs))
    merged, uneven = 0, False
    for ratio, parts in (("1/2", 2), ("2/3", 3)):
        prompt = Random(groups, kv_heads=3)
        held = prompt.settle(method, ratio)
        for b in range(2):
            budget = prompt.lengths[b] // parts
            expected = ems_by_hand(prompt, b, budget, method)
            merged += sum(expected[h].pop("members") for h in range(3))
            uneven |= len({len(expected[h]) for h in range(3)}) > 1
            assert sum(map(len, expected.values())) == 3 * budget
            for h in range(3):
                assert_entries(prompt.held(held, b, h), expected[h])
    assert merged > 10
    assert uneven == (method.heads == "adaptive")


def test_ems_gives_the_slack_of_redundant_heads_to_others():
    """A head whose entries are all alike needs few centres; nothing of it is lost."""
    prompt = Random(1, kv_heads=2)
    prompt.keys[:, 0] = prompt.keys[:, 0, :1] + 0.01 * torch.randn(2, LONG, 8)
    prompt.values[:, 0] = prompt.values[:, 0, :1] + 0.01 * torch.randn(2, LONG, 8)
    held = prompt.settle(EMS(window=2, kernel=1, floor=0.0), "1/2")
    few, many = (len(prompt.held(held, 0, h)) for h in range(2))
    assert few + many == LONG and few < LONG // 2 - 4 < many


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("method", [LookM(), EMS(), EMS(heads="uniform")], ids=["lookm", "ems", "ems-uniform"])
def test_tiny_budgets(method, keep):
    """So few entries that the window takes half of them or all."""
    prompt = Random(2)
    held = prompt.settle(method, keep=keep)
    for b in range(2):
        kept = [prompt.held(held, b, h) for h in range(2)]
        assert sum(map(len, kept)) == 2 * keep and all(LONG - 1 in rows for rows in kept)
        assert all(torch.isfinite(x).all() for rows in kept for key, value, _ in rows.values() for x in (key, value))


# -- whole models ---------------------------------------------------------------------------------------------------
MODELS = pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl"])
METHODS = pytest.mark.parametrize("method", MERGERS)


@MODELS
@METHODS
def test_decoding_reads_what_was_merged(name, method):
    """Later steps are the bare model over the prompt's cache with the merged entries in it; sdpa and eager."""
    batch = batch_of(name)
    runs = {}
    for attn in ("sdpa", "eager"):
        model = shared(name, attn)
        plain = logits_of(model, batch)
        with model.compressed(method, ratio=0.5, **OPTIONS[method]):
            untouched(method, attn, logits_of(model, batch), plain)
            first, runs[attn] = greedy(model, batch, max_new_tokens=1).cache, greedy(model, batch)
        close(runs[attn].logits, edited_logits(name, batch, first, runs[attn]))
    close(runs["sdpa"].logits, runs["eager"].logits)
    assert any((layer.whole()[0] - full).abs().max() > 0.1 for layer, full in _gathered(name, batch, first))


def _gathered(name, batch, cache):
    """Layers and the keys of the bare model at their slots."""
    with torch.no_grad():
        whole = shared(name)(**batch).past_key_values
    for mine, theirs in zip(cache.layers, whole.layers):
        at = mine.layout.index[..., None].expand(-1, -1, -1, theirs.keys.shape[-1])
        yield mine, theirs.keys.gather(2, at)


@METHODS
def test_merged_entries_are_packed(method):
    """In 4 bits, and read from them by every later step."""
    model, batch = shared("llava"), batch_of("llava", "equal")
    with model.compressed(method, ratio=0.75, store="kivi4", **OPTIONS[method]):
        first, run = greedy(model, batch, max_new_tokens=1).cache, greedy(model, batch)
    assert all(layer.keys.shape[2] < 61 for layer in first.layers)  # .8 of 77 entries
    close(run.logits, edited_logits("llava", batch, first, run))


@MODELS
@METHODS
def test_rows_are_alone_what_they_are_together(name, method):
    model, batch = shared(name), batch_of(name)
    length = batch["input_ids"].shape[1]
    with model.compressed(method, ratio=0.5, **OPTIONS[method]):
        together = greedy(model, batch)
        for row in range(2):
            sample = alone(name, batch, row)
            single = greedy(model, sample)
            close(together.logits[row], single.logits[0])
            n = sample["input_ids"].shape[1]
            for i in range(4):
                mine = slots(together.cache, i, length + 5, 4)[row, :, length - n :]
                assert torch.equal(mine, slots(single.cache, i, n + 5, 4)[0])


@METHODS
def test_generation(method):
    """Ratio 0 is the bare model; beams, samples, candidates and a second turn run on merged entries."""
    model, batch = shared("llava"), batch_of("llava")
    bare = greedy(model, batch)
    with model.compressed(method, ratio=0, **OPTIONS[method]):
        same = greedy(model, batch)
        assert torch.equal(same.logits, bare.logits) and torch.equal(same.tokens, bare.tokens)
    with model.compressed(method, ratio=0.5, **OPTIONS[method]):
        plain = greedy(model, batch)
        assert not torch.equal(plain.logits[:, 1:], bare.logits[:, 1:])
        sample = alone("llava", batch, 0)
        single = greedy(model, sample)
        looked_up = model.generate(
            **sample, max_new_tokens=5, do_sample=False, suppress_tokens=[IMG], prompt_lookup_num_tokens=2
        )
        assert torch.equal(looked_up[:, -5:], single.tokens)
        beams = dict(max_new_tokens=5, do_sample=False, suppress_tokens=[IMG], num_beams=3)
        together = model.generate(**batch, **beams, num_return_sequences=2)
        for row in range(2):
            one = model.generate(**alone("llava", batch, row), **beams, num_return_sequences=2)
            assert torch.equal(together[2 * row : 2 * row + 2, -5:], one[:, -5:])
        more = torch.cat([single.out.sequences, torch.tensor([[7, 8, 9]])], 1)
        mask = torch.ones_like(more)
        turn = model.generate(
            input_ids=more, attention_mask=mask, past_key_values=single.cache, max_new_tokens=3, do_sample=False
        )
        assert turn.shape[1] == more.shape[1] + 3


@METHODS
def test_bytes(method):
    """Keys and values of exactly the budget, and the indices of who holds what."""
    model = shared("llama")
    batch = alone("llama", batch_of("llama"), 0)
    with model.compressed(method, ratio=0.5, **OPTIONS[method]), torch.no_grad():
        cache = model(**batch).past_key_values
        totals = model.compression.report().totals()
    entries = batch["input_ids"].shape[1] // 2
    stored = sum(t.numel() * 4 for layer in cache.layers for part in (layer.body or ()) for t in part.tensors())
    stored += sum(t.numel() * 4 for layer in cache.layers for t in (layer.keys, layer.values))
    assert stored == 4 * 2 * 2 * entries * 8 * 4  # layers, keys and values, heads, entries, head size, bytes
    indices = totals["kv_bytes"] - stored
    assert 0 < indices == sum(t.numel() * t.element_size() for layer in cache.layers for t in layer.layout.tensors())


@pytest.mark.parametrize(
    ("method", "knobs", "message"),
    [
        ("lookm", {"merging": "mean"}, "merging='mean' must be one of"),
        ("lookm", {"text": "yes"}, "text='yes' must be one of"),
        ("lookm", {"policy": "hold"}, "policy='hold' must be one of"),
        ("ems", {"kernel": 4}, "kernel=4 must be odd"),
        ("ems", {"gamma": 0.5}, "gamma=0.5 must be a number of at least 1"),
        ("ems", {"tau": 2}, "tau=2 must be a number of at least 0 and at most 1"),
        ("ems", {"combine": "mean"}, "combine='mean' must be one of"),
    ],
)
def test_refused(method, knobs, message):
    with pytest.raises(ValueError, match=message):
        shared("llava").compress(method, ratio=0.5, **knobs)
    assert shared("llava").compression is None


def test_text_stays_beyond_the_budget():
    """ "hard" keeps all text of samples that show images and says so in the report; "soft" does not."""
    model, batch = shared("llava"), batch_of("llava", "mixed")
    text = ((batch["input_ids"] != IMG) & batch["attention_mask"].bool()).sum(1).tolist()
    lengths = batch["attention_mask"].sum(1).tolist()
    assert text[0] < lengths[0] and text[1] == lengths[1]  # the second sample shows no image
    with torch.no_grad():
        with model.compressed("lookm", ratio=0.9):
            model(**batch)
            assert model.compression.last.cache_tokens == [[max(text[0], lengths[0] // 10), 1]] * 4
        with model.compressed("lookm", ratio=0.9, text="soft"):
            model(**batch)
            assert model.compression.last.cache_tokens == [[lengths[0] // 10, 1]] * 4
