"""Free slots behind what is stored, and entries that give their slot to the next token."""

import copy
import weakref

import pytest
import torch

from hf_compress.layout import Layout, NextRows
from hf_compress.stores import HeldLayer
from hf_compress.tensors.rows import compact
from hf_compress.tensors.select import best_slots, worst_slot
from tests import tiny
from tests.invariants.reference import close


def steps(model, cache, ids, start):
    """Logits of the tokens fed one by one."""
    out = []
    with torch.no_grad():
        for i in range(ids.shape[1]):
            at = torch.full_like(ids[:, :1], start + i)
            out.append(model(input_ids=ids[:, i : i + 1], position_ids=at, past_key_values=cache).logits[:, 0])
    return torch.stack(out, 1)


def prompt(length=300, more=12):
    torch.manual_seed(0)
    ids = torch.randint(3, 90, (2, length + more))
    return ids[:, :length], ids[:, length:]


@pytest.mark.parametrize("method", ["streaming", "h2o", "a2sf", "tova", "treekv", "lacache"])
def test_held_equals_eager(method):
    """What is overwritten in place is what a cache that is copied and sorted at every step would drop."""
    ids, more = prompt()
    logits = {}
    for kernel in ("sdpa", "eager"):
        model = tiny.build("llama", attn=kernel)
        with model.compressed(method, ratio=0.5), torch.no_grad():
            cache = model(input_ids=ids).past_key_values
            logits[kernel] = steps(model, cache, more, ids.shape[1])
            orders = [layer.quota.in_order for layer in cache.layers]
            assert not any(orders) if kernel == "sdpa" else all(orders)
    close(logits["sdpa"], logits["eager"])


@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        ("streaming", dict(keep=20)),
        ("streaming", dict(keep=3)),
        ("lacache", dict(keep=20)),
        ("lacache", dict(keep=21, span=2, overlap=1, pattern="ladder")),
        ("lacache", dict(keep=9, sinks=2)),
        ("lacache", dict(keep=1)),
        ("treekv", dict(keep=20)),
        ("treekv", dict(keep=3, block=3)),
        ("treekv", dict(keep=1)),
        ("h2o", dict(keep=20)),
        ("a2sf", dict(keep=20, window=7)),
        ("tova", dict(keep=20)),
        ("knorm", dict(keep=20, policy="hold")),
    ],
)
def test_replacing_is_evicting(method, knobs, monkeypatch):
    """Entry by entry, until ladders and rounds have started over, with a turn of several tokens in between."""
    model, (ids, more) = tiny.build("llama"), prompt(length=41, more=47)
    runs = []
    for _ in range(2):
        with model.compressed(method, **knobs), torch.no_grad():
            cache = model(input_ids=ids).past_key_values
            logits = [steps(model, cache, more[:, :30], 41)]
            assert cache.layers[0].quota.in_order == bool(runs)
            at = 71 + torch.arange(5).expand(2, -1)
            logits.append(model(input_ids=more[:, 30:35], position_ids=at, past_key_values=cache).logits)
            assert cache.layers[0].quota.in_order
            logits.append(steps(model, cache, more[:, 35:], 76))
        for layer in cache.layers:
            assert layer.quota.in_order == bool(runs) and layer.quota.cursor == cache.layers[0].quota.cursor
            layer.line_up()
        runs.append((logits, cache.layers))
        monkeypatch.setattr(HeldLayer, "replaceable", False)
    for one, other in zip(runs[0][0], runs[1][0]):
        close(one, other)
    for one, other in zip(runs[0][1], runs[1][1]):
        assert torch.equal(one.layout.position, other.layout.position)
        assert knobs["keep"] == 1 or one.quota.cursor == other.quota.cursor  # one entry is nothing to go round


@pytest.mark.parametrize("method", ["streaming", "lacache", "treekv", "h2o"])
def test_beams_take_their_order_along(method, monkeypatch):
    """Rows that change places between two steps, and copies of a cache that has been overwritten."""
    model, (ids, more) = tiny.build("llama"), prompt(length=41, more=8)
    beams = dict(max_new_tokens=24, num_beams=3, num_return_sequences=3, do_sample=False, pad_token_id=0)
    runs = []
    for _ in range(2):
        with model.compressed(method, keep=12), torch.no_grad():
            cache = model(input_ids=ids).past_key_values
            steps(model, cache, more[:, :4], 41)
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(torch.tensor([3, 0, 0, 2]))
            rows = more[:, 4:].repeat_interleave(2, 0)[[3, 0, 0, 2]]
            runs.append((steps(model, cache, rows, 45), model.generate(ids, **beams)))
        assert cache.layers[0].quota.in_order == (len(runs) == 2)
        monkeypatch.setattr(HeldLayer, "replaceable", False)
    close(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_nothing_moves_while_held():
    """Steps leave all storages where they are; a turn of several tokens brings the slots into order again."""
    model = tiny.build("llama")
    ids, more = prompt()
    with model.compressed("h2o", ratio=0.5), torch.no_grad():
        cache = model(input_ids=ids).past_key_values
        steps(model, cache, more[:, :2], ids.shape[1])
        held = cache.layers[0]
        before, size = held.keys.data_ptr(), held.nbytes()
        twin = copy.deepcopy(cache)
        one_by_one = steps(model, cache, more[:, 2:8], ids.shape[1] + 2)
        assert held.keys.data_ptr() == before and held.nbytes() == size and held.keys.shape[2] == 150
        rank = held.layout.position.argsort(-1).argsort(-1)  # the slots of each head by age
        ages = held.layout.numbers.argsort(-1)
        assert torch.equal(ages, rank.argsort(-1)) and not torch.equal(rank, rank.sort(-1).values)
        close(steps(model, twin, more[:, 2:8], ids.shape[1] + 2), one_by_one)
        keys = held.keys.gather(2, rank.argsort(-1)[..., None].expand_as(held.keys))
        held.line_up()
        assert torch.equal(held.keys, keys) and held.quota.in_order
        assert torch.equal(held.layout.position, held.layout.position.sort(-1).values)


def test_free_slots():
    """A growing cache is copied once in a while only, stays honest in bytes, and copies do not share it."""
    model = tiny.build("llama")
    ids, more = prompt(length=1200)
    with model.compressed("knorm", ratio=0.5), torch.no_grad():
        cache = model(input_ids=ids).past_key_values
        steps(model, cache, more[:, :1], ids.shape[1])
        held = cache.layers[0]
        n, where = held.keys.shape[2], held.keys.data_ptr()
        free = held.keys.untyped_storage().nbytes() // (held.keys[:, :, :1].numel() * 4) - n
        assert n == 601 and free == n // 128
        twin = copy.deepcopy(cache)
        steps(model, cache, more[:, 1 : 1 + free], ids.shape[1] + 1)
        assert held.keys.data_ptr() == where
        first = held.keys.clone()
        steps(model, twin, more[:, 1 : 1 + free].flip(1), ids.shape[1] + 1)
        assert torch.equal(held.keys, first) and not torch.equal(twin.layers[0].keys, first)
        held.crop(-2)
        steps(model, cache, more[:, -3:], ids.shape[1] + free - 1)
        assert held.keys.shape[2] == n + free + 1 and torch.equal(held.keys[:, :, : n + free - 2], first[:, :, :-2])
        stored = sum(t.untyped_storage().nbytes() for t in (held.keys, held.values))
        assert held.nbytes() == stored + sum(t.numel() * t.element_size() for t in held.layout.tensors())
        assert stored <= (1 + 1 / 128) * 2 * held.keys.numel() * 4


def test_rows_of_a_step_are_made_when_somebody_looks():
    """Behind a prompt, behind one another and copied they are the rows of a layout that was written out."""
    removed = torch.tensor([0, 2])
    rows = [NextRows(n, removed, seen) for n, seen in ((1, 1), (3, 4), (1, 5))]  # a prompt of a single token too
    index = torch.arange(5).expand(2, -1)
    text = torch.full_like(index, -1), torch.ones_like(index, dtype=torch.bool)
    whole = Layout(index, index - removed[:, None], *text, removed, 5)
    joined = rows[0].append(rows[1]).append(rows[2])
    assert joined.all_valid and len(joined) == 5 and joined.seen == 5 and not any(r._slots for r in rows)
    for one in (copy.deepcopy(joined), joined):
        assert all(torch.equal(a, b) for a, b in zip(one.slots, whole.slots))


@pytest.mark.parametrize("heads", ["uniform", "adaptive"])
def test_what_is_replaced_is_let_go(heads):
    """Rows chosen anew, another device, a packed body: nobody keeps the tensors before."""
    model = tiny.build("llama")
    ids, more = prompt()
    with model.compressed("knorm", ratio=0.5, heads=heads), torch.no_grad():
        cache = model(input_ids=ids).past_key_values
        held = cache.layers[0]
        assert not held._rooms  # of the prompt nothing is left but what is stored
        steps(model, cache, more[:, :1], ids.shape[1])
        assert bool(held._rooms) == (heads == "uniform")
        before = weakref.ref(held.keys)
        held.reorder_cache(torch.tensor([1, 0]))
        assert before() is None


def test_steps_with_gradients():
    """What a backward pass will read is not overwritten."""
    model = tiny.build("llama")
    ids, more = prompt()
    for method in ("h2o", "knorm"):
        with model.compressed(method, ratio=0.5):
            cache = model(input_ids=ids).past_key_values
            total = sum(
                model(
                    input_ids=more[:, i : i + 1],
                    position_ids=torch.full_like(more[:, :1], ids.shape[1] + i),
                    past_key_values=cache,
                ).logits.sum()
                for i in range(3)
            )
            total.backward()
            model.zero_grad()


def test_worst_slot_is_what_the_best_leave():
    """Ties included, and whatever the order of the slots."""
    score = torch.tensor([[[2.0, 0.0, 1.0, 0.0, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0]]])
    slots, _ = best_slots(score, torch.ones(1, 1, 5, dtype=torch.bool), torch.tensor([4]))
    every = torch.arange(5)
    assert worst_slot(score, every).flatten().tolist() == [3, 4]
    assert slots[0].tolist() == [[0, 1, 2, 4], [0, 1, 2, 3]]
    assert worst_slot(score, every.flip(0)).flatten().tolist() == [1, 0]


def random_layer(valid, window=None, heads=2, g=None):
    """A layer that holds a prompt of random keys and values; valid (B, S)."""
    held, (B, S) = HeldLayer(window), valid.shape
    at = torch.arange(S).expand(B, S)
    held.announce(Layout(at, at, at * 0 - 1, valid, torch.zeros(B, dtype=torch.int64), S))
    held.update(*torch.randn(2, B, heads, S, 4, generator=g))
    return held


def feed(held, rows, new):
    held.announce(NextRows(rows, held.layout.removed, held.layout.seen + rows))
    return held.update(new, -new)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("left", [True, False])
def test_rows_leave_all_heads(window, left):
    """Rows dropped from a cache, at its prompt and behind a step, then rows appended, beams and rows taken back."""
    g, B, S = torch.Generator().manual_seed(0), 2, 9
    for _ in range(20):
        pads = torch.randint(0, 4, (B, 1), generator=g)
        at = torch.arange(S).expand(B, S)
        held = random_layer(at >= pads if left else at < S - pads, window, g=g)
        fed = [held.keys.clone()]
        for turn in range(2):
            stay = (torch.rand(B, len(held.layout), generator=g) < 0.6) & held.layout.valid
            expected = [held.layout.index[b][stay[b]].tolist() for b in range(B)]
            rows, valid = compact(stay)
            if stay.any():
                held.select_rows(rows, valid)
            fed.append(torch.randn(B, 2, 2, 4, generator=g))
            feed(held, 2, fed[-1])
            every, seen = torch.cat(fed, 2), S + 2 * turn
            for b in range(B):
                real = held.layout.valid[b]
                index = held.layout.index[b][real].tolist()
                before = expected[b] if stay.any() else held.layout.index[b][real].tolist()[:-2]
                near = [j for j in before if window is None or j > seen - window]  # no query comes that sees others
                assert [j for j in index if j in near or j >= seen] == [*near, seen, seen + 1]
                assert set(index) <= {*before, seen, seen + 1}
                assert torch.equal(held.keys[b][:, real], every[b][:, index])
        if window is None:
            held.crop(-2)
        held.reorder_cache(torch.tensor([1, 0]))
        assert held.layout.seen == S + (2 if window is None else 4) and len(held.layout) == held.keys.shape[2]
        real = held.layout.valid[0]
        assert torch.equal(held.keys[0][:, real], every[1][:, held.layout.index[0][real]])


def test_layers_that_lose_the_same_rows_share_their_layout():
    layers = [random_layer(torch.ones(2, 5, dtype=torch.bool)) for _ in range(3)]
    for layer in layers[1:]:
        layer.layout = layers[0].layout
    rows, valid = compact(torch.tensor([[True, True, False, True, False], [False, True, False, False, True]]))
    for layer in layers:
        layer.select_rows(rows, valid)
    new = NextRows(1, layers[0].layout.removed, 6)
    for layer in layers:
        layer.announce(new)
        layer.update(*torch.randn(2, 2, 2, 1, 4))
    assert layers[0].layout is layers[1].layout is layers[2].layout
    layers[0].select(torch.zeros(2, 2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="heads hold different entries"):
        layers[0].select_rows(rows, valid)


@pytest.mark.parametrize("method", ["snapkv", "adakv", "kivi", "keydiff"])
def test_a_path_through_a_tree_of_drafts(method):
    """Kept rows are as if they alone had been fed: a sibling that stood between them leaves no trace."""
    model = tiny.build("llama")
    ids, more = prompt(length=80, more=4)
    first, sibling, second = more[:, :1], more[:, 3:], more[:, 1:2]
    with model.compressed(method, ratio=0.5), torch.no_grad():
        line, tree, none = (model(input_ids=ids).past_key_values for _ in range(3))
        expected = steps(model, line, torch.cat([first, second, more[:, 2:3]], 1), 80)
        steps(model, tree, torch.cat([first, sibling], 1), 80)
        for layer in tree.layers:
            layer.keep_path([0], 2)
        steps(model, tree, torch.cat([second, sibling, sibling], 1), 81)
        for layer in tree.layers:
            layer.keep_path([0], 3)
        last = steps(model, tree, more[:, 2:3], 82)
        steps(model, none, torch.cat([sibling, sibling], 1), 80)
        for layer in none.layers:
            layer.keep_path([], 2)
        assert none.get_seq_length() == 80 and tree.get_seq_length() == line.get_seq_length() == 83
        close(last[:, 0], expected[:, 2])
        close(steps(model, none, first, 80)[:, 0], expected[:, 0])


def test_a_path_between_siblings():
    """Every tensor of a slot follows, where the kept rows stand apart."""
    torch.manual_seed(0)
    held, tokens = HeldLayer(None, ""), torch.randn(2, 1, 2, 9, 4)
    held.announce(NextRows(5, torch.zeros(1, dtype=torch.int64), 5))
    held.update(tokens[0, :, :, :5], tokens[1, :, :, :5])
    feed(held, 4, tokens[0, :, :, 5:])
    held.keep_path([0, 2, 3], 4)
    assert torch.equal(held.keys, tokens[0][:, :, [0, 1, 2, 3, 4, 5, 7, 8]])
    assert held.layout.index.tolist() == [list(range(8))] and held.layout.seen == 8
    for rows, of in (([1, 0], 4), ([4], 4), ([0, 0], 4), ([0], 8), ([], 0), ([-1], 2)):
        with pytest.raises(ValueError, match=r"rows=.*of="):
            held.keep_path(rows, of)
    assert held.layout.seen == 8
