"""Aya Vision and Command A Vision: SigLIP tower without [CLS], pixel shuffle inside the projector, fixed tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.patches.base import AS_CONFIGURED, TowerBlock, TowerCall
from hf_compress.patches.encoder import EncoderTower


class AyaVision(EncoderTower):
    """The projector joins a square of patches into one token; the tiles of a picture share its budget.
    Signals of a token: mean over its patches."""

    model_types = ("aya_vision", "cohere2_vision")
    gives = frozenset({"visual", "cls", "pixels", "columns"})
    tiles = True
    tower_signals = "attention received in the feature block, mean over the patches of a token"

    def same_picture(self, before: list[int], gap: int) -> bool:
        return gap == 1  # the name of the next tile, or a line break; two more tokens stand between pictures

    def query_key(
        self, layer: nn.Module, hidden: Tensor, rows: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Of the language model Cohere2 only the sliding layers rotate."""
        attention: Any = layer.self_attn
        if getattr(attention, "sliding_window", 0) is None:
            rotary = torch.ones_like(rotary[0]), torch.zeros_like(rotary[1])
        return super().query_key(layer, hidden, rows, rotary)

    def tokens_per_image(self, model: nn.Module) -> int:
        vision = model.config.vision_config
        return len(self.patches(model, (vision.image_size // vision.patch_size) ** 2))

    def tower_blocks(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> list[TowerBlock]:
        return []  # the projector wants every patch of its squares

    def patches(self, model: nn.Module, count: int) -> Tensor:
        """(N, group) which of the `count` patches of a tile each of its tokens joins, ascending."""
        shuffle: Any = self.projector(model).pixel_shuffle
        return shuffle(torch.arange(count).view(1, count, 1)).flatten(1, 2)[0].sort().values

    def per_token(self, model: nn.Module, call: TowerCall, x: Tensor) -> Tensor:
        return x[:, self.patches(model, x.shape[1]).to(x.device)]

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        group = self.projector(model).downsample_factor ** 2
        return self.projector(model)(features.unflatten(1, (group, -1))).flatten(0, 2)  # each an image of one token
