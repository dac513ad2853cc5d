"""Invariant 11: a second and a third turn on the returned cache equal recomputation with the same tokens removed."""

import pytest
import torch

import hf_compress
from tests import tiny
from tests.invariants.reference import (
    FullLength,
    alone,
    bare,
    batch_of,
    close,
    compressed,
    extend,
    greedy,
    kernels,
    matrix,
    prompt_positions,
    shared,
    short_logits,
    slots,
)
from tests.tiny import IMG, VISION


def turn(model, before, batch, ids=None, **more):
    """The prompt of the next turn: everything so far and new text (or `ids`), with masks of that length."""
    sequences = before.out.sequences
    g = torch.Generator().manual_seed(sequences.shape[1])
    new = torch.randint(3, 80, (len(sequences), 6), generator=g) if ids is None else ids
    out = dict(input_ids=torch.cat([sequences, new], 1))
    added = out["input_ids"].shape[1] - batch["attention_mask"].shape[1]
    for key, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if key in batch:
            old = batch[key]
            out[key] = torch.cat([old, torch.full((len(old), added), fill, dtype=old.dtype)], 1)
    return out | more


def conversation(model, batch, turns=3, **kwargs):
    """Runs of all turns, each on the cache of the one before, and the batch of the last turn."""
    runs = [greedy(model, batch, **kwargs)]
    for _ in range(turns - 1):
        batch = turn(model, runs[-1], batch)
        runs.append(greedy(model, batch, past_key_values=runs[-1].cache, **kwargs))
    return runs


def everything_after(batch, runs):
    """(B, T) all tokens after the first prompt."""
    return runs[-1].out.sequences[:, batch["input_ids"].shape[1] :]


def steps_of(runs, prompt):
    """Per turn: the slice of its logits among those after the first prompt."""
    return [slice(run.out.sequences.shape[1] - prompt - 5, run.out.sequences.shape[1] - prompt) for run in runs]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llama"])
def test_the_bare_model_continues(name):
    """What the tests below rely on: without compression the reference covers three turns."""
    batch, model = batch_of(name), bare(name, "sdpa")
    runs = conversation(model, batch)
    full = FullLength(name, batch, everything_after(batch, runs))
    expected = full.logits([full.causal(i) for i in range(full.layers)])
    for run, here in zip(runs, steps_of(runs, full.prompt)):
        close(run.logits, expected[:, here])


@matrix("vision", ["llava", "qwen2_5_vl", "llava_window"])
def test_vision(method, name):
    model, batch = shared(name), batch_of(name)
    with compressed(model, method):
        greedy(model, batch)
        kept = model.compression.last.visual_kept
        runs = conversation(model, batch)
    if method in ("visionzip", "avgpool", "tome", "downsample"):
        return merged(model, method, batch, runs)
    tokens = everything_after(batch, runs)
    for row in range(2):
        expected = short_logits(name, alone(name, batch, row), tokens[row], kept[row])
        for run, here in zip(runs, steps_of(runs, batch["input_ids"].shape[1])):
            close(run.logits[row], expected[here])


def merged(model, method, batch, runs):
    """Merging methods: from scratch through the compressed model itself, its tokens forced."""
    tokens = everything_after(batch, runs)
    length = batch["input_ids"].shape[1]
    force = lambda b, ids: [int(tokens[b, len(ids) - length])]
    with compressed(model, method):
        forced = model.generate(
            **batch,
            max_new_tokens=tokens.shape[1],
            do_sample=False,
            prefix_allowed_tokens_fn=force,
            return_dict_in_generate=True,
            output_logits=True,
        )
    logits = torch.stack(forced.logits, 1)
    for run, here in zip(runs, steps_of(runs, length)):
        close(run.logits, logits[:, here])


@kernels("decoder", ["llava", "qwen2_5_vl", "llava_window"])
def test_decoder(method, name, attn):
    model, batch = shared(name, attn), batch_of(name)
    with compressed(model, method):
        greedy(model, batch)
        kept = model.compression.last.layer_index
        runs = conversation(model, batch)
    full = FullLength(name, batch, everything_after(batch, runs))
    expected = full.logits([full.causal(i) & full.columns(rows)[:, None, None] for i, rows in enumerate(kept)])
    for run, here in zip(runs, steps_of(runs, full.prompt)):
        close(run.logits, expected[:, here])


@kernels("cache", ["llava", "qwen2_5_vl", "llama", "qwen2_mixed"])
def test_cache_that_grows(method, name, attn):
    model, batch = shared(name, attn), batch_of(name)
    with compressed(model, method, policy="grow"):
        runs = conversation(model, batch)
    full = FullLength(name, batch, everything_after(batch, runs))
    late = torch.arange(full.rows)[:, None] >= full.prompt
    see = []
    for i in range(full.layers):
        base = full.causal(i)
        if full.windows[i] is None:
            base = base & (slots(runs[-1].cache, i, full.rows, full.heads)[:, :, None] | ~late)
        see.append(base)
    expected = full.logits(see)
    for run, here in zip(runs, steps_of(runs, full.prompt)):
        close(run.logits, expected[:, here])


@matrix("cache", ["llava", "llama"])
def test_cache_on_hold_token_by_token(method, name):
    """Several tokens at once see what each would have seen alone, where that does not depend on later scores."""
    cls = hf_compress.methods()[method].cls
    if cls.running or "hold" not in cls.policies or method != "streaming":
        return
    model, batch = shared(name), batch_of(name)
    with compressed(model, method, policy="hold"):
        runs = conversation(model, batch, turns=2)
        tokens, length = everything_after(batch, runs), batch["input_ids"].shape[1]
        force = lambda b, ids: [int(tokens[b, len(ids) - length])]
        single = greedy(model, batch, max_new_tokens=tokens.shape[1], prefix_allowed_tokens_fn=force)
    for run, here in zip(runs, steps_of(runs, length)):
        close(run.logits, single.logits[:, here])


@pytest.mark.parametrize("ragged", [False, True])
@matrix("vision", ["llava", "llava_window"])
def test_a_new_image_in_the_second_turn(method, name, ragged):
    """Equals one prompt with all images; in a ragged batch the second row shows nothing new.

    Qwen2.5-VL is left out: the bare model wants all grids but the new pixels only, and refuses either way.
    """
    model = shared(name)
    base = tiny.batch("llava", model, [[1, 5, IMG, 7, 8], [1, 11, IMG, 13, 14, 15, 16]])
    new = tiny.batch("llava", model, [[IMG, 20, 21], [*range(30, 68)] if ragged else [IMG, 23, 24]])
    with compressed(model, method):
        first = greedy(model, base)
        more = turn(model, first, base, new["input_ids"])
        second = greedy(model, more | dict(pixel_values=new["pixel_values"]), past_key_values=first.cache)
        rows = [tiny.single(batch, row, "llava") for row in range(2) for batch in (base, new)]
        pixels = torch.cat([row["pixel_values"] for row in rows if "pixel_values" in row])
        scratch = greedy(model, more | dict(pixel_values=pixels))
    close(second.logits, scratch.logits)


def loop(model, name, batch, tokens, padded):
    """(B, T, V) logits of `model(ids, past_key_values=...)` step by step; positions and mask only where padding is."""
    positions, mask = prompt_positions(name, batch), batch["attention_mask"]
    with torch.no_grad():
        out = model(**batch, **(dict(position_ids=positions) if padded else {}))
        logits = [out.logits[:, -1]]
        for step in range(tokens.shape[1] - 1):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            more = dict(attention_mask=mask, position_ids=extend(positions, step + 1)[..., -1:]) if padded else {}
            out = model(input_ids=tokens[:, step, None], past_key_values=out.past_key_values, **more)
            logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("kind", ["inputs", "equal"])
@matrix(names=[*VISION, "llama"])
def test_a_loop_written_by_hand(method, name, kind):
    """A decode loop that knows nothing of compression equals generate; without padding it passes no positions."""
    model, batch = shared(name), batch_of(name, kind)
    with compressed(model, method):
        expected = greedy(model, batch)
        close(loop(model, name, batch, expected.tokens, kind == "inputs"), expected.logits)


@pytest.mark.parametrize("kind", ["inputs", "equal"])
@pytest.mark.parametrize("name", [*VISION, "llama"])
def test_the_loop_is_right_on_the_bare_model(name, kind):
    model, batch = bare(name, "sdpa"), batch_of(name, kind)
    expected = greedy(model, batch)
    close(loop(model, name, batch, expected.tokens, kind == "inputs"), expected.logits)


@matrix(names=["llava", "llama"])
def test_the_cache_tells_what_the_caller_fed(method, name):
    """get_seq_length() counts the caller's tokens in every layer."""
    model, batch = shared(name), batch_of(name)
    with compressed(model, method):
        run = greedy(model, batch)
    fed = run.out.sequences.shape[1] - 1
    assert [layer.get_seq_length() for layer in run.cache.layers] == [fed] * 4
    for layer in run.cache.layers:
        assert layer.keys.shape[-2] == len(layer.layout)
        index, valid = layer.layout.index, layer.layout.valid
        for row, ok in zip(index.flatten(0, -2), valid.flatten(0, -2)):
            assert (row[ok].diff() > 0).all()
