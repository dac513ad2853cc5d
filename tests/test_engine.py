"""Units of the engine: the layout, masks, the cache layer's contract, and how rows are chosen."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from hf_compress.engine.masks import layer_mask, visible
from hf_compress.engine.vision import mix
from hf_compress.layout import Layout
from hf_compress.signals import Assignment
from hf_compress.stores import HeldLayer, adopt
from hf_compress.stores.quota import Quota
from hf_compress.tensors.rows import compact, take
from hf_compress.tensors.select import best_slots
from tests.invariants.reference import bare, batch_of, compressed, shared


def layout(index, valid=None, seen=None):
    """A layout of these rows; `index` (B, S) or (B, H, S) nested lists."""
    index = torch.tensor(index)
    valid = torch.ones_like(index, dtype=torch.bool) if valid is None else torch.tensor(valid).bool()
    seen = int(index.max()) + 1 if seen is None else seen
    return Layout(index, index, torch.full_like(index, -1), valid, torch.zeros(len(index), dtype=torch.long), seen)


def filled(rows=4, window=None, batch=2, heads=2, scores=True):
    """A layer that holds `rows` slots: key value of slot s of row b is 10 b + s in every channel."""
    layer = HeldLayer(window, "test")
    index = torch.arange(rows).expand(batch, -1)
    layer.announce(layout(index.tolist()))
    x = (torch.arange(batch)[:, None] * 10.0 + index)[:, None, :, None].expand(-1, heads, -1, 3).contiguous()
    layer.update(x, -x)
    if scores:
        layer.side["scores"] = x[..., 0].clone()
    layer.quota = Quota.of(torch.arange(batch), x.device)
    return layer


def step(layer, value):
    """Feed one more row to a filled layer."""
    seen, batch = layer.get_seq_length(), len(layer.keys)
    layer.announce(layout([[seen]] * batch, seen=seen + 1))
    x = torch.full((batch, layer.keys.shape[1], 1, 3), float(value))
    return layer.update(x, -x)


def assert_consistent(layer):
    """Every per-slot and per-row tensor has the shape of the keys, and values are still minus the keys."""
    batch, heads, slots, _ = layer.keys.shape
    assert torch.equal(layer.values, -layer.keys)
    assert len(layer.layout) == slots and len(layer.layout.removed) == batch == len(layer.quota.budget)
    for t in layer.layout.slots:
        assert t.shape in ((batch, slots), (batch, heads, slots))
    for t in layer.side.values():
        assert t.shape == (batch, heads, slots)


# -- layout ---------------------------------------------------------------------------------------------------------
def test_compact_lines_up_at_the_right():
    keep = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    rows, valid = compact(keep)
    assert rows[0].tolist() == [0, 2, 3] and rows[1, -1] == 2
    assert valid.tolist() == [[True, True, True], [False, False, True]]
    assert not keep[1, rows[1, :2]].any()  # fillers are rows that were removed


def test_take_gathers_rows():
    x = torch.randn(2, 5, 3)
    rows = torch.tensor([[0, 4], [3, 1]])
    assert torch.equal(take(x, rows), torch.stack([x[0, [0, 4]], x[1, [3, 1]]]))


def test_layout_operations():
    base = layout([[0, 2, 5], [1, 3, 4]], [[1, 1, 1], [0, 1, 1]], seen=6)
    assert not base.all_valid and len(base) == 3 and not base.per_head
    more = base.append(layout([[6], [6]], seen=7))
    assert more.index.tolist() == [[0, 2, 5, 6], [1, 3, 4, 6]] and more.seen == 7
    assert more.crop(1).index.tolist() == base.index.tolist() and more.crop(1).seen == 6
    assert more.tail(2).index.tolist() == [[5, 6], [4, 6]] and more.tail(2).seen == 7
    assert more.rows(torch.tensor([1, 1, 0])).index[:, 0].tolist() == [1, 1, 0]
    assert more.repeat(2).index[:, 0].tolist() == [0, 0, 1, 1]
    hidden = base.gather(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[False, True], [True, True]]))
    assert hidden.valid.tolist() == [[False, True], [True, True]]
    assert base.append(layout([[6], [6]], seen=7)) is not more  # another announcement is another change


def test_layout_of_heads():
    """The same operations where heads hold different slots, and only small integers are stored for them."""
    base = layout([[0, 2, 5], [1, 3, 4]], [[1, 1, 1], [0, 1, 1]], seen=6)
    heads = base.pick(torch.tensor([[[0, 1], [1, 2]], [[1, 2], [0, 2]]]))
    assert heads.per_head and heads.index.tolist() == [[[0, 2], [2, 5]], [[3, 4], [1, 4]]]
    assert heads.valid.tolist() == [[[True, True], [True, True]], [[True, True], [False, True]]]
    more = heads.append(layout([[6], [6]], seen=7)).append(layout([[7], [7]], seen=8))
    assert more.index[..., -2:].tolist() == [[[6, 7]] * 2] * 2 and more.seen == 8 and len(more) == 4
    assert more.crop(1).index.tolist() == [[[0, 2, 6], [2, 5, 6]], [[3, 4, 6], [1, 4, 6]]] and more.crop(1).seen == 7
    assert more.crop(2).index.tolist() == heads.index.tolist() and more.crop(2).seen == 6
    assert more.newest_rows() == 2 and heads.newest_rows() == 0
    assert more.rows(torch.tensor([1, 1])).index[:, 0].tolist() == [[3, 4, 6, 7]] * 2
    assert more.repeat(2).index[:, 0, 0].tolist() == [0, 0, 3, 3]
    again = more.pick(torch.tensor([[[1, 2], [0, 3]]] * 2), torch.tensor([[0, 1], [0, 0]]))
    assert again.index.tolist() == [[[2, 6], [2, 7]], [[4, 6], [1, 7]]]
    assert again.valid.tolist() == [[[True, True], [False, True]], [[True, True], [False, True]]]
    assert [t.dtype for t in heads.tensors()] == [torch.int16]
    copy = pickle.loads(pickle.dumps(more))
    assert torch.equal(copy.index, more.index) and copy.seen == 8


def test_layers_share_one_layout():
    """The same change asked for by several layers gives one object, so that masks are made once."""
    a, b = filled(), filled()
    b.layout = a.layout
    new = layout([[4], [4]], seen=5)
    x = torch.zeros(2, 2, 1, 3)
    for layer in (a, b):
        layer.announce(new)
        layer.update(x, x)
    assert a.layout is b.layout
    beams = torch.tensor([1, 0])
    for layer in (a, b):
        layer.reorder_cache(beams)
    assert a.layout is b.layout


# -- the cache layer ------------------------------------------------------------------------------------------------
def test_lengths_seen_and_stored():
    layer = filled(6)
    layer.select(torch.tensor([0, 3, 5]).expand(2, 2, -1))
    assert layer.get_seq_length() == 6 and layer.held() == 3
    assert layer.get_mask_sizes(2) == (5, 3)
    step(layer, 6)
    assert layer.get_seq_length() == 7 and layer.held() == 4
    assert layer.layout.index[0, 0].tolist() == [0, 3, 5, 6]
    assert layer.keys[1, 0, :, 0].tolist() == [10, 13, 15, 6]
    assert_consistent(layer)


def test_select_frees_memory():
    layer = filled(6)
    layer.select(torch.tensor([1, 2]).expand(2, 2, -1))
    assert layer.keys.untyped_storage().nbytes() == layer.values.untyped_storage().nbytes() == 2 * 2 * 2 * 3 * 4
    assert layer.nbytes() == 2 * 2 * 2 * 2 * 3 * 4 + 2 * 2 * 2 * 2  # and which entry each of them is, in two bytes
    assert layer.side["scores"].untyped_storage().nbytes() == 2 * 2 * 2 * 4


@pytest.mark.parametrize("evict", [False, True])
def test_rows_move_together(evict):
    """reorder_cache, batch_select_indices and batch_repeat_interleave move keys, values, scores, budgets, layout."""
    for move, rows in (
        (lambda x: x.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda x: x.batch_select_indices(torch.tensor([1])), [1]),
        (lambda x: x.batch_repeat_interleave(2), [0, 0, 1, 1]),
    ):
        layer = filled(5)
        if evict:
            slots = torch.tensor([[[0, 1], [1, 2]], [[3, 4], [2, 4]]])
            layer.select(slots, torch.tensor([[0, 1], [0, 0]]))
        before = copy.deepcopy(layer)
        move(layer)
        assert_consistent(layer)
        assert torch.equal(layer.keys, before.keys[rows])
        assert torch.equal(layer.side["scores"], before.side["scores"][rows])
        assert layer.quota.budget.tolist() == rows
        for now, then in zip(layer.layout.slots, before.layout.slots):
            assert torch.equal(now, then[rows])


def test_crop_takes_back_what_came_last():
    layer = filled(4)
    layer.select(torch.tensor([0, 2, 3]).expand(2, 2, -1))
    before = copy.deepcopy(layer)
    for value in (4, 5, 6):
        step(layer, value)
    layer.crop(-3)
    assert_consistent(layer)
    assert torch.equal(layer.keys, before.keys) and layer.get_seq_length() == before.get_seq_length() == 4
    assert torch.equal(layer.layout.index, before.layout.index)
    layer.crop(0)
    assert torch.equal(layer.keys, before.keys)


def test_windows_are_cut_when_the_next_token_arrives():
    layer = filled(6, window=4)
    assert layer.is_sliding and layer.held() == 3 and layer.get_mask_sizes(1) == (4, 3)
    keys, _ = step(layer, 6)
    assert keys.shape[2] == 4 and layer.layout.index[0].tolist() == [3, 4, 5, 6]
    assert layer.side["scores"].shape[-1] == 4 and layer.side["scores"][0, 0].tolist() == [3, 4, 5, 0]
    assert_consistent(layer)


def test_reset_empties():
    layer = filled(4)
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.held() == 0 and layer.nbytes() == 0
    assert not layer.side and layer.quota is None
    layer.announce(layout([[0], [0]]))
    layer.update(torch.zeros(2, 2, 1, 3), torch.zeros(2, 2, 1, 3))
    assert layer.get_seq_length() == 1


def test_unannounced_rows_are_refused():
    layer = filled(4)
    with pytest.raises(RuntimeError, match="without its compression"):
        layer.update(torch.zeros(2, 2, 1, 3), torch.zeros(2, 2, 1, 3))


def test_layers_copy_and_pickle():
    layer = filled(4)
    layer.select(torch.tensor([1, 2]).expand(2, 2, -1))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_consistent(twin)
        assert torch.equal(twin.keys, layer.keys) and twin.filled_by == "test"
        step(twin, 9)
        assert layer.held() == 2


def test_adopt():
    """Empty caches of either kind are taken, in place; filled ones, foreign ones and other classes are refused."""
    config = bare("qwen2_mixed").config
    for cache in (DynamicCache(), DynamicCache(config=config)):
        adopt(cache, config, "a")
        assert [type(layer) for layer in cache.layers] == [HeldLayer] * 4
        assert [layer.window for layer in cache.layers] == [None, None, 9, 9]
        adopt(cache, config, "b")
        assert {layer.filled_by for layer in cache.layers} == {"b"}
    full = DynamicCache(config=config)
    full.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    layers = list(full.layers)
    with pytest.raises(ValueError, match="already holds tokens"):
        adopt(full, config, "a")
    assert full.layers == layers
    from transformers import StaticCache

    with pytest.raises(ValueError, match="StaticCache"):
        adopt(StaticCache(config=config, max_cache_len=8), config, "a")


# -- masks ----------------------------------------------------------------------------------------------------------
def brute(keys, queries, window=None, sight=None):
    """(B, H, q, S) by the definition, entry by entry."""
    index = keys.position if keys.per_head else keys.position[:, None]
    valid = keys.valid if keys.per_head else keys.valid[:, None]
    B, H, S = index.shape
    out = torch.zeros(B, H, len(queries), S, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            for i in range(len(queries)):
                q = int(queries.position[b, i])
                for s in range(S):
                    past = valid[b, h, s] and index[b, h, s] <= q and (sight is None or sight[b, 0, i, s])
                    out[b, h, i, s] = past and (window is None or q - index[b, h, s] < window)
                if not queries.valid[b, i]:
                    out[b, h, i] |= index[b, h] == q
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("sight", [None, torch.rand(2, 1, 3, 6, generator=torch.Generator().manual_seed(0)) < 0.6])
def test_visible_by_definition(window, sight):
    keys = layout([[0, 1, 4, 6, 7, 8], [2, 3, 4, 6, 7, 8]], [[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    queries = layout([[6, 7, 8]] * 2)
    assert torch.equal(visible(keys, queries, window, sight), brute(keys, queries, window, sight))


def test_visible_per_head():
    keys = layout([list(range(7))], [[1, 1, 0, 1, 1, 1, 1]]).pick(torch.tensor([[[0, 1, 5, 6], [2, 3, 5, 6]]]))
    queries = layout([[5, 6]])
    assert torch.equal(visible(keys, queries, None, None), brute(keys, queries))


def test_filler_rows_see_themselves_only():
    keys = layout([[3, 4, 5]], [[0, 1, 1]])
    see = visible(keys, keys, None, None)
    assert see[0, 0].tolist() == [[True, False, False], [False, True, False], [False, True, True]]


def test_layer_mask_forms():
    """None where the kernel's own rule is right, bool for sdpa, additive for eager, one entry per query head."""
    plain = layout([[0, 1, 2]] * 2)
    make = lambda keys, queries, eager=False, **kw: layer_mask(
        keys, queries, window=None, sight=None, heads=4, eager=eager, dtype=torch.float32, **kw
    )
    assert make(plain, plain) is None
    heads = layout([[0, 1, 2]] * 2, seen=3).pick(torch.tensor([[[0, 1], [1, 2]]] * 2))
    heads = heads.append(layout([[3, 4]] * 2, seen=5))
    queries = layout([[3, 4]] * 2)
    mask = make(heads, queries)
    assert mask.dtype == torch.bool and mask.shape == (2, 4, 2, 4)
    assert torch.equal(mask[:, 0], mask[:, 1]) and torch.equal(mask[:, 2], mask[:, 3])
    added = make(heads, queries, eager=True)
    assert torch.equal(added == 0, mask) and (added[~mask] == torch.finfo(torch.float32).min).all()


# -- choosing -------------------------------------------------------------------------------------------------------
def test_best_slots():
    """Ascending, ties to the lower index, fillers in front, invalid slots never."""
    score = torch.tensor([[[5.0, 1, 5, 5, 2]], [[9.0, 3, 2, 4, 1]]])
    valid = torch.tensor([[[True] * 5], [[False, True, True, True, True]]])
    slots, fillers = best_slots(score, valid, torch.tensor([3, 2]))
    assert slots[0, 0].tolist() == [0, 2, 3]
    assert slots[1, 0, 1:].tolist() == [1, 3] and fillers.tolist() == [[0], [1]]
    heads = best_slots(score.expand(2, 2, 5), valid, torch.tensor([[3, 1], [2, 2]]))
    assert heads[1].tolist() == [[0, 2], [1, 1]] and heads[0][0, 1, -1] == 0
    assert best_slots(score, valid, torch.tensor([2, 2]))[1] is None
    protected = torch.tensor([[[float("inf"), 1, 2, float("inf"), 3]]])
    assert best_slots(protected, valid[:1], torch.tensor([3]))[0].tolist() == [[[0, 3, 4]]]


# -- vision ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dim", [1, 8])  # fewer channels than merged outputs, and more
def test_mixed_outputs_are_those_of_the_whole_assignment(dim):
    kept = torch.tensor([[0, 2, 5], [1, 3, 4]])
    groups = torch.tensor([[0, 0, 1, -1, 2, 2], [-1, 0, 0, 1, 2, -1]])  # two outputs of several tokens, and one
    weight = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    weight[1, 3:5] = 1.0
    assignment = Assignment(kept, groups, weight)
    assert assignment.mixed.tolist() == [[True, True, True], [True, False, False]]
    x = torch.randn(2, 6, dim, generator=torch.Generator().manual_seed(1))
    by_hand = [sum(weight[b, j] * x[b, j] for j in range(6) if groups[b, j] == k) for b, k in ((0, 0), (0, 1), (0, 2))]
    by_hand.append(weight[1, 1] * x[1, 1] + weight[1, 2] * x[1, 2])
    torch.testing.assert_close(mix(assignment, x, assignment.mixed), torch.stack(by_hand))


@torch.no_grad()
def test_rows_asked_for_by_number():
    """`logits_to_keep` as a count of 1 is the last row; as a tensor it names rows, though it equals 1 too."""
    model, batch = shared("llava"), batch_of("llava")
    with compressed(model, "uniform"):
        whole = model(**batch).logits
        torch.testing.assert_close(model(**batch, logits_to_keep=1).logits, whole[:, -1:])
        torch.testing.assert_close(model(**batch, logits_to_keep=torch.tensor([1])).logits, whole[:, 1:2])
