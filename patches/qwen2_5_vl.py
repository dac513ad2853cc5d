"""Qwen2.5-VL: windowed tower without [CLS], 2 x 2 patch merger, any resolution, M-RoPE."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from hf_compress.patches.base import Architecture, Grid, TowerCall, nearest_tokens
from hf_compress.tensors.attention import received


class Qwen2_5_VL(Architecture):
    """Four consecutive patches are one token; rows of the tower are in window order; keys see whole images in the
    full-attention blocks only. Surrogate of the [CLS] row: attention received, mean over the four patches."""

    model_types = ("qwen2_5_vl",)
    gives = frozenset({"visual", "cls", "columns"})
    positions = "original"
    resizable = True
    tower_signals = "attention received in the last full-attention block"

    def tower(self, model: nn.Module) -> nn.Module:
        return model.base_model.visual

    def projector(self, model: nn.Module) -> nn.Module:
        return self.tower(model).merger

    def attention_blocks(self, model: nn.Module) -> list[int]:
        return sorted(self.tower(model).fullatt_block_indexes)

    def attention_module(self, model: nn.Module, block: int) -> nn.Module:
        return self.tower(model).blocks[block].attn

    def _grid_thw(self, call: TowerCall) -> Tensor:
        return call.inputs["grid_thw"]

    def grids(self, model: nn.Module, call: TowerCall) -> list[Grid]:
        return self._token_grids(model, self._grid_thw(call))

    def grids_of(self, model: nn.Module, counts: list[int], inputs: dict[str, Any]) -> list[Grid | None]:
        thw = inputs.get("image_grid_thw")
        return [None] * len(counts) if thw is None else list(self._token_grids(model, thw))

    def _token_grids(self, model: nn.Module, thw: Tensor) -> list[Grid]:
        m = self.tower(model).spatial_merge_size
        return [(t * h // m, w // m) for t, h, w in thw.tolist()]

    def _reading_order(self, model: nn.Module, call: TowerCall) -> Tensor:
        """(tokens,) rows of the tower's window order at which the tokens in reading order stand."""
        tower = self.tower(model)
        index, _ = get_vision_window_index(
            self._grid_thw(call),
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        return torch.as_tensor(index).argsort()

    def split(self, model: nn.Module, call: TowerCall, rows: Tensor, grids: list[Grid]) -> list[Tensor]:
        counts = [h * w for h, w in grids]
        joined = rows.reshape(sum(counts), -1)  # what the merger reads has four rows a token, what it gives one
        return list(joined[self._reading_order(model, call).to(rows.device)].split(counts))

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        merger = self.projector(model)
        return merger(features.reshape(-1, self.tower(model).config.hidden_size))

    def cls_rows(self, model: nn.Module, call: TowerCall, block: int, grids: list[Grid]) -> list[Tensor]:
        calls = call.attention[block]
        patch = torch.cat([received(q, k, s)[0].mean(0) for q, k, s in calls])  # (patches,) in window order
        return [row.mean(1)[None] for row in self.split(model, call, patch[:, None], grids)]

    def keys(self, model: nn.Module, call: TowerCall, block: int, grids: list[Grid]) -> list[Tensor]:
        patch = torch.cat([k[0].mean(0) for _, k, _ in call.attention[block]])
        unit = self.tower(model).spatial_merge_unit
        return [rows.unflatten(1, (unit, -1)).mean(1) for rows in self.split(model, call, patch, grids)]

    def resize(
        self, model: nn.Module, inputs: dict[str, Any], choose: Any
    ) -> tuple[dict[str, Any], list[Tensor], list[Grid]]:
        tower, pixels, thw = self.tower(model), inputs["hidden_states"], inputs["grid_thw"]
        m, p, parts, nearest, new_thw, new_grids = tower.spatial_merge_size, tower.patch_size, [], [], [], []
        for flat, (t, h, w) in zip(pixels.split(thw.prod(-1).tolist()), thw.tolist()):
            old = (h // m, w // m)
            new = choose(old)
            # patches of one image: (t, h/m, w/m, m, m, channel, frames, p, p)
            x = flat.view(t, *old, m, m, -1, tower.patch_embed.temporal_patch_size, p, p).permute(
                0, 6, 5, 1, 3, 7, 2, 4, 8
            )
            image = x.reshape(-1, x.shape[2], h * p, w * p)
            small = F.interpolate(image.float(), (new[0] * m * p, new[1] * m * p), mode="bicubic", antialias=True)
            x = (
                small.to(flat.dtype)
                .view(t, -1, x.shape[2], new[0], m, p, new[1], m, p)
                .permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
            )
            parts.append(x.reshape(-1, flat.shape[1]))
            nearest.append(nearest_tokens(old, new, flat.device))
            new_thw.append([t, new[0] * m, new[1] * m])
            new_grids.append(new)
        changed = dict(inputs, hidden_states=torch.cat(parts), grid_thw=thw.new_tensor(new_thw))
        return changed, nearest, new_grids
