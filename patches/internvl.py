"""InternVL in its transformers form: InternViT with [CLS], pixel shuffle, one resolution per tile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.patches.base import AS_CONFIGURED, Architecture, TowerCall


class InternVL(Architecture):
    """The pixel shuffle joins a square of patches into one token; the tiles of a picture share its budget; frames
    of a video come as pictures too. Signals of a token: mean over its patches."""

    model_types = ("internvl",)
    gives = frozenset({"visual", "cls", "pixels", "columns"})
    has_cls = True
    tiles = True
    tower_signals = "[CLS] row of the feature block, mean over the patches of a token"

    def same_picture(self, before: list[int], gap: int) -> bool:
        return not gap  # <img> and </img> stand around all tiles of a picture

    def tower(self, model: nn.Module) -> nn.Module:
        return model.base_model.vision_tower

    def projector(self, model: nn.Module) -> nn.Module:
        return model.base_model.multi_modal_projector

    def tokens_per_image(self, model: nn.Module) -> int:
        return len(self.patches(model, math.prod(self.tower(model).embeddings.patch_embeddings.patch_shape)))

    def attention_blocks(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> list[int]:
        return self.feature_blocks(model, inputs, len(self.tower(model).encoder.layer))

    def attention_module(self, model: nn.Module, block: int) -> nn.Module:
        return self.tower(model).encoder.layer[block].attention

    def hidden_module(self, model: nn.Module, block: int) -> nn.Module:
        return self.tower(model).encoder.layer[block]

    def patches(self, model: nn.Module, count: int) -> Tensor:
        """(N, group) which of the `count` patches of a tile each of its tokens joins, by the model's own shuffle."""
        base: Any = model.base_model
        side = math.isqrt(count)
        index = torch.arange(count).view(1, side, side, 1)
        return base.pixel_shuffle(index, scale_factor=base.config.downsample_ratio).flatten(1, 2)[0]

    def per_token(self, model: nn.Module, call: TowerCall, x: Tensor) -> Tensor:
        return x[:, self.patches(model, x.shape[1]).to(x.device)]

    def features(self, model: nn.Module, call: TowerCall) -> Tensor:
        assert call.features is not None
        return call.features  # the shuffle stands before the projector
