"""Gemma 3: SigLIP tower without [CLS], 4 x 4 patches averaged to one token, sliding and full layers in turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_compress.patches.base import AS_CONFIGURED, Crops, TowerBlock, TowerCall
from hf_compress.patches.paligemma import PaliGemma


class Gemma3(PaliGemma):
    """`Gemma3ForConditionalGeneration`: tokens of an image see each other in both directions, so the model hands one
    ready-made mask per kind of layer to its language model. Signals and features of a token: mean over its square of
    patches, as the projector averages them before its norm. Pan-and-scan crops are images of their own."""

    model_types = ("gemma3",)
    gives = frozenset({"visual", "cls", "places", "pixels", "columns"})
    tower_signals = "attention received in the last block, mean over the patches of a token"

    def tokens_per_image(self, model: nn.Module) -> int:
        return self._projector(model).tokens_per_side ** 2

    def tower_blocks(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> list[TowerBlock]:
        return []

    def _projector(self, model: nn.Module) -> Any:
        return self.projector(model)

    def per_token(self, model: nn.Module, call: TowerCall, x: Tensor) -> Tensor:
        projector = self._projector(model)
        side, square = projector.tokens_per_side, projector.kernel_size
        return x.unflatten(1, (side, square, side, square)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def features(self, model: nn.Module, call: TowerCall) -> Crops:
        assert call.features is not None
        return self.per_token(model, call, call.features).mean(2)

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        projector = self._projector(model)
        return projector.mm_soft_emb_norm(features) @ projector.mm_input_projection_weight
