"""Idefics3 and SmolVLM: SigLIP tower without [CLS], pixel shuffle, features of all images of a sample in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.patches.base import AS_CONFIGURED, TowerBlock, TowerCall
from hf_compress.patches.paligemma import PaliGemma


class Idefics3(PaliGemma):
    """The pixel shuffle joins a square of patches into one token; the tiles of a picture, each with placeholders of
    its own, share its budget; frames of a video come as pictures too. Images that only fill up the batch never
    reach the tower. Patches that are padding attend to nothing and are not attended to."""

    model_types = ("idefics3", "smolvlm")
    gives = frozenset({"visual", "cls", "pixels", "columns"})
    tiles = True
    tower_signals = "attention received in the last block, mean over the patches of a token"

    def same_picture(self, before: list[int], gap: int) -> bool:
        """A token that opens an image stands two before its placeholders; after the last tile it closes the picture, so
        that two of them stand between pictures."""
        return 2 <= gap <= 4 and before[-gap:].count(before[-2]) == 1

    def tower(self, model: nn.Module) -> nn.Module:
        return model.base_model.vision_model

    def projector(self, model: nn.Module) -> nn.Module:
        return model.base_model.connector

    def _connector(self, model: nn.Module) -> Any:
        return self.projector(model)

    def tokens_per_image(self, model: nn.Module) -> int:
        return super().tokens_per_image(model) // self._connector(model).scale_factor ** 2

    def tower_blocks(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> list[TowerBlock]:
        return []

    def images(self, model: nn.Module, modality: str, out: Any, inputs: dict[str, Any]) -> list[Tensor]:
        tokens = out.last_hidden_state.shape[1] // self._connector(model).scale_factor ** 2
        return list(torch.cat(list(out.pooler_output)).split(tokens))

    def real(self, call: TowerCall) -> Tensor:
        return call.tower["patch_attention_mask"].flatten(1)

    def per_token(self, model: nn.Module, call: TowerCall, x: Tensor) -> Tensor:
        connector, width = self._connector(model), x.shape[-1]
        return connector.pixel_shuffle(x.contiguous(), connector.scale_factor).unflatten(-1, (-1, width))

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        return self._connector(model).modality_projection(features)
