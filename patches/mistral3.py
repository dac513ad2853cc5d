"""Mistral Small 3 and LightOnOCR: Pixtral tower without [CLS], images of any size packed into one row, patch merger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.patches.base import AS_CONFIGURED, Architecture, Grid, TowerCall, Unit
from hf_compress.tensors.attention import received


class Mistral3(Architecture):
    """The projector joins a square of patches into one token. Surrogate of the [CLS] row: attention received inside the
    image, mean over the patches of a token."""

    model_types = ("mistral3", "lighton_ocr")
    gives = frozenset({"visual", "cls", "columns"})
    tower_signals = "attention received in the feature block"

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

    def _per_token(self, model: nn.Module, call: TowerCall, rows: Tensor) -> list[Tensor]:
        """(P, ...) rows of all patches, image after image, to (N, m * m, ...) per image."""
        m = model.config.spatial_merge_size
        grids = self._grids(model, call.inputs["image_sizes"])
        parts = rows.split([h * w * m * m for h, w in grids])
        return [
            x.view(h, m, w, m, *x.shape[1:]).transpose(1, 2).flatten(2, 3).flatten(0, 1)
            for x, (h, w) in zip(parts, grids)
        ]

    def pixels(self, model: nn.Module, call: TowerCall) -> list[Tensor]:
        sizes = call.tower["image_sizes"]
        return [x[:, : int(h), : int(w)] for x, (h, w) in zip(call.tower["pixel_values"], sizes)]

    def features(self, model: nn.Module, call: TowerCall) -> list[Tensor]:
        assert call.features is not None
        return [x.flatten(1) for x in self._per_token(model, call, call.features)]

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        m, side = model.config.spatial_merge_size, self.tower(model).patch_size * model.config.spatial_merge_size
        patches = features.reshape(features.shape[0] * m * m, -1)
        return self.projector(model)(patches, [(side, side)] * len(features))  # each an image of one token

    def cls_rows(self, model: nn.Module, call: TowerCall, block: int) -> list[Tensor]:
        ((query, key, scaling),) = call.attention[block]
        m = model.config.spatial_merge_size
        sizes = [h * w * m * m for h, w in self._grids(model, call.inputs["image_sizes"])]
        rows = [received(q, k, scaling)[0].mT for q, k in zip(query.split(sizes, 2), key.split(sizes, 2))]
        return [x.mean(1) for x in self._per_token(model, call, torch.cat(rows))]

    def keys(self, model: nn.Module, call: TowerCall, block: int) -> list[Tensor]:
        ((_, key, _),) = call.attention[block]
        return [x.mean(1) for x in self._per_token(model, call, key[0].mean(0))]
