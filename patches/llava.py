"""LLaVA 1.5: CLIP tower with [CLS], MLP projector, one resolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from hf_compress.patches.base import AS_CONFIGURED
from hf_compress.patches.encoder import EncoderTower


class Llava(EncoderTower):
    """`LlavaForConditionalGeneration`; features of one or several tower layers, [CLS] dropped."""

    model_types = ("llava",)
    gives = frozenset({"visual", "cls", "places", "tower", "pixels", "columns"})
    has_cls = True
    tower_signals = "[CLS] row of the feature block"

    towers: ClassVar[frozenset[tuple[str, str]]] = frozenset({("clip_vision_model", "default")})  # and their features

    def check(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> None:
        super().check(model, inputs)
        strategy = self.setting(model, inputs, "vision_feature_select_strategy")
        found = (model.config.vision_config.model_type, strategy)
        if found not in self.towers:
            raise ValueError(
                f"model={type(model).__name__} with vision_config.model_type={found[0]!r} and "
                f"vision_feature_select_strategy={found[1]!r} is not known to the adapter, which reads "
                f"{sorted(self.towers)}; use a checkpoint with such a tower, or add an adapter in patches/"
            )

    def tokens_per_image(self, model: nn.Module) -> int:
        vision = model.config.vision_config
        n = (vision.image_size // vision.patch_size) ** 2
        return n if model.config.vision_feature_select_strategy == "default" else n + 1
