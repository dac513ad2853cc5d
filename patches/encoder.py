"""Towers in the shape of CLIP and SigLIP: one list of encoder layers, and a projector behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_compress.patches.base import AS_CONFIGURED, Architecture, Grid, TowerBlock


class EncoderLayers(Architecture):
    """`vision_tower.encoder.layers` up to the layer whose hidden states the projector reads; the last by default."""

    def tower(self, model: nn.Module) -> nn.Module:
        return model.base_model.vision_tower

    def projector(self, model: nn.Module) -> nn.Module:
        return model.base_model.multi_modal_projector

    def _blocks(self, model: nn.Module) -> nn.ModuleList:
        return self.tower(model).encoder.layers

    def attention_blocks(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> list[int]:
        return self.feature_blocks(model, inputs, len(self._blocks(model)))

    def attention_module(self, model: nn.Module, block: int) -> nn.Module:
        return self._blocks(model)[block].self_attn

    def hidden_module(self, model: nn.Module, block: int) -> nn.Module:
        return self._blocks(model)[block]


class EncoderTower(EncoderLayers):
    """The same with images of one size, every patch a row of its own: such towers can be entered."""

    def tower_blocks(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> list[TowerBlock]:
        blocks = [self._blocks(model)[i] for i in self.attention_blocks(model, inputs)]
        return [TowerBlock(b, b.self_attn, b.layer_norm2, b.mlp) for b in blocks]

    def grid(self, model: nn.Module, tokens: int, inputs: Mapping[str, Any]) -> Grid | None:
        """That of the patches where each is a token (`interpolate_pos_encoding` lets images be of any shape)."""
        pixels, patch = inputs.get("pixel_values"), model.config.vision_config.patch_size
        if torch.is_tensor(pixels):
            h, w = (n // patch for n in pixels.shape[-2:])
            if h * w == tokens:
                return h, w
        return super().grid(model, tokens, inputs)

    def check_side(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Raises ValueError where images or frames are not as large as the checkpoint was made for."""
        side = model.config.vision_config.image_size
        for name, pixels in inputs.items():
            if name.startswith("pixel_values") and torch.is_tensor(pixels) and {*pixels.shape[-2:]} != {side}:
                h, w = pixels.shape[-2:]
                raise ValueError(
                    f"{name} of {h} x {w} pixels: on {type(model).__name__} crops and frames of {side} x {side} can be "
                    "compressed; pass what the model's processor gives, without interpolate_pos_encoding"
                )
