"""GLM-4.1V, GLM-4.5V, GLM-4.6V and GLM-OCR: as Qwen2-VL, with a strided convolution before the merger. Images only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_compress.patches.base import AS_CONFIGURED, TowerBlock, TowerCall
from hf_compress.patches.qwen2_vl import Qwen2_VL


class Glm4v(Qwen2_VL):
    """What the merger reads is one row per token already. Frames of videos are written with the placeholder of images,
    so that prompts with videos are refused."""

    model_types = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")
    modalities = ("image",)
    gives = Qwen2_VL.gives - {"video", "tower"}

    def tower_blocks(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> list[TowerBlock]:
        return []

    def features(self, model: nn.Module, call: TowerCall) -> list[Tensor]:
        assert call.features is not None
        joined = self.tower(model).spatial_merge_size ** 2
        return list(call.features.split([n // joined for n in self.packed(model, call)]))

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        return self.projector(model)(features)
