"""Arguments of a call that change what the tower gives: as if the config said so, or refused."""

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from tests import tiny
from tests.architectures.helpers import tower_rows
from tests.invariants.reference import VLMS, bare, close, shared

LAYERED = [n for n in VLMS if hasattr(bare(n).config, "vision_feature_layer")]
RESCALED = ["llava", "paligemma"]  # images of any shape, by interpolated places


def batch_of(name, kind="inputs"):
    return getattr(tiny, kind)(name, bare(name))


def run(model, batch, **kwargs):
    with torch.no_grad():
        logits = model(**batch, **kwargs)[0]
    return logits, model.compression.last.visual_kept


def tensors(out):
    return [x for x in tree_leaves(out) if torch.is_tensor(x)]


# -- the layer that the features come from -----------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["fastervlm", "visionzip", "tome"])
@pytest.mark.parametrize("name", LAYERED)
def test_feature_layer_of_the_call(name, method):
    """A model whose config names another layer gives the same when the call names it; both ways."""
    model, other = shared(name), tiny.build(name)
    here = model.config.vision_feature_layer
    there = other.config.vision_feature_layer = -1 if here != -1 else -2
    batch = batch_of(name)
    with model.compressed(method, 0.5), other.compressed(method, 0.5):
        (x, kept), (y, expected) = run(model, batch, vision_feature_layer=there), run(other, batch)
        assert kept == expected and torch.equal(x, y)
        (x, kept), (y, expected) = run(model, batch), run(other, batch, vision_feature_layer=here)
        assert kept == expected and torch.equal(x, y)


def test_feature_layers_of_the_call_may_be_a_list():
    """Of one layer, and written from either end."""
    model, batch = shared("llava"), batch_of("llava")
    with model.compressed("visionzip", 0.5):
        expected, kept = run(model, batch, vision_feature_layer=-1)
        for layer in ([-1], [4], 4):
            logits, same = run(model, batch, vision_feature_layer=layer)
            assert kept == same and torch.equal(logits, expected)


@pytest.mark.parametrize("name", [n for n in tiny.VIDEO if n in LAYERED])
def test_feature_layer_of_videos(name):
    model, other, batch = shared(name), tiny.build(name), batch_of(name, "video")
    there = other.config.vision_feature_layer = -1 if model.config.vision_feature_layer != -1 else -2
    with model.compressed("fastervlm", 0.5), other.compressed("fastervlm", 0.5):
        (x, kept), (y, expected) = run(model, batch, vision_feature_layer=there), run(other, batch)
    assert kept == expected and torch.equal(x, y)


def test_a_layer_with_too_few_blocks_before_it_is_refused():
    model, batch = shared("llava"), batch_of("llava")
    with model.compressed("fastervlm", 0.5), pytest.raises(ValueError, match=r"reads 1 blocks .* has 0"):
        run(model, batch, vision_feature_layer=0)
    with model.compressed("uniform", 0.5), pytest.raises(ValueError, match=r"vision_feature_layer=.*4 blocks"):
        run(model, batch, vision_feature_layer=9)
    with model.compressed("uniform", 0.5):  # a refused call leaves nothing behind
        with pytest.raises(ValueError):
            run(model, batch, vision_feature_layer=9)
        run(model, batch)


def test_the_tower_by_itself_is_not_touched():
    """Whoever calls it for something else gets every token as the bare tower gives it."""
    model, batch = shared("llava"), batch_of("llava")
    with torch.no_grad():
        expected = bare("llava").base_model.vision_tower(batch["pixel_values"]).last_hidden_state
        with model.compressed("tome", 0.5, where="tower"):
            given = model.base_model.vision_tower(batch["pixel_values"]).last_hidden_state
    close(given, expected)


# -- other settings ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "video_llava"])
def test_a_strategy_that_the_adapter_does_not_read_is_refused(name):
    model, batch = shared(name), tiny.encoder_inputs(batch_of(name))
    batch["pixel_values"] = batch.pop("pixel_values_images", batch.get("pixel_values"))
    other = {"default": "full", "full": "default"}[model.config.vision_feature_select_strategy]
    with model.compressed("uniform", 0.5), pytest.raises(ValueError, match=f"strategy='{other}' is not known"):
        model.get_image_features(**batch, vision_feature_select_strategy=other)


@pytest.mark.parametrize("name", RESCALED)
def test_images_of_another_shape(name):
    """Grids are those of the pixels: halving both sides of 9 x 6 patches is averaging blocks, not a row of 54."""
    model = shared(name)
    g = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 6 * tiny.PATCH, 9 * tiny.PATCH, generator=g)
    with torch.no_grad(), model.compressed("visionzip", 0.5):
        model.get_image_features(pixel_values=image, interpolate_pos_encoding=True)
        encoded = model.compression.context.state.encoded["image"]
        assert [unit.grid for unit in encoded.units] == [(6, 9)]
        (rows,) = tower_rows(model, encoded.call, encoded.call.blocks[-1])
        assert len(rows) == len(encoded.images[0]) == 54


@pytest.mark.parametrize("name", ["llava_next_video", "video_llava"])
def test_frames_of_another_size_are_refused(name):
    model, batch = shared(name), tiny.encoder_inputs(batch_of(name, "video"), "video")
    videos = batch["pixel_values_videos"]
    large = torch.zeros(*videos.shape[:-2], 2 * tiny.LLAVA_SIDE, 2 * tiny.LLAVA_SIDE)
    with model.compressed("uniform", 0.5), pytest.raises(ValueError, match="pixel_values_videos of 48 x 48 pixels"):
        model.base_model.get_video_features(pixel_values_videos=large, interpolate_pos_encoding=True)


def test_resized_images_do_not_read_what_was_computed_for_the_old_ones():
    model, batch = shared("qwen2_vl"), batch_of("qwen2_vl")
    thw, joined = batch["image_grid_thw"], tiny.QWEN_MERGE
    ready = dict(image_cu_seqlens=get_vision_cu_seqlens(thw), image_position_ids=get_vision_position_ids(thw, joined))
    with model.compressed("downsample", 0.5):
        expected, kept = run(model, batch)
        logits, same = run(model, batch, **ready)
    assert same == kept and torch.equal(logits, expected)


# -- what comes back ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", VLMS)
def test_features_as_a_tuple(name):
    """`return_dict=False`, by argument or config, gives what the bare model gives."""
    model, batch = shared(name), tiny.encoder_inputs(batch_of(name))
    if "pixel_values_images" in batch:
        batch["pixel_values"] = batch.pop("pixel_values_images")
    with torch.no_grad():
        expected = bare(name).get_image_features(**batch, return_dict=False)
        with model.compressed("random", 0):
            given = model.get_image_features(**batch, return_dict=False)
            named = model.get_image_features(**batch, return_dict=True)
            model.base_model.config.return_dict = False
            try:
                by_config = model.base_model.get_image_features(**batch)
            finally:
                model.base_model.config.return_dict = True
    assert type(given) is type(by_config) is type(expected) is tuple
    assert len(given) == len(by_config) == len(expected) == len(named.to_tuple())
    for x, y in zip(tensors(given), tensors(expected), strict=True):
        close(x, y)


@pytest.mark.parametrize("flags", [dict(return_dict=False), dict(output_hidden_states=True)], ids=["tuple", "states"])
@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "internvl", "gemma3"])
def test_flags_change_no_decision(name, flags):
    with shared(name).compressed("visionzip", 0.5) as model:
        expected, kept = run(model, batch_of(name))
        logits, same = run(model, batch_of(name), **flags)
    assert same == kept and torch.equal(logits, expected)
