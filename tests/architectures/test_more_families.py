"""Families that share an adapter or are one small file: the same checks on each."""

import functools

import pytest
import torch

import hf_compress
from tests import tiny
from tests.architectures import more_tiny
from tests.architectures.shortened import (
    TOLERANCE,
    counts,
    encode,
    greedy,
    hooks,
    next_turn,
    short_logits,
    visual_inputs,
)
from tests.tiny import VID

# Logits of some of these families are eight times larger than those of the models in tests/tiny.py.
CLOSE = dict(rtol=1e-5, atol=2 * TOLERANCE)

names = pytest.mark.parametrize("name", more_tiny.NAMES)


@functools.cache
def bare(name):
    """Never compressed."""
    return more_tiny.build(name)


@functools.cache
def model_of(name):
    """Compressed only inside `with`."""
    return more_tiny.build(name)


def sizes(name):
    """Tokens of the images per sample."""
    lengths = [len(x) for x in encode(bare(name), more_tiny.inputs(name))["image"].pooler_output]
    return [lengths[:2], lengths[2:]]


@names
@pytest.mark.parametrize("method, knobs", [("visionzip", {}), ("fastv", {"layer": 2}), ("snapkv", {"window": 4})])
def test_ratio_zero_is_the_bare_model(name, method, knobs):
    batch = more_tiny.inputs(name)
    tokens, logits, _ = greedy(bare(name), batch)
    with model_of(name).compressed(method, ratio=0, **knobs) as model:
        got, same, _ = greedy(model, batch)
    assert torch.equal(got, tokens) and torch.equal(same, logits)


@names
@pytest.mark.parametrize("method", ["uniform", "fastervlm"])
def test_equals_embeddings_shortened_by_hand(name, method):
    batch = more_tiny.inputs(name)
    with model_of(name).compressed(method, ratio=0.5) as model:
        tokens, logits, _ = greedy(model, batch)
        kept = model.compression.last.visual_kept
    for row in range(2):
        short = short_logits(bare(name), more_tiny.single(batch, row, name), tokens[row], kept[row])
        torch.testing.assert_close(logits[row], short, **CLOSE)


@names
@pytest.mark.parametrize(
    "method, knobs",
    [
        ("uniform", {}),
        ("fastervlm", {}),
        ("vtc_cls", {"layers": 2}),
        ("visionzip", {"contextual": 0.3}),
        ("divprune", {}),
        ("tome", {}),
        ("downsample", {}),
        ("fastv", {"layer": 2, "ratio": 0.4}),
        ("pyramiddrop", {"ratio": 0.4}),
        ("snapkv", {"window": 4}),
    ],
)
def test_methods(name, method, knobs):
    batch, stage = more_tiny.inputs(name), hf_compress.methods()[method].stage
    model_of(name)(**batch)  # transformers sets up its own recording at the first forward
    before = hooks(model_of(name))
    with model_of(name).compressed(method, **({"ratio": 0.5} | knobs)) as model:
        together, _, _ = greedy(model, batch)
        got = counts(model)
        for row in range(2):
            alone, _, _ = greedy(model, more_tiny.single(batch, row, name))
            assert torch.equal(alone[0], together[row])
    assert hooks(model_of(name)) == before
    if stage == "vision":
        want = [[round(n / 2) for n in sample] for sample in sizes(name)]
        if method == "downsample":
            assert all(0 < g <= w for a, b in zip(got, want) for g, w in zip(a, b))
        else:
            assert got == want


@names
def test_projecting_features_gives_the_tokens(name):
    with torch.no_grad(), model_of(name).compressed("visionzip", ratio=0.5) as model:
        encode(model, more_tiny.inputs(name))
        encoded, adapter = model.compression.state.encoded["image"], model.compression.adapter
        block = adapter.attention_blocks(model)[-1]
        for unit in encoded.units:
            x = unit.read(adapter.features(model, encoded.call))
            tokens = encoded.images[unit.image][unit.rows]
            torch.testing.assert_close(adapter.project(model, x), tokens, rtol=0, atol=5e-6)
            rows = unit.read(adapter.cls_rows(model, encoded.call, block))
            group = 4  # patches per token; every patch of an image is counted once
            torch.testing.assert_close(rows.sum(0) * group, torch.ones(rows.shape[1]))
            assert len(unit.read(adapter.keys(model, encoded.call, block))) == len(rows) == unit.grid[0] * unit.grid[1]


@names
def test_second_turn_on_the_returned_cache(name):
    batch = more_tiny.inputs(name)
    with model_of(name).compressed("fastervlm", ratio=0.5) as model:
        _, _, out = greedy(model, batch)
        turn = next_turn(batch, out, [17, 18, 19])
        tokens, logits, _ = greedy(model, turn, past_key_values=out.past_key_values)
        again, scratch, _ = greedy(model, turn | visual_inputs(batch))
    assert torch.equal(tokens, again)
    torch.testing.assert_close(logits, scratch, **CLOSE)


def test_glm_videos_are_refused():
    """They use the placeholder of images, and nothing tells the two apart."""
    model = model_of("glm4v")
    batch = more_tiny.inputs("glm4v")
    video = {k: v for k, v in batch.items() if k not in ("pixel_values", "image_grid_thw")}
    video |= dict(pixel_values_videos=batch["pixel_values"], video_grid_thw=batch["image_grid_thw"])
    video["mm_token_type_ids"] = 2 * video["mm_token_type_ids"]
    with model.compressed("uniform", ratio=0.5), pytest.raises(ValueError, match="compresses images only"):
        model(**video)


def test_omni_videos():
    batch = tiny.both("qwen2_5_vl", bare("qwen2_5_omni_thinker"))
    batch = {k: v for k, v in batch.items() if k not in ("mm_token_type_ids", "second_per_grid_ts")}
    batch["video_second_per_grid"] = torch.ones(len(batch["video_grid_thw"]))
    with model_of("qwen2_5_omni_thinker").compressed("fastervlm", ratio=0) as model:
        _, logits, _ = greedy(model, batch)
    assert torch.equal(greedy(bare("qwen2_5_omni_thinker"), batch)[1], logits) and (batch["input_ids"] == VID).any()
    with model_of("qwen2_5_omni_thinker").compressed("fastervlm", ratio=0.5) as model:
        greedy(model, batch)
        assert counts(model) == [[8, 8], [6]]
