"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, video frames pooled before the projector."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.patches.base import Crops, TowerCall, Unit
from hf_compress.patches.llava_next import LlavaNext, frame_units


class LlavaNextVideo(LlavaNext):
    """`LlavaNextVideoForConditionalGeneration`; every frame of a video is a unit, there are no newlines in videos.

    The projector reads pooled frames, so merging before it is exact. Scores and keys of the tower are pooled by the
    operator of the model (the mean where that is a learned convolution). The budget of a video is shared over its
    frames.
    """

    model_types = ("llava_next_video",)
    modalities = ("image", "video")
    gives = LlavaNext.gives | {"video"}
    tower_signals = "[CLS] row of the feature block, per crop; per frame, pooled"

    def units(self, model: nn.Module, modality: str, images: list[Tensor], inputs: dict[str, Any]) -> list[Unit]:
        if modality == "image":
            return super().units(model, modality, images, inputs)
        side = self._side(model) // model.config.spatial_pool_stride
        return frame_units(images, (side, side))

    def per_token(self, model: nn.Module, call: TowerCall, x: Tensor) -> Crops:
        side = self._side(model)
        if "pixel_values_videos" not in call.inputs or x.shape[1] != side**2:  # features are pooled already
            return super().per_token(model, call, x)
        pool = F.max_pool2d if model.config.spatial_pool_mode == "max" else F.avg_pool2d
        return pool(x.mT.unflatten(2, (side, side)), model.config.spatial_pool_stride).flatten(2).mT[:, :, None]
