"""Checkpoints of a known type that are built in an unknown way, and inputs that an adapter does not take."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

import hf_compress
from tests import tiny

SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=24)
TOWERS = [SiglipVisionConfig(**SIZES, patch_size=4, vision_use_head=False), CLIPVisionConfig(**SIZES, patch_size=4)]


@pytest.mark.parametrize("vision", TOWERS, ids=["siglip", "clip"])
def test_another_tower_is_refused(vision):
    """A tower without [CLS] in front would be read one token off."""
    text = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlavaConfig(vision_config=vision, text_config=text, vision_feature_select_strategy="full")
    model = LlavaForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"LlavaForConditionalGeneration.*select_strategy='full'.*clip_vision_model"):
        hf_compress.compress(model, "fastervlm", ratio=0.5)
    assert model.compression is None


def test_videos_for_an_adapter_of_images():
    """Named before they are taken for images."""
    model = tiny.build("llava")
    batch = tiny.inputs("llava", model)
    with model.compressed("uniform", ratio=0.5), pytest.raises(ValueError, match=r"pixel_values_videos.*Llava.*images"):
        model(**batch, pixel_values_videos=torch.zeros(1))


def test_inputs_of_mixed_devices_and_dtypes():
    """Named with the model and the input; the model works on afterwards."""
    model = tiny.build("llava")
    batch = tiny.inputs("llava", model)
    with model.compressed("uniform", ratio=0.5):
        with pytest.raises(ValueError, match=r"LlavaForConditionalGeneration.*attention_mask.*meta"):
            model(**batch | {"attention_mask": batch["attention_mask"].to("meta")})
        with pytest.raises(ValueError, match=r"LlavaForConditionalGeneration: pixel_values has dtype torch.int64"):
            model(**batch | {"pixel_values": batch["pixel_values"].long()})
        assert model(**batch).logits.isfinite().all()


@pytest.mark.parametrize("method", ["fastervlm", "visionzip", "tome"])
def test_a_tower_of_another_dtype_is_served(method):
    """transformers brings the features to the dtype of the language model, and so does the compression."""
    model = tiny.build("llava")
    batch = tiny.inputs("llava", model)
    model.model.vision_tower.bfloat16()
    model.model.multi_modal_projector.bfloat16()
    with model.compressed(method, ratio=0.5):
        assert model(**batch).logits.dtype == torch.float32
        assert model.compression.last.visual_left == [[18, 18], [18]]
