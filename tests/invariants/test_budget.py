"""Invariant 2: what was asked for is what comes out, in integers; and the report says so."""

from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import hf_compress
from hf_compress import budget
from tests.invariants.reference import (
    NAMES,
    VLMS,
    FullLength,
    acts_on_steps_alone,
    adapter_of,
    batch_of,
    cases,
    compressed,
    greedy,
    leaves_prompts_whole,
    logits_of,
    longer,
    matrix,
    of_kind,
    options,
    refusal,
    shared,
    storages,
    unchanged,
    windows,
    within,
)
from tests.tiny import FAMILIES, LLAVA_TOKENS, TOKEN_KEYS

RATIOS = [0.1, 1 / 3, 0.5, 2 / 3, 0.77, 8 / 9]


def visual_tokens(name, batch):
    """Per sample, per image."""
    full = FullLength(name, batch, batch["input_ids"][:, :1])
    return [[len(rows) for rows in full.visual(b)] for b in range(len(batch["input_ids"]))]


def assert_counts(method, got, wanted):
    """Exactly, or below for methods that only promise an upper bound; over all images where they decide on a sample."""
    cls = hf_compress.methods()[method].cls
    if cls.at_most:
        assert all(1 <= g <= w for a, b in zip(got, wanted) for g, w in zip(a, b))
    elif cls.scope == "sample":
        assert [sum(row) for row in got] == [sum(row) for row in wanted]
    else:
        assert got == wanted


SPARING = ("scm", "lrs")  # never cut the whole image in small, where crops come with one


def too_few(method, name, batch, keeps):
    """Whether some image keeps (`keeps` of its tokens) fewer than its whole in small has, which such methods refuse."""
    if method not in SPARING or name not in FAMILIES["anyres"]:
        return False
    return any(keeps(n) < min(n, LLAVA_TOKENS) for sample in visual_tokens(name, batch) for n in sample)


@pytest.mark.parametrize("kind", ["inputs", "mixed", "edges"])
@matrix("vision")
def test_vision_ratio(method, name, kind):
    """Per image, whatever its size and its neighbours; tokens ascending and within the image."""
    model, batch = shared(name), batch_of(name, kind)
    for ratio in RATIOS if kind == "inputs" else RATIOS[2:3]:
        exact = 1 - budget.check_ratio(ratio)
        if too_few(method, name, batch, lambda n, exact=exact: max(1, round(n * exact))):
            with compressed(model, method, ratio=ratio), pytest.raises(ValueError, match="never cut"):
                logits_of(model, batch)
            continue
        with compressed(model, method, ratio=ratio):
            logits_of(model, batch)
            last = model.compression.last
        assert_counts(method, last.visual_left, [[max(1, round(n * exact)) for n in s] for s in last.visual_tokens])
        full = FullLength(name, batch, batch["input_ids"][:, :1])
        for b in range(2):
            assert last.visual_tokens[b] == [len(rows) for rows in full.visual(b)]
            for kept, rows, visual in zip(last.visual_kept[b], full.images(b), full.visual(b), strict=True):
                assert kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < len(rows)
                assert {i for i, row in enumerate(rows) if row not in visual} <= set(kept)  # newlines stay
        removed = [sum(t) - sum(k) for t, k in zip(last.visual_tokens, last.visual_left)]
        lengths = batch["attention_mask"].sum(1).tolist()
        assert last.layer_tokens == [[n - r for n, r in zip(lengths, removed)]] * 4


@pytest.mark.parametrize("keep", [5, 8, 12])
@matrix("vision")
def test_vision_keep(method, name, keep):
    """An image of fewer tokens stays whole; where no image can have as many, that is refused."""
    model, batch = shared(name), batch_of(name)
    adapter = adapter_of(name)
    if (most := adapter.tokens_per_image(model)) is not None and keep > most and not adapter.tiles:
        with pytest.raises(ValueError, match=f"keep at most {most}"):
            model.compress(method, **options(method, model, keep=keep))
        return
    if too_few(method, name, batch, lambda _: keep):
        with compressed(model, method, keep=keep), pytest.raises(ValueError, match="never cut"):
            logits_of(model, batch)
        return
    with compressed(model, method, keep=keep):
        logits_of(model, batch)
        last = model.compression.last
    assert_counts(method, last.visual_left, [[min(n, keep) for n in s] for s in last.visual_tokens])


@matrix("shrinking")
def test_decoder_ratio(method, name):
    """Every layer holds what the plan says for its sample, and the plan is within one token per layer of the ratio."""
    model, batch = shared(name), batch_of(name)
    for ratio in (0.1, 0.25, 0.4):
        with compressed(model, method, ratio=ratio):
            logits_of(model, batch)
            last, stages = model.compression.last, model.compression.context.stages
        drops, merges = stages["decoder"], "vision" in stages  # some act before the language model too
        for b, visual in enumerate(map(sum, last.visual_tokens)):
            n = sum(last.visual_left[b])
            assert n == visual or (merges and stages["vision"].ratio > 0)
            plan = drops.method.plan(4, n, drops.ratio)
            text, expected = int(batch["attention_mask"][b].sum()) - visual, []
            if None in plan.values():  # each sample has its own counts, all of them the same mean: half a row per layer
                assert abs(sum(tokens[b] - text for tokens in last.layer_tokens) - 4 * n * (1 - drops.ratio)) <= 2
                continue
            for layer in range(4):
                n = plan.get(layer, n)
                expected.append(text + n)
            assert [tokens[b] for tokens in last.layer_tokens] == expected
            removed = 1 - Fraction(sum(e - text for e in expected), 4 * visual)
            rounded = 1 + merges * len(last.visual_tokens[b])  # every image keeps a whole number, too
            assert abs(removed - budget.check_ratio(ratio)) <= Fraction(rounded, visual)


@matrix("shrinking")
def test_decoder_keep(method, name):
    """Layer-averaged tokens per image; where the images together have fewer, all of them."""
    model, batch = shared(name), batch_of(name)
    keep = round(0.7 * max(sum(images) / len(images) for images in visual_tokens(name, batch)))
    with compressed(model, method, keep=keep):
        logits_of(model, batch)
        last = model.compression.last
    for b, images in enumerate((2, 1)):
        visual = sum(last.visual_tokens[b])
        text = int(batch["attention_mask"][b].sum()) - visual
        mean = sum(tokens[b] - text for tokens in last.layer_tokens) / 4
        assert abs(mean - min(visual, keep * images)) <= 1


@matrix("even")
def test_cache_ratio(method, name):
    """floor(L * (1 - ratio)) entries per head, per row of a ragged batch, at least one."""
    model, batch = shared(name), batch_of(name)
    lengths = batch["attention_mask"].sum(1).tolist()
    for ratio in [*RATIOS, 0.99]:
        with compressed(model, method, ratio=ratio):
            logits_of(model, batch)
            last = model.compression.last
            cache = model(**batch).past_key_values
        exact = 1 - budget.check_ratio(ratio)
        expected = [max(1, (n * exact).__floor__()) for n in lengths]
        assert last.cache_tokens == [within(lengths, window) if window else expected for window in windows(name)]
        for layer in (cache.layers[i] for i, window in enumerate(windows(name)) if window is None):
            valid = layer.layout.valid
            assert (valid.sum(-1).view(2, -1) == torch.tensor(expected)[:, None]).all()


def test_skipped_layers_give_their_bytes_back():
    """knorm with two whole layers keeps the same number of entries over all layers."""
    model, batch = shared("llama"), batch_of("llama")
    with compressed(model, "knorm", ratio=0.25, skip_layers=2):
        logits_of(model, batch)
        last = model.compression.last
    lengths = batch["attention_mask"].sum(1).tolist()
    assert last.cache_tokens[:2] == [lengths] * 2
    for b, n in enumerate(lengths):
        assert sum(tokens[b] for tokens in last.cache_tokens) == 4 * (n * 3 // 4)


@matrix()
def test_report_reads_well(method, name):
    """Everything requested and realised is in the text, one line per layer, totals add up."""
    model, batch = shared(name), batch_of(name)
    with compressed(model, method):
        assert "not called yet" in str(model.compression.report())
        with pytest.raises(RuntimeError, match="nothing to report"):
            model.compression.report().totals()
        with torch.no_grad():
            cache = model(**batch).past_key_values
        report, last = model.compression.report(), model.compression.last
        text, rows, totals = str(report), report.rows(), report.totals()
    assert type(model).__name__ in text and method in text and totals["requested"] in text
    table = [line.split() for line in text.splitlines()[-4:]]
    assert [int(line[0]) for line in table] == [0, 1, 2, 3] == [row["layer"] for row in rows]
    for line, row, tokens in zip(table, rows, last.layer_tokens):
        assert row["tokens"] == sum(tokens) / 2 and float(line[1].replace(",", "")) == row["tokens"]
    assert totals["kv_bytes"] == storages(cache) and f"{totals['kv_bytes']:,}" in text
    assert totals["prompt_tokens"] == int(batch["attention_mask"].sum())
    assert totals["visual_tokens"] == sum(map(sum, last.visual_tokens))
    assert 0 < totals["kv_bytes"] <= totals["full_kv_bytes"]  # windows bound both
    whole = leaves_prompts_whole(method)
    assert all(windows(name)) or (totals["kv_bytes"] < totals["full_kv_bytes"]) is not whole
    assert 0 < totals["gflops"] <= totals["full_gflops"]
    if method in of_kind("passing"):
        assert totals["gflops"] == totals["full_gflops"] and "removed behind the prompt" in text
    elif hf_compress.methods()[method].stage != "cache" and not acts_on_steps_alone(method):
        assert totals["gflops"] < totals["full_gflops"]
    if hf_compress.methods()[method].stage in ("vision", "decoder"):
        assert totals["visual_tokens"] == sum(map(sum, visual_tokens(name, batch)))


@matrix()
def test_report_of_a_second_turn(method, name):
    """The last prompt may continue a cache: what is stored is never more than what there is without compression."""
    model, batch = shared(name), batch_of(name)
    with compressed(model, method):
        if leaves_prompts_whole(method):
            return  # bytes kept free for the next tokens may be more than those that steps have saved
        first = greedy(model, batch)
        more = torch.cat([first.tokens, torch.randint(3, 80, (2, 4))], 1)
        turn = {key: value for key, value in longer(name, batch, more).items() if key in TOKEN_KEYS}
        model.generate(**turn, past_key_values=first.cache, max_new_tokens=1)
        totals = model.compression.report().totals()
    assert 0 < totals["kv_bytes"] <= totals["full_kv_bytes"]


@pytest.mark.parametrize("name", [name for name in VLMS if refusal("snapkv", name) is None])
def test_several_stages_at_once(name):
    """One ratio for all, or one each; keep and ratio mixed."""
    model, batch = shared(name), batch_of(name)
    sizes = [dict(ratio=0.5), dict(ratio=[0.5, 0.5]), dict(ratio=[None, 0.5], keep=[7, None])]
    for size in sizes:
        with model.compressed(["snapkv", "divprune"], **size):
            logits_of(model, batch)
            last = model.compression.last
        assert last.visual_left == [[round(n / 2) for n in s] for s in last.visual_tokens]
        lengths = last.layer_tokens[0]
        for held, window in zip(last.cache_tokens, windows(name)):
            if window:  # what the next token can see beside itself
                assert held == [min(n, window - 1) for n in lengths]
            else:
                assert held == [min(n, 7) if "keep" in size else n // 2 for n in lengths]


@pytest.mark.parametrize(("method", "name"), cases(refused=True))
def test_what_does_not_apply_is_refused(method, name):
    """The cases that the matrix leaves out: the message says why, and the model stays as it was."""
    model = shared(name)
    with unchanged(model), pytest.raises(ValueError, match=refusal(method, name)):
        model.compress(method, **options(method, model))


@given(st.data(), st.integers(1, 8))
def test_shares_are_within_one_of_the_proportion(data, parts):
    """Within the capacities; where these do not bind, rounded up are those with the largest remainders."""
    capacity = data.draw(st.lists(st.integers(0, 30), min_size=parts, max_size=parts))
    weights = data.draw(st.lists(st.integers(0, 30), min_size=parts, max_size=parts))
    total = data.draw(st.integers(0, sum(capacity)))
    out = budget.shares(total, weights, capacity)
    assert sum(out) == total and all(0 <= n <= room for n, room in zip(out, capacity))
    if any(weights) and all(n < room for n, room in zip(out, capacity)):
        exact = [Fraction(total * w, sum(weights)) for w in weights]
        assert all(abs(n - e) < 1 for n, e in zip(out, exact))
        up = [e - int(e) for n, e in zip(out, exact) if n > e]
        down = [e - int(e) for n, e in zip(out, exact) if n < e]
        assert not up or not down or min(up) >= max(down)


def test_the_matrix_is_not_empty():
    """Every registered method is tested on some model, and every architecture has a tiny model."""
    assert all(any(refusal(m, n) is None for n in NAMES) for m in hf_compress.methods())
    assert {adapter_of(n).model_types for n in NAMES} == {a.model_types for a in hf_compress.architectures().values()}
    assert {options(m).get("ratio") for m in hf_compress.methods()} <= {None, 0.25, 0.4, 0.5}
