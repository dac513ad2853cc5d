"""Streaming, LaCache, TreeKV and positions by place in the cache: cards, slow references, and decoding by hand."""

import random
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_compress.engine.rotary import Rotary
from hf_compress.methods.cache.lacache import LaCache
from hf_compress.methods.cache.treekv import TreeKV, weaker
from tests import tiny
from tests.invariants.reference import (
    FullLength,
    alone,
    bare,
    batch_of,
    close,
    fresh,
    greedy,
    shared,
    slots,
    storages,
)
from tests.tiny import GREEDY, PAD

RATIO, NEW = 0.5, 8
METHODS = ["streaming", "lacache", "treekv"]
WIDE = dict(span=1, sinks=2)  # on four layers: groups of four, of which a layer keeps one


# -- cards and slow references ----------------------------------------------------------------------------------------
def number(*values):
    """(B, 1, 1)."""
    return torch.tensor(values)[:, None, None]


def entries(lengths, budget, *, incoming=0, cursor=None, depth=0, depths=4, **more):
    """Left padded rows of so many entries each, as `CacheView` shows them."""
    width = max(lengths)
    valid = torch.tensor([[[False] * (width - n) + [True] * n] for n in lengths])
    return SimpleNamespace(
        depth=depth,
        depths=depths,
        valid=valid,
        order=valid.long().cumsum(-1) - 1,
        lengths=number(*lengths),
        budget=number(*budget),
        incoming=incoming,
        cursor=cursor,
        **more,
    )


def chosen(mask, row, head=0):
    """Ranks of what stays; padding is on the left, and the mask as wide as the longest row."""
    return mask[row, head].nonzero()[:, 0]


def test_rotation_card():
    """1 rad per position: a key at position 8 moved to slot 4."""
    at = torch.arange(10.0)[None, :, None].expand(-1, -1, 2)
    tables = at.cos(), at.sin()
    key = torch.tensor([8.0]).cos().item(), torch.tensor([8.0]).sin().item()
    key = torch.tensor(key).expand(1, 1, 1, 2)
    there, here = (Rotary(tuple(t[:, p : p + 1] for t in tables), apply_rotary_pos_emb) for p in (8, 4))
    torch.testing.assert_close(key[0, 0, 0], torch.tensor([-0.1455, 0.9894]), atol=1e-4, rtol=0)
    torch.testing.assert_close(there.back(key)[0, 0, 0], torch.tensor([1.0, 0.0]))
    moved = here.apply(there.back(key))[0, 0, 0]
    torch.testing.assert_close(moved, torch.tensor([-0.6536, -0.7568]), atol=1e-4, rtol=0)


def test_lacache_card():
    """Four layers, span 2, two sinks, C=16, 19 entries; even and odd layers keep one of each pair, cursor 5."""
    for depth in range(4):
        view = entries([19], [16], depth=depth)
        method = LaCache(span=2, sinks=2)
        ladder = [2, 4, 6] if depth % 2 == 0 else [3, 5, 7]
        assert chosen(method.keeps(view), 0).tolist() == [0, 1, *ladder, *range(8, 19)]
        assert method.cursor(view).tolist() == [[[5]]] and method.fit(view, None, torch.tensor([19])).tolist() == [16]
        drawn = LaCache(span=2, sinks=2, pattern="ladder").keeps(view)
        assert chosen(drawn, 0).tolist() == [0, 1, *([2, 4, 6] if depth < 2 else [3, 5, 7]), *range(8, 19)]


def ladder(n, budget, layers, i, cursor, incoming, span, overlap, sinks, pattern="interleaved"):
    """Which of n entries layer i keeps, group after group, and the cursor then."""
    before = 1 + -((span - layers) // (span - overlap))
    after = min(-(-span // (span - overlap)), before)
    cut, budget = before - after, budget + (before - after) // 2
    newest = min(layers, max(1, budget // 2))
    sinks = max(0, min(sinks, budget - newest - after))
    size, over = (budget - newest - sinks) // after, max(0, n + incoming - budget)
    gone = -(-over // cut) * cut if budget > 2 * cut else over
    cursor = sinks if cursor is None else cursor
    if not gone or size < 1:
        return list(range(gone, n)), cursor

    def group(rest, lost, apart):
        choices = lost + after - apart * (after - 1)
        first = i % choices if pattern == "interleaved" else i * choices // layers
        return [rest[first + apart * j] for j in range(after)]

    out, rest = list(range(cursor)), list(range(cursor, n))
    while gone and len(out) + after <= budget - newest:
        lost = min(cut, gone)
        out, rest, gone = out + group(rest, lost, 1), rest[after + lost :], gone - lost
    if gone:
        times = -(-gone // (size * cut))
        wide = times * (before - 1) + 1
        every = out + rest
        out, rest = every[:sinks], every[sinks:]
        while gone:
            lost = min(wide - after, gone)
            apart = times if lost == wide - after else 1
            out, rest, gone = out + group(rest, lost, apart), rest[after + lost :], gone - lost
    return out + rest, len(out)


@pytest.mark.parametrize("pattern", ["interleaved", "ladder"])
def test_lacache_is_the_ladder(pattern):
    """Over several compactions of two rows of different lengths, and as many entries in every layer."""
    draw = random.Random(0)
    for _ in range(60):
        layers = draw.choice([2, 3, 4, 5, 8, 24, 32])
        span = draw.randint(1, layers - 1)
        knobs = dict(span=span, overlap=draw.randint(0, span - 1), sinks=draw.choice([0, 2, 4]), pattern=pattern)
        method = LaCache(**knobs)
        try:
            method.check(layers, None)
        except ValueError:
            continue
        lengths = [draw.randint(1, 120), draw.randint(1, 120)]
        budget, cursor = [draw.randint(1, n) for n in lengths], None
        for step in range(3):
            sizes = set()
            view = entries(lengths, budget, incoming=int(step > 0), cursor=cursor, depths=layers)
            for i in {0, 1, layers // 2, layers - 1}:
                view.depth = i
                stays = method.keeps(view) & view.valid
                at = [None if cursor is None else int(c) for c in ([0, 0] if cursor is None else cursor)]
                both = [ladder(n, c, layers, i, cur, int(step > 0), **knobs) for n, c, cur in zip(lengths, budget, at)]
                for row, (expected, _) in enumerate(both):
                    assert view.order[row, 0][stays[row, 0]].tolist() == expected
                sizes.add(tuple(stays.sum(-1)[:, 0].tolist()))
            (left,) = sizes
            assert method.fit(view, None, torch.tensor(lengths)).tolist() == list(left)
            cursor = method.cursor(view)
            if all(int(s) for s in method._plan(view).fits):
                assert cursor[:, 0, 0].tolist() == [c for _, c in both]
            lengths = [n + draw.choice([1, 1, 7]) for n in left]


@pytest.mark.parametrize(
    ("slots_", "tokens", "expected"),
    [
        (6, 12, [1, 3, 5, 7, 9, 11]),
        (6, 18, [3, 7, 11, 13, 15, 17]),
        (8, 40, [15, 23, 27, 31, 33, 35, 37, 39]),
    ],
)
def test_treekv_card(slots_, tokens, expected):
    """Equal scores, all at once and one after the other."""
    region = torch.ones(1, 1, tokens, dtype=torch.bool)
    gone = weaker(torch.zeros(1, 1, tokens), region, number(0), number(tokens - slots_), number(slots_))
    assert chosen(~gone, 0).tolist() == expected
    stay, cursor = list(range(slots_)), 0
    for token in range(slots_, tokens):
        stay, cursor = compare([0.0] * tokens, [*stay, token], cursor, 1, slots_)
    assert stay == expected


def compare(score, region, cursor, gone, size):
    """What is left of a region, one comparison after the other, and the cursor then."""
    held, waiting = list(region[:size]), list(region[size:])
    for _ in range(gone):
        held.append(waiting.pop(0))
        a, b = held[cursor], held[cursor + 1]
        held.remove(a if score[a] <= score[b] else b)
        cursor = (cursor + 1) % size
    return held + waiting, cursor


def tree(mean, n, budget, cursor, incoming, sinks, block):
    """Which of n entries stay, and the cursor then."""
    sinks = max(0, min(sinks, budget // 2 - 1))
    newest = max(1, budget // 2 - sinks)
    size, gone = budget - sinks - newest, n + incoming - budget
    stop = n + incoming - newest
    region, cursor = list(range(sinks, stop)), cursor or 0
    if gone <= 0:
        return list(range(n)), cursor
    if not size:
        return [*range(sinks), *range(stop, n)], 0
    if not incoming:
        block = min(block, size)
        blocks = [region[i : i + block] for i in range(0, len(region) - block + 1, block)]
        rest, lost = region[len(blocks) * block :], gone // block
        sums = [sum(mean[j] for j in b) for b in blocks]
        stay, cursor = compare(sums, range(len(blocks)), 0, lost, len(blocks) - lost)
        region, cursor, gone = [j for i in stay for j in blocks[i]] + rest, cursor * block, gone - lost * block
    region, cursor = compare(mean, region, cursor, gone, size)
    return [*range(sinks), *region, *range(stop, n)], cursor


def test_treekv_is_one_comparison_after_the_other():
    """Two rows and two heads of random scores: prompts in blocks, then arrivals of one or several."""
    draw, g = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(80):
        lengths = [draw.randint(1, 70), draw.randint(1, 70)]
        budget, cursor = [draw.randint(1, n) for n in lengths], None
        knobs = dict(sinks=draw.choice([0, 2, 4]), block=draw.choice([1, 3, 16]))
        method = TreeKV(**knobs)
        for incoming in (0, 1, 1):
            sums = torch.randint(0, 30, (2, 2, max(lengths)), generator=g).float()
            votes = 2 ** torch.randint(0, 3, sums.shape, generator=g)  # exact means, so that ties are ties
            view = entries(lengths, budget, incoming=incoming, cursor=cursor, scores=sums, votes=votes)
            stays, after = (method.score(view) > 0) & view.valid, method.cursor(view)
            left = []
            for row, n in enumerate(lengths):
                at = None if cursor is None else int(cursor[row])
                for head in range(2):
                    mean = (sums / votes)[row, head, max(lengths) - n :].tolist()
                    expected, then = tree(mean, n, budget[row], at, incoming, **knobs)
                    assert view.order[row, 0][stays[row, head]].tolist() == expected
                    assert int(after[row]) == then
                left.append(len(expected))
            cursor, lengths = after, [n + draw.choice([1, 6]) for n in left]


# -- whole models -----------------------------------------------------------------------------------------------------
def turned(x, positions):
    """(H, n, d) rotated: channel i with channel i + d/2, by position * 10000 ** (-2i / d)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * 10000.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


@torch.no_grad()
def by_hand(model, feeds, stay):
    """(T, V) last logits of each feed on a Llama whose keys are stored before rotation and rotated by their place.

    `stay(layer, n, incoming)` says which of n entries stay: after the first feed, and before each row of later ones.
    The rows of one feed take places one after the other; each sees what `stay` leaves of what came before it.
    """
    held, logits = {}, []
    for ids in feeds:
        x = model.model.embed_tokens(ids)
        for i, layer in enumerate(model.model.layers):
            attention, new = layer.self_attn, len(ids)
            h = layer.input_layernorm(x)
            q, k, v = (
                getattr(attention, f"{part}_proj")(h).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
                for part in "qkv"
            )
            past = 0
            if i in held:
                kept = stay(i, held[i][0].shape[1], 1)
                past = len(kept)
                k, v = (torch.cat([old[:, kept], t], 1) for old, t in zip(held[i], (k, v)))
            see = torch.zeros(new, past + new, dtype=torch.bool)
            for row in range(new):
                n = past + row
                see[row, [*(range(n) if i not in held else stay(i, n, 1)), n]] = True
            at, group = torch.arange(past + new), q.shape[0] // k.shape[0]
            weights = turned(q, at[past:]) @ turned(k, at).repeat_interleave(group, 0).mT * attention.head_dim**-0.5
            y = weights.masked_fill(~see, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 0)
            x = x + attention.o_proj(y.transpose(0, 1).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if i not in held:
                kept = stay(i, new, 0)
                k, v = k[:, kept], v[:, kept]
            held[i] = k, v
        logits.append(model.lm_head(model.model.norm(x))[-1])
    return torch.stack(logits)


def window(budget, sinks=4):
    """`stay` of StreamingLLM."""
    first = min(sinks, budget - 1)
    return lambda layer, n, incoming: [j for j in range(n) if j < first or j >= n + incoming - (budget - first)]


def rungs(budget, **knobs):
    """`stay` of LaCache for single tokens."""
    cursors = {}

    def stay(layer, n, incoming):
        kept, cursors[layer] = ladder(n, budget, 4, layer, cursors.get(layer), incoming, **knobs)
        return kept

    return stay


@pytest.mark.parametrize("keep", [3, 9, 20])
def test_streaming_by_hand(keep):
    """Equal logits at every step, in a padded batch, before and after the cache is full."""
    model, batch = shared("llama"), batch_of("llama")
    with model.compressed("streaming", keep=keep, rotation="cache"):
        run = greedy(model, batch, max_new_tokens=NEW)
    with model.compressed("streaming", keep=keep):
        original = greedy(model, batch, max_new_tokens=NEW)
    for row in range(2):
        feeds = [alone("llama", batch, row)["input_ids"][0], *run.tokens[row, :-1, None]]
        close(run.logits[row], by_hand(bare("llama"), feeds, window(keep)))
    assert (run.logits - original.logits)[0].abs().max() > 0.1  # distances do matter


@pytest.mark.parametrize("knobs", [{}, WIDE | dict(pattern="ladder")])
def test_lacache_by_hand(knobs):
    """Long enough for the ladder to start over; groups of one and of three entries too many."""
    model, batch = shared("llama"), batch_of("llama")
    with model.compressed("lacache", keep=9, rotation="cache", **knobs):
        run = greedy(model, batch, max_new_tokens=12)
    for row in range(2):
        feeds = [alone("llama", batch, row)["input_ids"][0], *run.tokens[row, :-1, None]]
        expected = by_hand_of_steps(feeds, rungs(9, **dict(span=2, overlap=0, sinks=4) | knobs))
        close(run.logits[row], expected)


def by_hand_of_steps(feeds, stay):
    """`by_hand` where asking moves a cursor: it is asked once per layer and token."""
    answers = {}

    def once(layer, n, incoming):
        if (layer, n) == answers.get("asked"):
            return list(range(n))  # what a row sees of what was left for it
        kept = stay(layer, n, incoming)
        answers["asked"] = layer, len(kept)
        return kept

    return by_hand(bare("llama"), feeds, once)


def test_a_turn_by_hand():
    """Rows fed together take places one after the other and see the sinks and the newest, as one by one."""
    model, batch = shared("llama"), batch_of("llama", "equal")
    with model.compressed("streaming", keep=9, rotation="cache"):
        first = greedy(model, batch)
        ids = torch.cat([first.out.sequences, torch.tensor([[20, 21, 22, 23, 24, 25, 26]])], 1)
        more = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        second = greedy(model, more, past_key_values=first.cache)
    n = batch["input_ids"].shape[1]
    feeds = [batch["input_ids"][0], *first.tokens[0, :-1, None], ids[0, n + 4 :], *second.tokens[0, :-1, None]]
    expected = by_hand(bare("llama"), feeds, window(9))
    close(torch.cat([first.logits, second.logits], 1)[0], expected)


@pytest.mark.parametrize("name", ["llava", "qwen3", "phi", "cohere"])
def test_moved_keys_are_moved_keys(name):
    """The bare model on its own cache, cut and rotated by its own function; also half heads, neighbouring channels."""
    model = tiny.build(name)
    sample = tiny.single(tiny.inputs(name, model), 0, name)
    with model.compressed("streaming", ratio=RATIO, rotation="cache", policy="grow"):
        run = greedy(model, sample)
    n, decoder = sample["input_ids"].shape[1], model.get_decoder()
    kept = torch.tensor([*range(4), *range(n - n // 2 + 4, n)])
    with torch.no_grad():
        cache = model(**sample).past_key_values
        for layer, held in zip(decoder.layers, cache.layers):
            rotate = sys.modules[type(layer.self_attn).__module__].apply_rotary_pos_emb
            held.keys, held.values = held.keys[:, :, kept], held.values[:, :, kept]
            for at, sign in ((kept, -1), (torch.arange(n // 2), 1)):
                cos, sin = decoder.rotary_emb(torch.zeros(1), at[None])
                d = cos.shape[-1]
                part = rotate(held.keys[..., :d], held.keys[..., :d], cos, sign * sin)[0]
                held.keys = torch.cat([part, held.keys[..., d:]], -1)
        for step in range(4):
            at = torch.tensor([[n // 2 + step]])
            mask = torch.ones(1, n // 2 + step + 1, dtype=torch.long)
            out = model(run.tokens[:, step, None], past_key_values=cache, position_ids=at, attention_mask=mask)
            close(out.logits[:, -1], run.logits[:, step + 1])


@pytest.mark.parametrize("name", ["llava", "gemma3_text", "cohere2", "smollm3"])
def test_nothing_evicted_nothing_moved(name):
    """Sliding layers beside, and layers that rotate nothing; ratio 0 is the bare model bit for bit."""
    model = tiny.build(name)
    batch = tiny.inputs(name, model)
    expected = greedy(model, batch)
    with model.compressed("streaming", keep=1000, rotation="cache"):
        close(greedy(model, batch).logits, expected.logits)
    for method in METHODS:
        with model.compressed(method, ratio=0, rotation="cache"):
            assert torch.equal(greedy(model, batch).logits, expected.logits)


@pytest.mark.parametrize(("method", "name"), [*((m, "llama") for m in METHODS), ("streaming", "llava")])
def test_places_in_a_batch(method, name):
    """Padded and alone, with positions given and not, sdpa and eager, beams: the same tokens."""
    model, batch = shared(name), batch_of(name)
    beams = GREEDY | dict(num_beams=3, num_return_sequences=2)
    with model.compressed(method, ratio=RATIO, rotation="cache"):
        run = greedy(model, batch, max_new_tokens=NEW)
        together = model.generate(**batch, **beams)
        with torch.no_grad():
            out = model(**batch)  # padding counts as positions here
            shifted = [out.logits[:, -1]]
            mask = batch["attention_mask"]
            for step in range(3):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                ids = run.tokens[:, step, None]
                out = model(input_ids=ids, past_key_values=out.past_key_values, attention_mask=mask)
                shifted.append(out.logits[:, -1])
        close(torch.stack(shifted, 1), run.logits[:, :4])
        for row in range(2):
            sample = alone(name, batch, row)
            single = greedy(model, sample, max_new_tokens=NEW)
            close(single.logits[0], run.logits[row])
            n = sample["input_ids"].shape[1]
            assert torch.equal(model.generate(**sample, **beams)[:, n:], together[2 * row : 2 * row + 2, -5:])
        held = run.cache
    with shared(name, "eager").compressed(method, ratio=RATIO, rotation="cache"):
        close(greedy(shared(name, "eager"), batch, max_new_tokens=NEW).logits, run.logits)
    with model.compressed(method, ratio=RATIO):
        assert storages(greedy(model, batch, max_new_tokens=NEW).cache) == storages(held)


def test_places_of_layers_with_fewer_rows():
    """FastV drops visual rows from its layer on: every layer counts its own places."""
    model, batch = shared("llava"), batch_of("llava")
    knobs = dict(ratio=[0.4, 0.5], layer=1)
    with model.compressed(["fastv", "streaming"], **knobs, rotation="cache"):
        run = greedy(model, batch, max_new_tokens=NEW)
        assert len({layer.keys.shape[2] for layer in run.cache.layers}) == 2
        for row in range(2):
            close(greedy(model, alone("llava", batch, row), max_new_tokens=NEW).logits[0], run.logits[row])
    with model.compressed(["fastv", "streaming"], **knobs):
        assert (greedy(model, batch, max_new_tokens=NEW).logits - run.logits).abs().max() > 0.1


def test_bf16_places():
    """Keys are rotated afresh at every step: the rounding does not add up with them."""
    model, batch = fresh("llama").to(torch.bfloat16), batch_of("llama")
    short, long = 4, 40
    errors = []
    with model.compressed("streaming", keep=9, rotation="cache"), torch.no_grad():
        for steps in (short, long):
            out = model.generate(**batch, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True)
            layer = out.past_key_values.layers[0]
            tokens = out.sequences.gather(1, layer.layout.index[:, 0]).masked_fill(~layer.layout.valid[:, 0], PAD)
            first = model.model.layers[0]
            k = first.self_attn.k_proj(first.input_layernorm(model.model.embed_tokens(tokens)))
            k = k.unflatten(-1, (2, -1)).transpose(1, 2)
            errors.append((layer.keys - k)[layer.layout.valid].abs().max() / k.abs().max())
    assert errors[1] <= 2 * errors[0] < 0.02


# -- what is held ---------------------------------------------------------------------------------------------------
def held_rows(run, batch, layer, row, head=0):
    """Rows of the caller that a layer holds, as ranks among the valid ones of its sample."""
    length = run.out.sequences.shape[1] - 1
    pads = int((1 - batch["attention_mask"][row]).sum())
    kept = slots(run.cache, layer, length, 2)[row, head].nonzero()[:, 0]
    return (kept - pads).tolist()


@pytest.mark.parametrize("knobs", [{}, dict(span=2, overlap=1), WIDE])
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_lacache_on_models(name, knobs):
    """Every layer its own entries, as many in each, at the end of the prompt and at every step."""
    model, batch = shared(name), batch_of(name)
    lengths = batch["attention_mask"].sum(1).tolist()
    expected = {}
    for row, n in enumerate(lengths):
        for layer in range(4):
            ask = dict(span=2, overlap=0, sinks=4) | knobs
            kept, cursor = ladder(n, n // 2, 4, layer, None, 0, **ask)
            expected[1, row, layer] = kept
            for step in range(2, 12):
                at, cursor = ladder(len(kept), n // 2, 4, layer, cursor, 1, **ask)
                kept = [*(kept[j] for j in at), n + step - 2]
                expected[step, row, layer] = kept
    for steps in (1, 2, 4, 11):
        with model.compressed("lacache", ratio=RATIO, **knobs):
            run = greedy(model, batch, max_new_tokens=steps)
        for row in range(2):
            for layer in range(4):
                for head in range(2):
                    assert held_rows(run, batch, layer, row, head) == expected[steps, row, layer]
    assert expected[11, 0, 0] != expected[11, 0, 1]
    cut = 3 if knobs == WIDE else 1
    for row, n in enumerate(lengths):
        sizes = [len(expected[step, row, 0]) for step in range(2, 12)]
        assert max(sizes) == n // 2 + cut // 2 and min(sizes) == max(sizes) - cut + 1


@pytest.mark.parametrize(
    "knobs",
    [
        dict(keep=16),
        dict(keep=20, span=2, overlap=1, sinks=1),
        dict(keep=16) | WIDE,
        dict(keep=30),  # nothing is evicted before the turn
    ],
)
def test_lacache_several_tokens_at_once(knobs):
    """A later turn equals its tokens one by one; the ladder starts over meanwhile."""
    model, batch = shared("llama"), batch_of("llama")
    length = batch["input_ids"].shape[1]
    with model.compressed("lacache", **knobs):
        first = greedy(model, batch)
        new = torch.randint(3, 80, (2, 6), generator=torch.Generator().manual_seed(0))
        ids = torch.cat([first.out.sequences, new], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 11, dtype=torch.long)], 1)
        second = greedy(model, dict(input_ids=ids, attention_mask=mask), past_key_values=first.cache)
        tokens = second.out.sequences[:, length:]
        force = lambda b, ids: [int(tokens[b, len(ids) - length])]
        single = greedy(model, batch, max_new_tokens=tokens.shape[1], prefix_allowed_tokens_fn=force)
        close(second.logits, single.logits[:, -5:])
        for one, other in zip(single.cache.layers, second.cache.layers):
            assert torch.equal(one.layout.index, other.layout.index)
            assert torch.equal(*map(torch.as_tensor, (one.quota.cursor, other.quota.cursor)))


@pytest.mark.parametrize("name", ["llama", "qwen3", "llava", "qwen2_5_vl"])
def test_treekv_on_models(name):
    """Means go on from the newest rows of the prompt, over what each step really saw; heads choose for themselves."""
    model, batch, block = shared(name), batch_of(name), 3
    lengths = batch["attention_mask"].sum(1).tolist()
    with model.compressed("treekv", ratio=RATIO, block=block):
        run = greedy(model, batch, max_new_tokens=NEW)
    full = FullLength(name, batch, run.tokens)
    heads = [(i, b, h) for i in range(4) for b in range(2) for h in range(full.kv_heads)]
    see = [full.causal().expand(-1, full.kv_heads, -1, -1).clone() for _ in range(4)]
    kept = {(i, b, h): list(range(full.prompt - lengths[b], full.prompt)) for i, b, h in heads}
    cursors = dict.fromkeys(heads)
    for step in range(NEW - 1):
        wide = [s.repeat_interleave(full.heads // full.kv_heads, 1) for s in see]
        attention = [a.unflatten(1, (full.kv_heads, -1)).mean(2) for a in full.run(wide)[1]]
        new = full.prompt + step
        for i, b, h in heads:
            rows, mine = range(full.prompt - min(block, lengths[b]), new), kept[i, b, h]
            got = {j: [float(attention[i][b, h, r, j]) for r in rows if r >= j] for j in mine}
            for incoming in (0, 1) if not step else (1,):
                means = [sum(got[j]) / len(got[j]) for j in mine]
                budget = lengths[b] // 2
                at, cursors[i, b, h] = tree(means, len(mine), budget, cursors[i, b, h], incoming, 4, block)
                mine = [mine[j] for j in at]
            kept[i, b, h] = [*mine, new]
            see[i][b, h, new] = False
            see[i][b, h, new, kept[i, b, h]] = True
    for i in range(4):
        held = slots(run.cache, i, full.rows, full.kv_heads)
        for b, h in ((b, h) for b in range(2) for h in range(full.kv_heads)):
            assert held[b, h].nonzero()[:, 0].tolist() == kept[i, b, h]


def test_treekv_counts_rows():
    """Every entry knows how many rows its sum is of, over a turn of several rows, in copies too."""
    model, batch, block = shared("llama"), batch_of("llama"), 3
    with model.compressed("treekv", ratio=RATIO, block=block):
        first = greedy(model, batch)
        ids = torch.cat([first.out.sequences, torch.randint(3, 80, (2, 6))], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 11, dtype=torch.long)], 1)
        first.cache.batch_repeat_interleave(2)
        more = dict(input_ids=ids.repeat_interleave(2, 0), attention_mask=mask.repeat_interleave(2, 0))
        second = greedy(model, more, past_key_values=first.cache)
    length = batch["input_ids"].shape[1]
    for layer in second.cache.layers:
        assert layer.side["votes"].shape[0] == 4
        since = layer.layout.index.clamp(min=length - block)  # the rows of the prompt that count
        expected = layer.layout.seen - since
        assert torch.equal(layer.side["votes"][layer.layout.valid], expected[layer.layout.valid])


# -- refusals -------------------------------------------------------------------------------------------------------
def test_refusals():
    """Named knobs, and what would work."""
    llama, qwen = shared("llama"), shared("qwen2_5_vl")
    for method in METHODS:
        with pytest.raises(ValueError, match=r"rotation='cache'.*rotation='original'"):
            qwen.compress(method, ratio=RATIO, rotation="cache")
        with pytest.raises(ValueError, match="rotation='paper'"):
            llama.compress(method, ratio=RATIO, rotation="paper")
        with pytest.raises(ValueError, match="sinks=-1"):
            llama.compress(method, ratio=RATIO, sinks=-1)
    for knobs, message in (
        (dict(span=4), "span=4.*4 layers"),
        (dict(span=2, overlap=2), "span=2"),
        (dict(overlap=2), "overlap < span"),
        (dict(pattern="zigzag"), "pattern='zigzag'"),
    ):
        with pytest.raises(ValueError, match=message):
            llama.compress("lacache", ratio=RATIO, **knobs)
    with pytest.raises(ValueError, match="block=0"):
        llama.compress("treekv", ratio=RATIO, block=0)
    assert getattr(llama, "compression", None) is None


@pytest.mark.parametrize("method", METHODS)
def test_candidates_and_places(method):
    """Under hold they would stand elsewhere than one by one; under grow they do not."""
    model = shared("llama")
    repeated = tiny.batch("llama", model, [[1, *[5, 6, 7] * 7]])
    longer = GREEDY | dict(max_new_tokens=12)
    with model.compressed(method, ratio=RATIO, rotation="cache"), pytest.raises(ValueError, match="policy='grow'"):
        model.generate(**repeated, **longer, prompt_lookup_num_tokens=3)
    with model.compressed(method, ratio=RATIO, rotation="cache", policy="grow"):
        expected = model.generate(**repeated, **longer)
        assert torch.equal(model.generate(**repeated, **longer, prompt_lookup_num_tokens=3), expected)
