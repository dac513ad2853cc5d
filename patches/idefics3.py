"""Idefics3 and SmolVLM: SigLIP tower without [CLS], pixel shuffle, features of all images of a sample in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.patches.base import AS_CONFIGURED, TowerBlock, TowerCall
from hf_compress.patches.paligemma import PaliGemma
from hf_compress.tensors.attention import column_sums


class Idefics3(PaliGemma):
    """The pixel shuffle joins a square of patches into one token; the tiles of a picture, each with placeholders of
    its own, share its budget; frames of a video come as pictures too. Images that only fill up the batch never
    reach the tower. Surrogate of the [CLS] row: attention received in the last block from the patches that are not
    padding."""

    model_types = ("idefics3", "smolvlm")
    gives = frozenset({"visual", "cls", "columns"})
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

    def _per_token(self, model: nn.Module, patches: Tensor) -> list[Tensor]:
        """(n, P, C) rows of patches to (N, group, C) per image, by the model's own shuffle."""
        connector, width = self._connector(model), patches.shape[-1]
        return list(connector.pixel_shuffle(patches.contiguous(), connector.scale_factor).unflatten(-1, (-1, width)))

    def features(self, model: nn.Module, call: TowerCall) -> list[Tensor]:
        assert call.features is not None
        return [x.flatten(1) for x in self._per_token(model, call.features)]

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        return self._connector(model).modality_projection(features)

    def cls_rows(self, model: nn.Module, call: TowerCall, block: int) -> list[Tensor]:
        ((query, key, scaling),) = call.attention[block]
        real = call.tower["patch_attention_mask"].flatten(1)
        total = column_sums(query, key, scaling, lambda _: real[:, None, None], real.float())
        return [x.mean(1) for x in self._per_token(model, (total / real.sum(1)[:, None, None]).mT)]

    def keys(self, model: nn.Module, call: TowerCall, block: int) -> list[Tensor]:
        ((_, key, _),) = call.attention[block]
        return [x.mean(1) for x in self._per_token(model, key.mean(1))]
