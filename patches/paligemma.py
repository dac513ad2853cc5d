"""PaliGemma: SigLIP tower without [CLS], linear projector, a prompt that sees itself in both directions."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from hf_compress.patches.base import Architecture, TowerBlock, TowerCall
from hf_compress.tensors.attention import received


class PaliGemma(Architecture):
    """PaliGemma 1 and 2: the model hands ready-made masks to its language model, and its positions
    start at 1. Surrogate of the [CLS] row: attention received in the last block."""

    model_types: ClassVar[tuple[str, ...]] = ("paligemma",)
    gives = frozenset({"visual", "cls", "tower", "columns"})
    tower_signals = "attention received in the last block"

    def tower(self, model: nn.Module) -> nn.Module:
        return model.base_model.vision_tower

    def projector(self, model: nn.Module) -> nn.Module:
        return model.base_model.multi_modal_projector

    def _blocks(self, model: nn.Module) -> nn.ModuleList:
        return self.tower(model).encoder.layers

    def tokens_per_image(self, model: nn.Module) -> int:
        vision = model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def attention_blocks(self, model: nn.Module) -> list[int]:
        return list(range(len(self._blocks(model))))

    def attention_module(self, model: nn.Module, block: int) -> nn.Module:
        return self._blocks(model)[block].self_attn

    def tower_blocks(self, model: nn.Module) -> list[TowerBlock]:
        return [TowerBlock(b, b.self_attn, b.layer_norm2, b.mlp) for b in self._blocks(model)]

    def cls_rows(self, model: nn.Module, call: TowerCall, block: int) -> list[Tensor]:
        ((query, key, scaling),) = call.attention[block]
        return list(received(query, key, scaling).mT)

    def keys(self, model: nn.Module, call: TowerCall, block: int) -> list[Tensor]:
        ((_, key, _),) = call.attention[block]
        return list(key.mean(1))
