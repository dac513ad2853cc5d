"""Where the crops that a processor makes lie in the photo that it was given.

The processor itself is asked: a photo of the same size whose colours are its coordinates comes out as the coordinates
of every pixel that the model sees, whatever was resized, cropped, padded or cut into tiles on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the photo
CLEAR = 0.02  # of the photo's side: how far a crop may be from a straight piece of it
FEW = 32  # pixels of a side: of fewer what resizing does at the edges may be more than that


@dataclass
class View:
    """One crop that a processor made.

    Attributes:
        pixels: (C, H, W) as the model is given them; flat: in its own layout, such as rows of patches.
        box: where its edges lie in the photo; parts that are padding lie outside.
    """

    pixels: np.ndarray
    flat: np.ndarray
    box: Box

    def cells(self, rows: int, columns: int) -> list[Box]:
        """The cells of a grid over the crop, in reading order."""
        return grid_boxes(self.box, rows, columns)


def grid_boxes(box: Box, rows: int, columns: int) -> list[Box]:
    """The cells of a grid over a box, in reading order."""
    x = np.linspace(box[0], box[2], columns + 1).tolist()
    y = np.linspace(box[1], box[3], rows + 1).tolist()
    return [(x[c], y[r], x[c + 1], y[r + 1]) for r in range(rows) for c in range(columns)]


def views(process: Callable[[list[Image.Image]], Any], frames: Sequence[Image.Image], sizes: Any) -> list[View]:
    """The crops of one photo, or of the frames of one video, in the order of the processor.

    Args:
        process: the processor on the one photo or on the frames; what it returns has pixel_values(_videos).
        frames: in RGB, of one size.
        sizes: what cuts rows of patches into pictures, see `_pictures`.

    Raises:
        ValueError: a crop is no straight piece of the photo, or pixel_values have a shape that is not known.
    """
    w, h = frames[0].size
    ramp = np.zeros((h, w, 3), np.uint8)
    ramp[..., 0] = ((np.arange(w) + 0.5) * 255 / w).round()[None]
    ramp[..., 1] = ((np.arange(h) + 0.5) * 255 / h).round()[:, None]
    asked = [Image.new("RGB", (w, h), (0, 0, 0)), Image.new("RGB", (w, h), (255, 255, 255)), Image.fromarray(ramp)]
    given = [list(frames), *([picture] * len(frames) for picture in asked)]
    seen, black, white, place = (_pictures(process(pictures), sizes) for pictures in given)
    if not len(seen) == len(black) == len(white) == len(place):
        raise ValueError("processor cuts pictures of one size into different crops; their places cannot be told")
    out = []
    for (pixels, flat), (low, _), (high, _), (at, _) in zip(seen, black, white, place):
        span = high[:2] - low[:2]
        real = np.abs(span) > 1e-3  # what is the same in black and in white is padding
        where = np.where(real, (at[:2] - low[:2]) / np.where(real, span, 1), np.nan)
        left, right = _edges(where[0], real[0], "width", w)
        top, bottom = _edges(where[1].T, real[1].T, "height", h)
        out.append(View(pixels, flat, (left * w, top * h, right * w, bottom * h)))
    return out


def _edges(where: np.ndarray, real: np.ndarray, side: str, pixels: int) -> tuple[float, float]:
    """First and last edge of a crop along its columns, as fractions of the `side` of the photo."""
    columns = np.flatnonzero(real.any(0))
    if len(columns) < 2:
        raise ValueError("processor: a crop shows nothing of the photo, so that its place cannot be told")
    found = np.nanmean(where[:, columns], 0)
    inner = (found > 0.01) & (found < 0.99)  # nearer to the edge resizing repeats pixels
    inner = inner if inner.sum() >= 2 else np.ones_like(inner)
    slope, offset = np.polyfit(columns[inner] + 0.5, found[inner], 1)
    if pixels == 1 or np.abs(slope * (columns[inner] + 0.5) + offset - found[inner]).max() > CLEAR:
        if pixels < FEW:
            raise ValueError(
                f"images: a photo with a {side} of {pixels} has too few pixels to tell where its tokens lie; enlarge "
                "it before the processor reads it"
            )
        raise ValueError(
            f"processor bends the {side} of the photo, or draws its crops at random: pass one that does not"
        )
    first, last = float(offset), float(offset + slope * where.shape[1])
    half = abs(slope) / 2  # nearer than that to the edge of the photo it is the edge
    return 0.0 if abs(first) < half else first, 1.0 if abs(last - 1) < half else last


def _pictures(out: Any, sizes: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """(C, H, W) of every crop, and the same as it stands in pixel_values.

    A video is its frames. Rows of patches are (t, h/m, w/m, m, m) rows of (C, T, p, p) numbers, as in Qwen2-VL, with m,
    T and p from `sizes`.
    """
    videos = "pixel_values_videos" in out
    pixels, grids = (
        out["pixel_values_videos" if videos else "pixel_values"],
        "video_grid_thw" if videos else "image_grid_thw",
    )
    if isinstance(pixels, (list, tuple)):
        pixels = np.concatenate([np.asarray(p, np.float32).reshape(-1, *np.shape(p)[-3:]) for p in pixels])
    pixels = np.asarray(pixels, np.float32)
    if pixels.ndim in (4, 5):
        return [(p, p) for p in pixels.reshape(-1, *pixels.shape[-3:])]
    if pixels.ndim != 2 or grids not in out:
        raise ValueError(
            f"processor gives pixel_values of shape {pixels.shape}, in which no pictures can be told apart"
        )
    m, p, frames = sizes.merge_size, sizes.patch_size, sizes.temporal_patch_size
    found = []
    for t, h, w in np.asarray(out[grids]).tolist():
        for flat in np.split(pixels[: t * h * w], t):
            x = flat.reshape(h // m, w // m, m, m, -1, frames, p, p)[..., 0, :, :]
            found.append((x.transpose(4, 0, 2, 5, 1, 3, 6).reshape(-1, h * p, w * p), flat))
        pixels = pixels[t * h * w :]
    return found


def area(boxes: Sequence[Box], size: tuple[int, int]) -> tuple[Box, float]:
    """The box around some boxes inside a photo, and what part of the photo it is."""
    w, h = size
    left, top = max(0.0, min(b[0] for b in boxes)), max(0.0, min(b[1] for b in boxes))
    right, bottom = min(float(w), max(b[2] for b in boxes)), min(float(h), max(b[3] for b in boxes))
    return (left, top, right, bottom), max(0.0, right - left) * max(0.0, bottom - top) / math.prod(size)
