"""InternVL: [CLS] behind a pixel shuffle, tiles as images of their own, a tensor of features."""

import functools

import pytest
import torch

import hf_compress
from tests import tiny
from tests.architectures.helpers import TOLERANCE, counts, encode, greedy, hooks, next_turn, tower_keys, tower_rows
from tests.tiny import BOS, GREEDY, IMG

NAME, TOKENS = "internvl", tiny.POOLED_TOKENS
VISION_METHODS = {
    "uniform": {},
    "fastervlm": {},
    "vtc_cls": {"layers": 2},
    "visionzip": {},
    "divprune": {},
    "tome": {},
    "avgpool": {},
}


@functools.cache
def bare():
    """Never compressed."""
    return tiny.build(NAME)


@functools.cache
def shared():
    """Compressed only inside `with`."""
    return tiny.build(NAME)


def inputs():
    return tiny.inputs(NAME, bare())


@pytest.mark.parametrize("ratio", [0, 0.5])
def test_second_turn_with_new_images(ratio):
    """One more image per sample: `generate` takes the pixels of the new rows."""
    batch = inputs()
    new = torch.randn(2, *batch["pixel_values"].shape[1:], generator=torch.Generator().manual_seed(7))
    old = batch["pixel_values"]
    every = torch.stack([old[0], old[1], new[0], old[2], new[1]])
    with shared().compressed("fastervlm", ratio=ratio) as model:
        _, _, out = greedy(model, batch)
        turn = next_turn(batch, out, [17, *[IMG] * TOKENS, 18, 19])
        _, scratch, _ = greedy(model, turn, pixel_values=every)
        whole = counts(model)
        _, _, out = greedy(model, batch)
        _, logits, _ = greedy(model, turn, pixel_values=new, past_key_values=out.past_key_values)
        assert counts(model) == [sample[-1:] for sample in whole]
    torch.testing.assert_close(logits, scratch, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("count", [2, 4])
def test_wrong_number_of_images(count):
    model, batch = shared(), inputs()
    pixels = batch["pixel_values"]
    wrong = dict(batch, pixel_values=torch.cat([pixels, pixels])[:count])
    before, reference = hooks(model), bare()(**batch).logits
    with pytest.raises(ValueError, match="do not match"), model.compressed("fastervlm", ratio=0.5):
        model.generate(**wrong, **GREEDY)
    assert hooks(model) == before
    with model.compressed("fastervlm", ratio=0.5):
        good = model.generate(**batch, **GREEDY)
        with pytest.raises(ValueError, match="do not match"):
            model(**wrong)
        assert torch.equal(model.generate(**batch, **GREEDY), good)
    assert hooks(model) == before and torch.equal(model(**batch).logits, reference)


def test_the_tower_cannot_be_entered():
    assert NAME in hf_compress.architectures()
    with pytest.raises(ValueError, match="cannot be entered"):
        shared().compress("tome", ratio=0.5, where="tower")
    with shared().compressed("fastervlm", keep=10):  # more than a tile has: a picture may have several
        assert shared().compression is not None


# -- what the adapter says about the tower -----------------------------------------------------------------------------
def test_patches_of_a_token_follow_the_shuffle():
    """Token (i, j) joins the square of patches at (2i, 2j): numbers through the model's own functions."""
    model = bare()
    with torch.no_grad(), shared().compressed("visionzip", ratio=0.5):
        adapter = shared().compression.context.adapter
        index = adapter.patches(model, 36)
    for token, group in enumerate(index.tolist()):
        y, x = 2 * (token // 3), 2 * (token % 3)
        assert sorted(group) == [6 * y + x, 6 * y + x + 1, 6 * y + x + 6, 6 * y + x + 7]
    # the same on features: channel blocks of the shuffled tensor are the patches in the order of `index`
    features = torch.randn(2, 36, 5)
    shuffled = model.model.pixel_shuffle(features.view(2, 6, 6, 5), scale_factor=0.5).reshape(2, 9, 20)
    assert torch.equal(features[:, index].flatten(2), shuffled)


def test_a_token_answers_to_its_patches():
    """Only the first block mixes patches through [CLS]: without attention a token depends on its four patches alone."""
    model = tiny.build(NAME)
    for layer in model.model.vision_tower.encoder.layer:
        layer.lambda_1.data.zero_()
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(4))
    with torch.no_grad(), model.compressed("uniform", ratio=0.5):
        index = model.compression.context.adapter.patches(model, 36)
        before = encode(model, {"pixel_values": pixels})["image"].pooler_output[0]
        for patch in (0, 8, 21, 35):
            y, x = 4 * (patch // 6), 4 * (patch % 6)
            other = pixels.clone()
            other[..., y : y + 4, x : x + 4] += 1
            after = encode(model, {"pixel_values": other})["image"].pooler_output[0]
            (moved,) = (after != before).any(1).nonzero()[:, 0].tolist()
            assert patch in index[moved].tolist()


def test_features_and_rows():
    """Projecting features gives the tokens bit for bit; [CLS] rows are means of the softmax row over four patches."""
    model, batch = shared(), inputs()
    with torch.no_grad(), model.compressed("vtc_cls", ratio=0.5, layers=2):
        adapter = model.compression.context.adapter
        encode(model, batch)
        encoded = model.compression.context.state.encoded["image"]
        call = encoded.call
        for image, features in zip(encoded.images, adapter.features(model, call)):
            torch.testing.assert_close(adapter.project(model, features), image, rtol=0, atol=2e-6)
        together = adapter.projector(model)(adapter.features(model, call))
        assert torch.equal(together, torch.stack(list(encoded.images)))
        blocks = adapter.attention_blocks(model)
        assert blocks == list(range(len(model.model.vision_tower.encoder.layer)))
        rows, keys = tower_rows(model, call, blocks[-1]), tower_keys(model, call, blocks[-1])
    eager = tiny.build(NAME, attn="eager")
    notes = []
    attention = eager.model.vision_tower.encoder.layer[-1].attention
    attention.register_forward_hook(lambda module, args, out: notes.append((args[0], out[1])))
    with torch.no_grad():
        encode(eager, batch)
    ((hidden, weights),) = notes
    for tile in range(3):
        by_hand = weights[tile, :, 0, 1:].view(-1, 3, 2, 3, 2).mean((2, 4)).flatten(1)
        torch.testing.assert_close(rows[tile], by_hand.T, rtol=0, atol=1e-6)
        k = attention.k_norm(attention.k_proj(hidden[tile, 1:])).view(36, -1, attention.head_dim).mean(1)
        torch.testing.assert_close(keys[tile], k.view(3, 2, 3, 2, -1).mean((1, 3)).flatten(0, 1), rtol=0, atol=1e-5)


def test_earlier_feature_layer():
    """`vision_feature_layer=-2` ends at the last but one block."""
    model = tiny.build(NAME)
    model.config.vision_feature_layer = -2
    batch = tiny.batch(NAME, model, [[BOS, IMG, 5], [BOS, 7, IMG]])
    depth = len(model.model.vision_tower.encoder.layer)
    with model.compressed("fastervlm", ratio=0.5):
        assert model.compression.context.adapter.attention_blocks(model) == list(range(depth - 1))
        greedy(model, batch)
        assert counts(model) == [[4], [4]]
