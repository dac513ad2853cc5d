"""Gemma 3: SigLIP tower without [CLS], 4 x 4 patches averaged to one token, sliding and full layers in turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_compress.patches.base import AS_CONFIGURED, TowerBlock, TowerCall
from hf_compress.patches.paligemma import PaliGemma
from hf_compress.tensors.attention import received


class Gemma3(PaliGemma):
    """`Gemma3ForConditionalGeneration`: tokens of an image see each other in both directions, so the model hands one
    ready-made mask per kind of layer to its language model. Signals and features of a token: mean over its square of
    patches, as the projector averages them before its norm. Pan-and-scan crops are images of their own."""

    model_types = ("gemma3",)
    gives = frozenset({"visual", "cls", "columns"})
    tower_signals = "attention received in the last block, mean over the patches of a token"

    def tokens_per_image(self, model: nn.Module) -> int:
        return self._projector(model).tokens_per_side ** 2

    def tower_blocks(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> list[TowerBlock]:
        return []

    def _projector(self, model: nn.Module) -> Any:
        return self.projector(model)

    def _per_token(self, model: nn.Module, patches: Tensor) -> list[Tensor]:
        """(n, P, ...) rows of patches to (N, ...) per image."""
        projector = self._projector(model)
        side, square = projector.tokens_per_side, projector.kernel_size
        return list(patches.unflatten(1, (side, square, side, square)).mean((2, 4)).flatten(1, 2))

    def features(self, model: nn.Module, call: TowerCall) -> list[Tensor]:
        assert call.features is not None
        return self._per_token(model, call.features)

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        projector = self._projector(model)
        return projector.mm_soft_emb_norm(features) @ projector.mm_input_projection_weight

    def cls_rows(self, model: nn.Module, call: TowerCall, block: int) -> list[Tensor]:
        ((query, key, scaling),) = call.attention[block]
        return self._per_token(model, received(query, key, scaling).mT)

    def keys(self, model: nn.Module, call: TowerCall, block: int) -> list[Tensor]:
        ((_, key, _),) = call.attention[block]
        return self._per_token(model, key.mean(1))
