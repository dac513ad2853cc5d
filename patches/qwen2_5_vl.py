"""Qwen2.5-VL: as Qwen2-VL, with a windowed tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from hf_compress.patches.base import AS_CONFIGURED, TowerCall
from hf_compress.patches.qwen2_vl import Qwen2_VL


class Qwen2_5_VL(Qwen2_VL):
    """Rows of the tower are in window order; only the full-attention blocks see whole images."""

    model_types = ("qwen2_5_vl", "qwen2_5_omni_thinker")
    tower_signals = "attention received in the last full-attention block"

    def attention_blocks(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> list[int]:
        full = set(self.tower(model).fullatt_block_indexes)  # may name blocks that a smaller tower does not have
        return [i for i in super().attention_blocks(model, inputs) if i in full]

    def reading_order(self, model: nn.Module, call: TowerCall, tokens: Tensor) -> Tensor:
        tower = self.tower(model)
        index, _ = get_vision_window_index(
            call.tower["grid_thw"],
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        return tokens[torch.as_tensor(index).argsort().to(tokens.device)]
