"""Tokens that pass: the whole prompt under a mask written by hand, and a cache that holds what stays."""

import pytest
import torch

from hf_compress.engine import forward
from hf_compress.engine.passing import passing
from hf_compress.layout import Layout
from tests import tiny
from tests.invariants.reference import (
    FullLength,
    alone,
    batch_of,
    close,
    compressed,
    fresh,
    greedy,
    kernels,
    logits_of,
    matrix,
    options,
    prompt_positions,
    refusal,
    rerun,
    shared,
    unchanged,
    windows,
    within,
)
from tests.tiny import IMG, VID


def by_hand(name, sample, tokens, kept, vectors):
    """(T, V) logits of the bare model: rows see of an image what is kept, and all of it if they are of it."""
    full = FullLength(name, sample, tokens[None])
    number, hidden = torch.zeros(full.rows, dtype=torch.long), torch.zeros(full.rows, dtype=torch.bool)
    at = []
    for i, (rows, visual, mine) in enumerate(zip(full.images(0), full.visual(0), kept)):
        stay = [rows[k] for k in mine]
        number[visual] = i + 1
        hidden[[row for row in visual if row not in stay]] = True
        at += [row for row in stay if row in visual]
    see = (number[:, None] == number) | ~hidden

    def change(kwargs):
        x = kwargs["inputs_embeds"].clone()
        x[0, at] = vectors(x[0, at])
        ones = torch.ones(1, full.rows, dtype=torch.long)
        return dict(kwargs, inputs_embeds=x, position_ids=full.positions, attention_mask=ones)

    masks = [full.causal(i) & see for i in range(full.layers)]
    return rerun(full.model, full.batch, change, masks)[0][0, -len(tokens) :]


@kernels("passing")
def test_equals_a_mask_by_hand(method, name, attn):
    """Every greedy step of a ragged, padded batch with a cache; each row against an uncached reference alone."""
    model, batch = shared(name, attn), batch_of(name)
    with compressed(model, method):
        mark = model.compressor.vision
        with torch.no_grad():
            mark.vector.normal_()
        run, last = greedy(model, batch), model.compression.last
        for row in range(2):
            sample = alone(name, batch, row)
            close(run.logits[row], by_hand(name, sample, run.tokens[row], last.visual_kept[row], mark))


@matrix("passing")
def test_entries_are_those_of_text_and_of_what_stays(method, name):
    """In every layer, whatever the budget; through the layers went everything."""
    model, batch = shared(name), batch_of(name)
    lengths = batch["attention_mask"].sum(1).tolist()
    for keep in ({"ratio": 0.5}, {"keep": 1, "ratio": None}):
        with compressed(model, method, **keep):
            logits_of(model, batch)
            last = model.compression.last
        for b, n in enumerate(lengths):
            stay = [max(1, round(m / 2)) if keep["ratio"] else 1 for m in last.visual_tokens[b]]
            assert last.visual_left[b] == stay
            left = n - sum(last.visual_tokens[b]) + sum(stay)
            assert [layer[b] for layer in last.layer_tokens] == [n] * len(windows(name))
            for layer, window in zip(last.cache_tokens, windows(name)):
                assert layer[b] == left if window is None else layer[b] <= min(left, within([n], window)[0])


@matrix("passing")
def test_in_two_phases(method, name):
    """The image first, then text on what is left of it: the logits of one pass."""
    if name == "paligemma":
        return  # images see the text behind them
    model = shared(name)
    first, text = tiny.batch(name, model, [[1, 5, IMG]]), torch.tensor([[7, 8, 9, 10, 11]])
    whole = tiny.batch(name, model, [[1, 5, IMG, *text[0].tolist()]])
    whole |= tiny.encoder_inputs(first)
    positions = prompt_positions(name, whole)
    with compressed(model, method), torch.no_grad():
        expected = model(**whole, position_ids=positions).logits[:, -5:]
        cache = model(**first, position_ids=positions[..., :-5]).past_key_values
        mask = torch.ones_like(whole["input_ids"])
        more = dict(attention_mask=mask, position_ids=positions[..., -5:])
        got = model(input_ids=text, past_key_values=cache, **more).logits
    close(got, expected)


def test_sight_of_the_card():
    """b v v C t t: the row of the second t sees b, C and text alone, C everything before it."""
    number, stays = torch.tensor([[0, 1, 1, 1, 0, 0]]), torch.tensor([[True, False, False, True, True, True]])
    rows = torch.arange(6)[None]
    layout = Layout(rows, rows, number - 1, torch.ones(1, 6, dtype=torch.bool), torch.zeros(1).long(), 6)
    see = passing(number, stays, 0).sight(layout, layout)[0, 0] & torch.ones(6, 6, dtype=torch.bool).tril()
    shown = ["".join(str(int(x)) for x in row) for row in see]
    assert shown == ["100000", "110000", "111000", "111100", "100110", "100111"]
    assert passing(number, torch.ones_like(stays), 0) is None


def test_frames_of_a_video_do_not_see_each_other(monkeypatch):
    model = fresh("qwen2_5_vl")
    batch = tiny.batch("qwen2_5_vl", model, [[1, 5, VID, 7, 8]])
    model.compress("voco", ratio=0.5)
    seen, original = [], forward.passing
    monkeypatch.setattr(forward, "passing", lambda *given: seen.append(original(*given)) or seen[-1])
    logits_of(model, batch)
    frames = seen[0].number.unique(return_counts=True)[1][1:].tolist()
    assert len(frames) > 1 and len(set(frames)) == 1
    left = (seen[0].number * ~seen[0].goes).unique(return_counts=True)[1][1:].tolist()
    assert [2 * n for n in left] == frames


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(prefill_chunk_size=5), "prefill_chunk_size=5"),
        (dict(cache_implementation="static"), "cache_implementation='static'"),
    ],
)
def test_what_needs_the_whole_prompt_is_refused(given, message):
    model, batch = shared("llava"), batch_of("llava")
    with compressed(model, "voco"), pytest.raises(ValueError, match=f"{message}.*'voco'"):
        model.generate(**batch, **given, max_new_tokens=2)


@pytest.mark.parametrize(
    ("methods", "knobs", "message"),
    [
        (["voco", "snapkv"], {}, "'voco' takes tokens out of the cache.*'snapkv'"),
        (["voco", "fastv"], {}, "'voco' takes tokens out of the cache.*'fastv'"),
        ("voco", {"positions": 0.5}, "positions=0.5: method='voco'"),
        ("voco", {"positions": "shared:2"}, "positions='shared:2': method='voco'"),
    ],
)
def test_what_goes_with_nothing_is_refused(methods, knobs, message):
    model = shared("llava")
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.compress(methods, ratio=0.5, **knobs)


def test_labels_of_what_passes_are_refused():
    model, batch = shared("llava"), batch_of("llava")
    with compressed(model, "voco"), pytest.raises(ValueError, match="labels"):
        model(**batch, labels=batch["input_ids"])


@matrix("passing")
def test_nothing_passes_where_everything_stays(method, name):
    model, batch = shared(name), batch_of(name)
    with model.compressed(method, **options(method, model, ratio=0)):
        assert torch.equal(logits_of(model, batch), logits_of(shared(name), batch))
        assert model.compression.last.cache_tokens[0] == within(
            batch["attention_mask"].sum(1).tolist(), windows(name)[0] or 10**9
        )


def test_models_without_a_cache_stage_are_refused():
    assert {refusal("voco", name) for name in tiny.HYBRIDS} == {"has no cache stage"}
