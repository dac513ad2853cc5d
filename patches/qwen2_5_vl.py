"""Qwen2.5-VL: windowed tower without [CLS], 2 x 2 patch merger, any resolution, M-RoPE."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from hf_compress.patches.base import Architecture, TowerCall, Unit, nearest_tokens
from hf_compress.tensors.attention import received


class Qwen2_5_VL(Architecture):
    """Four consecutive patches are one token; rows of the tower are in window order; keys see whole images in the
    full-attention blocks only. Surrogate of the [CLS] row: attention received, mean over the four patches."""

    model_types = ("qwen2_5_vl",)
    gives = frozenset({"visual", "cls", "columns"})
    positions = "original"
    resizable = True
    modalities = ("image", "video")
    tower_signals = "attention received in the last full-attention block"

    def tower(self, model: nn.Module) -> nn.Module:
        return model.base_model.visual

    def projector(self, model: nn.Module) -> nn.Module:
        return self.tower(model).merger

    def attention_blocks(self, model: nn.Module) -> list[int]:
        return sorted(self.tower(model).fullatt_block_indexes)

    def attention_module(self, model: nn.Module, block: int) -> nn.Module:
        return self.tower(model).blocks[block].attn

    def units(self, model: nn.Module, modality: str, images: list[Tensor], inputs: dict[str, Any]) -> list[Unit]:
        thw, m = inputs.get(f"{modality}_grid_thw"), self.tower(model).spatial_merge_size
        grids = [None] * len(images) if thw is None else [(t * h // m, w // m) for t, h, w in thw.tolist()]
        return [Unit(i, grids[i], torch.arange(len(x), device=x.device), i) for i, x in enumerate(images)]

    def _in_reading_order(self, model: nn.Module, call: TowerCall, rows: Tensor) -> list[Tensor]:
        """Per-patch rows (P, ...) in window order to (N, 4, ...) per image in reading order."""
        tower, thw = self.tower(model), call.tower["grid_thw"]
        index, _ = get_vision_window_index(
            thw, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size, patch_size=tower.patch_size
        )
        order = torch.as_tensor(index).argsort().to(rows.device)
        joined = rows.unflatten(0, (-1, tower.spatial_merge_unit))[order]
        return list(joined.split((thw.prod(-1) // tower.spatial_merge_unit).tolist()))

    def features(self, model: nn.Module, call: TowerCall) -> list[Tensor]:
        assert call.features is not None
        return [x.flatten(1) for x in self._in_reading_order(model, call, call.features)]

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        return self.projector(model)(features.reshape(-1, self.tower(model).config.hidden_size))

    def cls_rows(self, model: nn.Module, call: TowerCall, block: int) -> list[Tensor]:
        patch = torch.cat([received(q, k, s)[0].mean(0) for q, k, s in call.attention[block]])
        return [x.mean(1)[:, None] for x in self._in_reading_order(model, call, patch)]

    def keys(self, model: nn.Module, call: TowerCall, block: int) -> list[Tensor]:
        patch = torch.cat([k[0].mean(0) for _, k, _ in call.attention[block]])
        return [x.mean(1) for x in self._in_reading_order(model, call, patch)]

    def resize(self, model: nn.Module, tower: dict[str, Any], choose: Any) -> tuple[dict[str, Any], list[Tensor]]:
        module, pixels, thw = self.tower(model), tower["hidden_states"], tower["grid_thw"]
        m, p, frames = module.spatial_merge_size, module.patch_size, module.patch_embed.temporal_patch_size
        parts, nearest, grids = [], [], []
        for flat, (t, h, w) in zip(pixels.split(thw.prod(-1).tolist()), thw.tolist()):
            old = (h // m, w // m)
            new = choose(old)
            # rows are (t, h/m, w/m, m, m), columns (channel, frame, p, p)
            x = flat.view(t, *old, m, m, -1, frames, p, p).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
            images = x.reshape(t * frames, -1, h * p, w * p)
            small = F.interpolate(images.float(), (new[0] * m * p, new[1] * m * p), mode="bicubic", antialias=True)
            x = small.to(flat.dtype).view(t, frames, -1, new[0], m, p, new[1], m, p).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
            parts.append(x.reshape(-1, flat.shape[1]))
            near, per_frame = nearest_tokens(old, new, flat.device), new[0] * new[1]
            nearest.append(torch.cat([near + f * per_frame for f in range(t)]))
            grids.append([t, new[0] * m, new[1] * m])
        return dict(tower, hidden_states=torch.cat(parts), grid_thw=thw.new_tensor(grids)), nearest
