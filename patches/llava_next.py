"""LLaVA-NeXT: CLIP tower, a base view and tiles of any aspect ratio, one newline feature at every row end."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.patches.base import AS_CONFIGURED, Grid, TowerBlock, Unit
from hf_compress.patches.llava import Llava


class LlavaNext(Llava):
    """`LlavaNextForConditionalGeneration`; an image is its base view, then the unpadded canvas of its tiles.

    Every crop is a unit: the base view and each tile, of which unpadding leaves a rectangle. Newline rows belong to no
    crop: they always stay and are not counted. The budget of an image is shared over its crops in proportion to their
    tokens, so nothing is cut inside the tower, where crops run side by side and padding is still among the tokens.
    """

    model_types = ("llava_next",)
    towers = frozenset({("clip_vision_model", "default"), ("siglip_vision_model", "full")})
    crops = True
    gives = frozenset({"visual", "cls", "places", "pixels", "columns"})
    tower_signals = "[CLS] row of the feature block, per crop"

    def _side(self, model: nn.Module) -> int:
        vision = model.config.vision_config
        return vision.image_size // vision.patch_size

    def check(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> None:
        super().check(model, inputs)
        self.check_side(model, inputs)

    def tokens_per_image(self, model: nn.Module) -> int | None:  # type: ignore[override]
        return None

    def tower_blocks(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> list[TowerBlock]:
        return []

    def cls_tokens(self, model: nn.Module) -> int:
        return int(model.config.vision_config.model_type == "clip_vision_model")  # SigLIP towers have none

    def units(self, model: nn.Module, modality: str, images: list[Tensor], inputs: dict[str, Any]) -> list[Unit]:
        sizes = inputs.get("image_sizes")
        if sizes is None or len(sizes) != len(images):
            return self._units_by_newlines(model, images)
        out: list[Unit] = []
        first = 0
        for image, (x, size) in enumerate(zip(images, sizes)):
            crops = self._crops(model, image, size, inputs)
            out += self._crop_units(model, image, x, first, crops, size, inputs)
            first += crops
        return out

    def _crops(self, model: nn.Module, image: int, size: Any, inputs: dict[str, Any]) -> int:
        """Crops of one image that the tower reads, base view included."""
        count = sys.modules[type(model).__module__].image_size_to_num_patches
        return count(size, model.config.image_grid_pinpoints, model.config.vision_config.image_size)

    def _pack(
        self, model: nn.Module, crops: Tensor, size: Any, newline: Tensor | None, inputs: dict[str, Any]
    ) -> Tensor:
        """The rows of one image from its (crops, N, C), by the model's own operator."""
        (rows,), _ = model.base_model.pack_image_features([crops], [size], "default", image_newline=newline)
        return rows

    def _crop_units(
        self, model: nn.Module, image: int, x: Tensor, first: int, crops: int, size: Any, inputs: dict[str, Any]
    ) -> list[Unit]:
        """The crops of one image of features `x` (rows, D); `first` is its first crop in the tower's batch."""
        side, index = self._side(model), torch.arange(crops * self._side(model) ** 2)
        where = self._pack(model, index.view(crops, -1, 1), size, torch.tensor([-1]), inputs)[:, 0]
        if len(where) != len(x):
            raise ValueError(
                f"image_sizes: image {image} of size {list(map(int, size))} has {len(where)} rows, its features have "
                f"{len(x)}; pass the image_sizes that came with its pixel_values"
            )
        newlines = (where[side**2 :] == -1).nonzero()[:, 0]  # behind every row of the canvas of tiles
        h, w = len(newlines), int(newlines[0]) if len(newlines) else 0
        out = []
        for crop in range(crops):
            rows = (where.div(side * side, rounding_mode="floor") == crop).nonzero()[:, 0]
            source = where[rows] % (side * side)
            height = len((source // side).unique())
            if height:
                grid = (height, len(rows) // height)
                unit = Unit(image, grid, rows.to(x.device), first + crop, source.to(x.device))
                if crop:
                    (top, left), (bottom, right) = (divmod(int(i) - side**2, w + 1) for i in (rows[0], rows[-1]))
                    unit.box = (top / h, left / w, (bottom + 1) / h, (right + 1) / w)
                out.append(unit)
        return out

    def _units_by_newlines(self, model: nn.Module, images: list[Tensor]) -> list[Unit]:
        """Features of which nothing else is known: the base view, and all tiles together as a second crop."""
        n, out = self._side(model) ** 2, []
        for image, x in enumerate(images):
            newline = (x == model.base_model.image_newline.to(x)).all(-1)
            rows, lines = (~newline).nonzero()[:, 0], int(newline.sum())
            if not lines or len(rows) < n or (len(rows) - n) % lines:
                raise ValueError(
                    f"mm_encoder_outputs: image {image} has {len(x)} rows whose line ends cannot be told; pass its "
                    "image_sizes too, or pixel_values"
                )
            out.append(Unit(image, (self._side(model),) * 2, rows[:n], image))
            if len(rows) > n:
                out.append(Unit(image, (lines, (len(rows) - n) // lines), rows[n:], image))
        return out


def frame_units(videos: Sequence[Tensor], grid: Grid, skip: int = 0, pooled: bool = False) -> list[Unit]:
    """One unit per frame, in the order of the tower's batch.

    Args:
        videos: (rows, D) per video: per frame `skip` rows of no unit and a grid of tokens; rows after the last frame
            are of no unit either.
    """
    tokens, out, crop = grid[0] * grid[1], [], 0
    for video, x in enumerate(videos):
        for frame in range(len(x) // (tokens + skip)):
            start = frame * (tokens + skip) + skip
            rows = torch.arange(start, start + tokens, device=x.device)
            out.append(Unit(video, grid, rows, crop, pooled=pooled))
            crop += 1
    return out
