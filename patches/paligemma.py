"""PaliGemma: SigLIP tower without [CLS], linear projector, a prompt that sees itself in both directions."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from hf_compress.patches.encoder import EncoderTower


class PaliGemma(EncoderTower):
    """PaliGemma 1 and 2: the model hands ready-made masks to its language model, and its positions
    start at 1."""

    model_types: ClassVar[tuple[str, ...]] = ("paligemma",)
    gives = frozenset({"visual", "cls", "places", "tower", "pixels", "columns"})
    tower_signals = "attention received in the last block"

    def tokens_per_image(self, model: nn.Module) -> int:
        vision = model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2
