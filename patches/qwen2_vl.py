"""Qwen2-VL: tower without [CLS], patch merger, any resolution, videos, M-RoPE. Its successors build on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.patches.base import AS_CONFIGURED, Architecture, Grid, TowerBlock, TowerCall, Unit
from hf_compress.tensors.regions import nearest_tokens


class Qwen2_VL(Architecture):
    """m x m consecutive patches are one token, also where tokens leave inside the tower. The crops are images and the
    frames of videos (pairs of pictures that the patches join), each with its own attention and its own share of the
    budget. Signals of a token: mean over its patches."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    gives = frozenset({"visual", "cls", "places", "tower", "pixels", "video", "columns"})
    positions = "original"
    resizable = True
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    tower_signals = "attention received in the last block"

    def tower(self, model: nn.Module) -> nn.Module:
        return model.base_model.visual

    def projector(self, model: nn.Module) -> nn.Module:
        return self.tower(model).merger

    def attention_blocks(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> list[int]:
        return list(range(len(self.tower(model).blocks)))

    def attention_module(self, model: nn.Module, block: int) -> nn.Module:
        return self.tower(model).blocks[block].attn

    def hidden_module(self, model: nn.Module, block: int) -> nn.Module:
        return self.tower(model).blocks[block]

    def tower_blocks(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> list[TowerBlock]:
        return [TowerBlock(b, b.attn, b.norm2, b.mlp) for b in self.tower(model).blocks]

    def joined(self, model: nn.Module) -> int:
        return self.tower(model).spatial_merge_size ** 2

    def crops_per_image(self, call: TowerCall) -> list[int]:
        return call.tower["grid_thw"][:, 0].tolist()

    def tower_mergers(self, model: nn.Module) -> list[nn.Module]:
        return [self.projector(model)]

    def cut_block(self, kwargs: dict[str, Any], source: Tensor) -> None:
        bounds = kwargs["cu_seqlens"]  # of images or windows; of those that are empty now nothing may be left
        kwargs["cu_seqlens"] = torch.searchsorted(source, bounds.to(source)).unique_consecutive().to(bounds.dtype)
        kwargs["position_embeddings"] = tuple(x.index_select(0, source) for x in kwargs["position_embeddings"])

    def units(self, model: nn.Module, modality: str, images: list[Tensor], inputs: dict[str, Any]) -> list[Unit]:
        m, thw = self.tower(model).spatial_merge_size, inputs.get(f"{modality}_grid_thw")
        if thw is None or (thw.prod(-1) // m**2).tolist() != [len(x) for x in images]:
            return [Unit(i, None, torch.arange(len(x), device=x.device), i) for i, x in enumerate(images)]
        units: list[Unit] = []
        for i, (x, (t, h, w)) in enumerate(zip(images, thw.tolist())):
            for rows in torch.arange(len(x), device=x.device).chunk(t):
                units.append(Unit(i, (h // m, w // m), rows, len(units)))
        return units

    def packed(self, model: nn.Module, call: TowerCall) -> list[int]:
        return [h * w for t, h, w in call.tower["grid_thw"].tolist() for _ in range(t)]

    def reading_order(self, model: nn.Module, call: TowerCall, tokens: Tensor) -> Tensor:
        """(N, ...) tokens of the whole call as the tower holds them to those that it gives away."""
        return tokens

    def per_token(self, model: nn.Module, call: TowerCall, x: Tensor) -> list[Tensor]:
        joined = self.joined(model)
        tokens = self.reading_order(model, call, x[0].unflatten(0, (-1, joined)))
        return list(tokens.split([n // joined for n in self.packed(model, call)]))

    def pixels(self, model: nn.Module, call: TowerCall) -> list[Tensor]:
        return list(call.tower["hidden_states"].split(self.packed(model, call)))

    def grids(self, model: nn.Module, call: TowerCall, tokens: list[int]) -> list[Grid | None]:
        m = self.tower(model).spatial_merge_size
        return [(h // m, w // m) for t, h, w in call.tower["grid_thw"].tolist() for _ in range(t)]

    def token_pixels(self, model: nn.Module, call: TowerCall) -> list[Tensor]:
        return [x.view(len(x) // self.joined(model), -1) for x in self.pixels(model, call)]

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        return self.projector(model)(features.reshape(features.shape[0] * self.joined(model), -1))

    def resize(self, model: nn.Module, tower: dict[str, Any], choose: Any) -> tuple[dict[str, Any], list[Tensor]]:
        module, pixels, thw = self.tower(model), tower["hidden_states"], tower["grid_thw"]
        m, p, frames = module.spatial_merge_size, module.patch_embed.patch_size, module.patch_embed.temporal_patch_size
        parts, nearest, grids = [], [], []
        for flat, (t, h, w) in zip(pixels.split(thw.prod(-1).tolist()), thw.tolist()):
            old = (h // m, w // m)
            new = choose(old, t)
            # rows are (t, h/m, w/m, m, m), columns (channel, frame, p, p)
            x = flat.view(t, *old, m, m, -1, frames, p, p).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
            images = x.reshape(t * frames, -1, h * p, w * p)
            small = F.interpolate(images.float(), (new[0] * m * p, new[1] * m * p), mode="bicubic", antialias=True)
            x = small.to(flat.dtype).view(t, frames, -1, new[0], m, p, new[1], m, p).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
            parts.append(x.reshape(-1, flat.shape[1]))
            nearest += [nearest_tokens(old, new, flat.device)] * t
            grids.append([t, new[0] * m, new[1] * m])
        rest = {
            k: v for k, v in tower.items() if k.startswith(("output_", "return_"))
        }  # else computed of the old grids
        return dict(rest, hidden_states=torch.cat(parts), grid_thw=thw.new_tensor(grids)), nearest
