"""Mistral Small 3 and LightOnOCR: Pixtral tower without [CLS], images of any size packed into one row, patch merger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.patches.base import AS_CONFIGURED, Architecture, Grid, TowerCall, Unit


class Mistral3(Architecture):
    """The projector joins a square of patches into one token. Signals of a token: mean over its patches."""

    model_types = ("mistral3", "lighton_ocr")
    gives = frozenset({"visual", "cls", "places", "columns"})
    tower_signals = "attention received in the feature block, mean over the patches of a token"

    def tower(self, model: nn.Module) -> nn.Module:
        base = model.base_model
        return base.vision_tower if hasattr(base, "vision_tower") else base.vision_encoder

    def projector(self, model: nn.Module) -> nn.Module:
        base = model.base_model
        return base.multi_modal_projector if hasattr(base, "multi_modal_projector") else base.vision_projection

    def attention_blocks(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> list[int]:
        return self.feature_blocks(model, inputs, len(self.tower(model).transformer.layers))

    def attention_module(self, model: nn.Module, block: int) -> nn.Module:
        return self.tower(model).transformer.layers[block].attention

    def hidden_module(self, model: nn.Module, block: int) -> nn.Module:
        return self.tower(model).transformer.layers[block]

    def _grids(self, model: nn.Module, sizes: Any) -> list[Grid]:
        """(h, w) in tokens of every image."""
        side = self.tower(model).patch_size * model.config.spatial_merge_size
        return [(int(h) // side, int(w) // side) for h, w in sizes]

    def units(self, model: nn.Module, modality: str, images: list[Tensor], inputs: dict[str, Any]) -> list[Unit]:
        sizes = inputs.get("image_sizes")
        grids: list[Grid | None] = [None] * len(images)
        if sizes is not None and [h * w for h, w in self._grids(model, sizes)] == [len(x) for x in images]:
            grids = list(self._grids(model, sizes))
        return [Unit(i, grids[i], torch.arange(len(x), device=x.device), i) for i, x in enumerate(images)]

    def packed(self, model: nn.Module, call: TowerCall) -> list[int]:
        m = model.config.spatial_merge_size
        return [h * w * m * m for h, w in self._grids(model, call.inputs["image_sizes"])]

    def per_token(self, model: nn.Module, call: TowerCall, x: Tensor) -> list[Tensor]:
        m, grids = model.config.spatial_merge_size, self._grids(model, call.inputs["image_sizes"])
        parts = zip(x[0].split(self.packed(model, call)), grids)
        return [x.reshape(h, m, w, m, -1).transpose(1, 2).flatten(2, 3).flatten(0, 1) for x, (h, w) in parts]

    def pixels(self, model: nn.Module, call: TowerCall) -> list[Tensor]:
        sizes = call.tower["image_sizes"]
        return [x[:, : int(h), : int(w)] for x, (h, w) in zip(call.tower["pixel_values"], sizes)]

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        m, side = model.config.spatial_merge_size, self.tower(model).patch_size * model.config.spatial_merge_size
        patches = features.reshape(features.shape[0] * m * m, -1)
        return self.projector(model)(patches, [(side, side)] * len(features))  # each an image of one token
