"""Video-LLaVA: one tower for images and one for videos, of one shape; frames come with their [CLS]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.patches.base import AS_CONFIGURED, Architecture, Crops, TowerBlock, TowerCall, Unit
from hf_compress.patches.llava import Llava
from hf_compress.patches.llava_next import frame_units


class VideoLlava(Llava):
    """`VideoLlavaForConditionalGeneration`; every image and every frame is a unit.

    The [CLS] feature that stands before every frame belongs to no grid: it always stays and is not counted. The budget
    of a video is shared over its frames, so nothing is cut inside the towers, where frames run side by side. Videos
    that the caller encoded elsewhere do not tell their number of frames: there every frame counts as a video.
    """

    model_types = ("video_llava",)
    gives = frozenset({"visual", "cls", "places", "pixels", "video", "columns"})
    modalities = ("image", "video")
    tower_signals = "[CLS] row of the feature block, per image and per frame"

    def check(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> None:
        super().check(model, inputs)
        self.check_side(model, inputs)

    def tower(self, model: nn.Module) -> nn.Module:
        return model.base_model.image_tower

    def by_tower(self, model: nn.Module) -> list[Architecture]:
        return [self, VideoTower()]

    def tokens_per_image(self, model: nn.Module) -> int | None:  # type: ignore[override]
        return None

    def tower_blocks(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> list[TowerBlock]:
        return []

    def _side(self, model: nn.Module) -> int:
        vision = model.config.vision_config
        return vision.image_size // vision.patch_size

    def images(self, model: nn.Module, modality: str, out: Any, inputs: dict[str, Any]) -> list[Tensor]:
        if modality == "image":
            return list(out.pooler_output)
        videos = inputs.get("pixel_values_videos")
        frames = 1 if videos is None else videos.shape[1]
        return list(out.pooler_output.unflatten(0, (-1, frames)).flatten(1, 2))

    def units(self, model: nn.Module, modality: str, images: list[Tensor], inputs: dict[str, Any]) -> list[Unit]:
        side = self._side(model)
        if modality == "video":
            return frame_units(images, (side, side), skip=1)
        rows = [torch.arange(len(x) - side * side, len(x), device=x.device) for x in images]
        return [Unit(i, (side, side), r, i) for i, r in enumerate(rows)]

    def per_token(self, model: nn.Module, call: TowerCall, x: Tensor) -> Crops:
        return super().per_token(model, call, x[:, -(self._side(model) ** 2) :])  # the projector reads [CLS] of frames


class VideoTower(VideoLlava):
    """The second tower of Video-LLaVA; serves no `model_types` of its own."""

    def tower(self, model: nn.Module) -> nn.Module:
        return model.base_model.video_tower
