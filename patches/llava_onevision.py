"""LLaVA-OneVision: SigLIP tower without [CLS], AnyRes images that may be interpolated down, pooled video frames."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.patches.base import Crops, TowerCall, Unit
from hf_compress.patches.llava_next import LlavaNext, frame_units


@dataclass(kw_only=True)
class Canvas(Unit):
    """The tiles of an image that was interpolated down: its rows are mixtures, also across the borders of tiles.

    Attributes:
        crops: of the image, the base view `crop` and its tiles, which follow it.
        pack: (crops, N, C) to (N + rows, C), the operator by which the model mixed the features.
    """

    pack: Callable[[Tensor], Tensor]

    def read(self, crops: Crops) -> Tensor:
        mine = torch.stack(list(crops[self.crop : self.crop + self.crops]))
        return self.pack(mine.float())[mine.shape[1] :].to(mine.dtype)


class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration`; every crop is a unit as in LLaVA-NeXT, every frame of a video too.

    An image beyond the limit of `vision_aspect_ratio` ("anyres_max_9") is interpolated after the projector: its tiles
    are then one unit, whose signals are interpolated by the same operator. So are those of video frames (27 x 27 to
    14 x 14). There methods that merge before the projector merge after it, which alone leaves single tokens as they
    are. The newline at the end of a video belongs to no frame.
    """

    model_types = ("llava_onevision",)
    towers = frozenset({("siglip_vision_model", "full")})
    modalities = ("image", "video")
    gives = LlavaNext.gives | {"video"}
    has_cls = False
    tower_signals = "attention received in the feature block, per crop; per frame, pooled"

    def units(self, model: nn.Module, modality: str, images: list[Tensor], inputs: dict[str, Any]) -> list[Unit]:
        if modality == "image":
            return super().units(model, modality, images, inputs)
        side = math.ceil(self._side(model) / 2)
        return frame_units(images, (side, side), pooled=True)

    def _crops(self, model: nn.Module, image: int, size: Any, inputs: dict[str, Any]) -> int:
        counts = inputs.get("batch_num_images")
        if counts is not None and [n for n in map(int, counts) for _ in range(n)][image] > 1:
            return 1  # images of a group are not tiled
        return super()._crops(model, image, size, inputs)

    def _pack(
        self, model: nn.Module, crops: Tensor, size: Any, newline: Tensor | None, inputs: dict[str, Any]
    ) -> Tensor:
        limit = self.setting(model, inputs, "vision_aspect_ratio")
        if not crops.is_floating_point():
            limit = f"anyres_max_{10**9}"  # indices cannot be mixed: where everything would be without interpolation
        (rows,), _ = model.base_model.pack_image_features(
            [crops], [size], image_newline=newline, vision_aspect_ratio=limit
        )
        return rows

    def _crop_units(
        self, model: nn.Module, image: int, x: Tensor, first: int, crops: int, size: Any, inputs: dict[str, Any]
    ) -> list[Unit]:
        side, n = self._side(model), self._side(model) ** 2
        whole = self._pack(model, torch.zeros(crops, n, 1, dtype=torch.int64), size, torch.tensor([1]), inputs)
        newline = self._pack(model, torch.zeros(crops, n, 1), size, torch.tensor([1.0]), inputs)[:, 0] > 0.5
        if len(newline) == len(whole) or len(newline) != len(x):  # as it is; the other lengths are refused there
            return super()._crop_units(model, image, x, first, crops, size, inputs)
        rows, lines = (~newline).nonzero()[:, 0].to(x.device), int(newline.sum())
        pack = partial(self._pack, model, size=size, newline=None, inputs=inputs)
        grid = (lines, (len(rows) - n) // lines)
        return [
            Unit(image, (side, side), rows[:n], first),
            Canvas(image, grid, rows[n:], first, pooled=True, crops=crops, pack=pack),
        ]

    def per_token(self, model: nn.Module, call: TowerCall, x: Tensor) -> Crops:
        video = "pixel_values_videos" in call.inputs
        return super().per_token(model, call, model.base_model.apply_pooling(x) if video else x)
