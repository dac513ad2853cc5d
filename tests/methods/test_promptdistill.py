"""promptdistill against the numbers of its card, and rows ranked by products of queries and keys taken by hand."""

import sys
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from hf_compress.methods.decoder.promptdistill import PromptDistill
from tests.invariants.language import FullLength, bare, longer
from tests.invariants.reference import batch_of, close, greedy, logits_of, shared
from tests.tiny import TOKEN_KEYS


def view_of(z, length):
    """One sample whose last row has these products with all rows."""
    at = torch.arange(length)[None]
    every = torch.ones(1, length, dtype=torch.bool)
    view = SimpleNamespace(
        prompt=every,
        valid=every,
        last=length - 1 - at,
        speaks=at == length - 1,
        visual=~every,
        attention=lambda source, softmax: torch.tensor([z]),
    )
    view.removable = PromptDistill(keep_last=2).removable(view)
    return view


def test_card():
    """z = 5 0 0 1 9 1 | 0 0: pooled 1.0 1.2 3.0 2.2 2.2 2.2; three of six stay, 2 3 4, and the two last rows."""
    view = view_of([5.0, 0, 0, 1, 9, 1, 7, 8], 8)
    score = PromptDistill(keep_last=2).score(view)
    torch.testing.assert_close(score[0, :6], torch.tensor([1.0, 1.2, 3.0, 2.2, 2.2, 2.2]))
    assert PromptDistill(keep_last=2).decide(view, [3]).kept.tolist() == [[2, 3, 4, 6, 7]]


def test_plan_of_the_card():
    """8192 rows, 1024 behind layer 13 of 32: a mean share of .508; at most .5625 may go."""
    plan = PromptDistill().plan(32, 8192, 1 - Fraction(14 * 8192 + 18 * 1024, 32 * 8192))
    assert plan == {14: 1024} and pytest.approx(0.508, abs=5e-4) == (14 * 8192 + 18 * 1024) / (32 * 8192)
    with pytest.raises(ValueError, match=r"0 <= ratio <= 0\.562"):
        PromptDistill().plan(32, 8192, Fraction(57, 100))
    assert PromptDistill(layers=(4, 8)).plan(16, 64, 1 - Fraction(4 * 64 + 4 * 32 + 8 * 16, 16 * 64)) == {4: 32, 8: 16}


def products(name, full, see, layer):
    """(B, L, L) scaled products of queries and keys of a layer, mean over heads, of the bare model under masks."""
    attention, seen = bare(name).get_decoder().layers[layer].self_attn, []
    hook = attention.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    try:
        full.run(see)
    finally:
        hook.remove()
    x, (cos, sin) = seen[0]["hidden_states"], seen[0]["position_embeddings"]
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    heads = lambda y: y.view(*x.shape[:2], -1, attention.head_dim).transpose(1, 2)
    q, k = rotate(heads(attention.q_proj(x)), heads(attention.k_proj(x)), cos, sin)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q @ k.mT * attention.scaling).mean(1)


def pooled(z, width):
    around = lambda i: range(max(0, i - width // 2), min(len(z), i + width // 2 + 1))
    return [sum(z[j] for j in around(i)) / width for i in range(len(z))]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "candidates"), [("llama", "prompt"), ("qwen2", "prompt"), ("llava", "prompt"), ("llava", "visual")]
)
@torch.no_grad()
def test_rows_stay_by_the_products(name, candidates, side):
    """Two cuts with keep_last=3; the second one pools over the rows that the first has left."""
    model, batch = shared(name), batch_of(name, side=side)
    with model.compressed("promptdistill", ratio=0.4, layers=(1, 3), keep_last=3, candidates=candidates):
        logits_of(model, batch)
        last = model.compression.last
    full = FullLength(name, batch, batch["input_ids"][:, :1])
    for layer in (1, 3):
        held = [*last.layer_index[:layer], *[last.layer_index[layer - 1]] * (4 - layer)]
        z = products(name, full, full.survivors(held), layer - 1)
        for b in range(2):
            alive, stay = last.layer_index[layer - 1][b], set(last.layer_index[layer][b])
            may = set(alive[:-3])
            mine = pooled([float(z[b, alive[-1], i]) if i in may else 0.0 for i in alive], 5)
            if candidates == "visual":
                may &= {i for image in full.visual(b) for i in image}
            assert set(alive) - may <= stay and 0 < len(stay & may) < len(may)
            order = sorted((i for i in alive if i in may), key=lambda i: (-mine[alive.index(i)], i))
            assert stay & may == set(order[: len(stay & may)])


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_mixed", "llava", "qwen2_5_vl"])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
@torch.no_grad()
def test_the_ratio_is_that_of_rows_that_may_go(name, ratio):
    model, batch = shared(name), batch_of(name)
    with model.compressed("promptdistill", ratio=ratio):
        logits_of(model, batch)
        last = model.compression.last
    for b, rows in enumerate(batch["attention_mask"].sum(1).tolist()):
        counts = [n[b] - 1 for n in last.layer_tokens]
        assert counts[0] == rows - 1 and abs(1 - sum(counts) / (4 * counts[0]) - ratio) <= 1 / counts[0]


@pytest.mark.parametrize("name", ["llama", "gemma2", "llava"])
@torch.no_grad()
def test_truncated_caches(name):
    """Generation equals masks by which no row behind the prompt sees what has left, in any layer."""
    model, batch = shared(name), batch_of(name)
    with model.compressed("promptdistill", ratio=0.4, truncate=True):
        run, last = greedy(model, batch), model.compression.last
    full = FullLength(name, batch, run.tokens)
    late, left = torch.arange(full.rows)[:, None] >= full.prompt, full.columns(last.layer_index[-1])[:, None, None]
    close(run.logits, full.logits([see & (left | ~late) for see in full.survivors(last.layer_index)]))
    whole = [layer for layer, window in zip(run.cache.layers, full.windows) if window is None]
    assert len({layer.layout.index.shape[1] for layer in whole}) == 1


@pytest.mark.parametrize("name", ["llama", "gemma2", "llava"])
@torch.no_grad()
def test_a_second_turn_loses_rows_of_its_own(name):
    """Of each turn those that rank lowest leave; what comes behind sees what both have left. Short turns too."""
    model, batch = shared(name), batch_of(name)
    for size in (3, 9):
        more = torch.randint(3, 80, (2, size), generator=torch.Generator().manual_seed(size))
        whole = longer(name, batch, more)
        text = {key: value for key, value in whole.items() if key in TOKEN_KEYS}
        with model.compressed("promptdistill", ratio=0.4):
            cache = greedy(model, batch, max_new_tokens=1).cache
            first = model.compression.last.layer_index
            run = greedy(model, text, past_key_values=cache)
            second = model.compression.last.layer_index
        length = batch["input_ids"].shape[1]
        assert all(min(rows) >= length for at in second for rows in at)
        assert [len(rows) for rows in second[0]] == [size] * 2 and len(second[-1][0]) < size
        kept = [[a + b for a, b in zip(*turns)] for turns in zip(first, second)]
        full = FullLength(name, whole, run.tokens)
        close(run.logits, full.logits(full.survivors(kept)), atol=2e-4)


@torch.no_grad()
def test_no_answer_is_read():
    """In training the kept rows depend on the prompt alone, and no row with a label leaves."""
    model, kept = shared("llama"), []
    ids = torch.arange(5, 21)[None]
    for answer in ([20, 21, 22], [70, 40, 33]):
        whole = torch.cat([ids, torch.tensor([answer])], 1)
        labels = whole.clone()
        labels[:, :-3] = -100
        with model.compressed("promptdistill", ratio=0.4):
            model(input_ids=whole, labels=labels)
            kept.append(model.compression.last.layer_index)
    assert kept[0] == kept[1] and {15, 16, 17, 18} <= set(kept[0][-1][0]) and len(kept[0][-1][0]) < 19


def test_refusals():
    for knobs in (dict(keep_last=0), dict(pool=4), dict(candidates="text"), dict(truncate=1), dict(scope="per_image")):
        with pytest.raises(ValueError, match=f"{next(iter(knobs))}="):
            PromptDistill(**knobs)
