"""Checkpoints of a known type that are built in an unknown way, and inputs that an adapter does not take."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

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
        model.compress("fastervlm", ratio=0.5)
    assert model.compression is None


def test_videos_for_an_adapter_of_images():
    """Named before they are taken for images."""
    model = tiny.build("llava")
    batch = tiny.inputs("llava", model)
    with model.compressed("uniform", ratio=0.5), pytest.raises(ValueError, match=r"pixel_values_videos.*Llava.*images"):
        model(**batch, pixel_values_videos=torch.zeros(1))
