"""LLaVA 1.5: CLIP tower with [CLS], MLP projector, one resolution."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from hf_compress.patches.base import Architecture, TowerBlock, TowerCall
from hf_compress.tensors.attention import rows_attention


class Llava(Architecture):
    """`LlavaForConditionalGeneration`; features of one or several tower layers, [CLS] dropped."""

    model_types = ("llava",)
    gives = frozenset({"visual", "cls", "tower", "columns"})
    has_cls = True
    tower_signals = "[CLS] row of the feature block"

    towers: ClassVar[frozenset[tuple[str, str]]] = frozenset({("clip_vision_model", "default")})  # and their features

    def check(self, model: nn.Module) -> None:
        config = model.config
        found = (config.vision_config.model_type, config.vision_feature_select_strategy)
        if found not in self.towers:
            raise ValueError(
                f"model={type(model).__name__} with vision_config.model_type={found[0]!r} and "
                f"vision_feature_select_strategy={found[1]!r} is not known to the adapter, which reads "
                f"{sorted(self.towers)}; use a checkpoint with such a tower, or add an adapter in patches/"
            )

    def tower(self, model: nn.Module) -> nn.Module:
        return model.base_model.vision_tower

    def projector(self, model: nn.Module) -> nn.Module:
        return model.base_model.multi_modal_projector

    def _blocks(self, model: nn.Module) -> nn.ModuleList:
        return self.tower(model).encoder.layers

    def _feature_block(self, model: nn.Module) -> int:
        layers = model.config.vision_feature_layer  # an index into hidden states; 0 is the embedding
        depth = len(self._blocks(model))
        return max(i if i >= 0 else depth + 1 + i for i in ([layers] if isinstance(layers, int) else layers)) - 1

    def tokens_per_image(self, model: nn.Module) -> int:
        vision = model.config.vision_config
        n = (vision.image_size // vision.patch_size) ** 2
        return n if model.config.vision_feature_select_strategy == "default" else n + 1

    def attention_blocks(self, model: nn.Module) -> list[int]:
        return list(range(self._feature_block(model) + 1))

    def attention_module(self, model: nn.Module, block: int) -> nn.Module:
        return self._blocks(model)[block].self_attn

    def tower_blocks(self, model: nn.Module) -> list[TowerBlock]:
        blocks = list(self._blocks(model))[: self._feature_block(model) + 1]
        return [TowerBlock(b, b.self_attn, b.layer_norm2, b.mlp) for b in blocks]

    def cls_rows(self, model: nn.Module, call: TowerCall, block: int) -> list[Tensor]:
        ((query, key, scaling),) = call.attention[block]
        return list(rows_attention(query[:, :, :1], key, scaling, None)[:, :, 0, 1:].mT)

    def keys(self, model: nn.Module, call: TowerCall, block: int) -> list[Tensor]:
        ((_, key, _),) = call.attention[block]
        return list(key[:, :, 1:].mean(1))
