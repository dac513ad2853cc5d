"""Towers in the shape of CLIP and SigLIP: one list of encoder layers, and a projector behind it."""

from __future__ import annotations

from torch import nn

from hf_compress.patches.base import Architecture, Crops, TowerBlock, TowerCall


class EncoderTower(Architecture):
    """`vision_tower.encoder.layers` up to the layer whose hidden states the projector reads; the last by default."""

    def tower(self, model: nn.Module) -> nn.Module:
        return model.base_model.vision_tower

    def projector(self, model: nn.Module) -> nn.Module:
        return model.base_model.multi_modal_projector

    def _blocks(self, model: nn.Module) -> nn.ModuleList:
        return self.tower(model).encoder.layers

    def attention_blocks(self, model: nn.Module) -> list[int]:
        layers = getattr(model.config, "vision_feature_layer", -1)  # indices into hidden states; 0 is the embedding
        depth = len(self._blocks(model))
        return list(
            range(max(i if i >= 0 else depth + 1 + i for i in ([layers] if isinstance(layers, int) else layers)))
        )

    def attention_module(self, model: nn.Module, block: int) -> nn.Module:
        return self._blocks(model)[block].self_attn

    def tower_blocks(self, model: nn.Module) -> list[TowerBlock]:
        blocks = [self._blocks(model)[i] for i in self.attention_blocks(model)]
        return [TowerBlock(b, b.self_attn, b.layer_norm2, b.mlp) for b in blocks]

    def features(self, model: nn.Module, call: TowerCall) -> Crops:
        assert call.features is not None
        return call.features
