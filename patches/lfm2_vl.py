"""LFM2-VL: SigLIP 2 tower of any resolution, pixel unshuffle, a language model mostly of short convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.patches.base import AS_CONFIGURED, Grid, TowerCall, Unit
from hf_compress.patches.encoder import EncoderLayers
from hf_compress.patches.unsupported import ENTRY_ONLY


class Lfm2_VL(EncoderLayers):
    """Short convolutions keep the last few rows in place of keys and values per token. The projector joins a square of
    patches into one token; signals of a token: mean over its patches. The tiles of a picture share its budget."""

    model_types = ("lfm2_vl",)
    stages = ("vision",)
    without = ENTRY_ONLY
    around = frozenset({"lfm2", "lfm2_moe"})
    states = frozenset({"conv"})
    gives = frozenset({"visual", "cls"})
    tiles = True
    tower_signals = "attention received in the last block, mean over the patches of a token"

    def check(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> None:
        super().check(model, inputs)
        if model.config.get_text_config().conv_bias:
            raise ValueError(
                f"conv_bias=True: convolutions of {type(model).__name__} make something of rows that only fill up a "
                "batch, so that no row is what it is alone; models without that bias can be compressed"
            )

    def same_picture(self, before: list[int], gap: int) -> bool:
        """One token names each tile; two at least close a picture and open the next."""
        return gap == 1

    def units(self, model: nn.Module, modality: str, images: list[Tensor], inputs: dict[str, Any]) -> list[Unit]:
        joined, shapes = model.config.downsample_factor, inputs.get("spatial_shapes")
        grids: list[Grid | None] = [None] * len(images)
        if shapes is not None and (shapes.prod(-1) // joined**2).tolist() == [len(x) for x in images]:
            grids = [(h // joined, w // joined) for h, w in shapes.tolist()]
        return [Unit(i, grids[i], torch.arange(len(x), device=x.device), i) for i, x in enumerate(images)]

    def real(self, call: TowerCall) -> Tensor:
        return call.tower["pixel_attention_mask"].bool()

    def per_token(self, model: nn.Module, call: TowerCall, x: Tensor) -> list[Tensor]:
        shapes = call.tower["spatial_shapes"].tolist()
        return [self._squares(model, patches[: h * w].unflatten(0, (h, w))) for patches, (h, w) in zip(x, shapes)]

    def _squares(self, model: nn.Module, image: Tensor) -> Tensor:
        """(h, w, C) patches to (N, g, C), the g patches that each token joins."""
        n = model.config.downsample_factor
        return image.unflatten(1, (-1, n)).unflatten(0, (-1, n)).transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def pixels(self, model: nn.Module, call: TowerCall) -> list[Tensor]:
        sizes = call.tower["spatial_shapes"].prod(-1).tolist()
        return [x[:n] for x, n in zip(call.tower["pixel_values"], sizes)]

    def features(self, model: nn.Module, call: TowerCall) -> list[Tensor]:
        """The projector reads image by image, or (since transformers 5.24) all in one, each with its padding."""
        assert call.features is not None
        sizes = (call.tower["spatial_shapes"].prod(-1) // model.config.downsample_factor**2).tolist()
        read = [self._squares(model, part[0]).flatten(1) for part in (call.features, *call.further)]
        if len(read) == len(sizes) > 1:
            return read
        (whole,) = read
        return [x[:n] for x, n in zip(whole.chunk(len(sizes)), sizes)]

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        n = model.config.downsample_factor  # tokens side by side, as an image of one row of them
        row = features.unflatten(1, (n, n, -1)).transpose(0, 1).flatten(1, 2)
        return self.projector(model)(row[None])[0].flatten(0, 1)
