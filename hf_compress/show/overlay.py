"""Kept visual tokens drawn over the image they came from: kept cells as they are, dropped cells faded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNSEEN, DROPPED, KEPT = 0, 1, 2
SQUARE = 1.25  # how much longer than high a cell may be where nothing says that it covers the image
PANEL = 1.6  # inches, width and height of one picture of a comparison


def overlay(
    image: Any,
    kept: Sequence[int],
    grid: tuple[int, int],
    ax: Axes | None = None,
    *,
    dim: float = 0.9,
    title: str = "",
    box: tuple[float, float, float, float] | None = None,
) -> Axes:
    """Draw an image with the cells of its kept tokens visible and all other cells faded to a pale grey.

    `model.compression.show(photo)` finds grid and box by itself.

    Args:
        image: PIL image, or (height, width), (height, width, 1), (height, width, 3) or (height, width, 4) array,
            uint8 or floats in 0..1.
        kept: indices of the kept tokens in reading order, such as `model.compression.last.visual_kept[0][0]`.
        grid: (rows, columns) of tokens.
        ax: matplotlib axes to draw on; a new figure if None.
        dim: how far dropped cells fade, 0 (not at all) to 1 (pale grey).
        title: title of the axes.
        box: (left, top, right, bottom) in pixels, where the token grid lies; by default on the whole image, if that
            gives cells that are nearly squares. What lies outside is drawn dark.

    Returns:
        the axes.

    Raises:
        ValueError: the image has no such shape, the grid is empty, a kept index lies outside it or occurs twice, `dim`
            is not in 0..1, the box is not inside the image, or there is none and the grid does not fit the image.
    """
    pixels, cells = pixels_of(image), _cells(kept, grid)
    if not 0 <= dim <= 1:
        raise ValueError(f"dim={dim!r} must lie in 0..1; 0 leaves dropped cells as they are, 1 makes them pale grey")
    left, top, right, bottom = _box(box, pixels.shape[:2], cells.shape)
    state = np.full(pixels.shape[:2], UNSEEN)
    rows = np.arange(bottom - top) * cells.shape[0] // (bottom - top)
    columns = np.arange(right - left) * cells.shape[1] // (right - left)
    state[top:bottom, left:right] = np.where(cells[rows][:, columns], KEPT, DROPPED)
    shown = shade(pixels, state, dim)
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(2 * PANEL, 2 * PANEL))
    draw(ax, shown, title)
    return ax


def shade(pixels: np.ndarray, state: np.ndarray, dim: float) -> np.ndarray:
    """(H, W, 3): what is kept as it is, what is dropped faded by `dim`, what was never seen dark, by `state` (H, W)."""
    grey = pixels.mean(-1, keepdims=True)
    faded = dim * (0.25 * grey + 0.75) + (1 - dim) * pixels
    return np.select([state[..., None] == KEPT, state[..., None] == DROPPED], [pixels, faded], 0.3 * grey)


def _box(
    box: tuple[float, float, float, float] | None, size: tuple[int, ...], grid: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """Edges of the part of an image of `size` (height, width) that the grid covers."""
    height, width = size
    if box is not None:
        left, top, right, bottom = (round(edge) for edge in box)
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(
                f"box={box!r} must be (left, top, right, bottom) within an image of {width} x {height} pixels"
            )
        return left, top, right, bottom
    cell = width / grid[1], height / grid[0]
    if max(cell) > SQUARE * min(cell):
        raise ValueError(
            f"grid={tuple(grid)} on an image of {width} x {height} pixels gives cells {cell[0]:.1f} x {cell[1]:.1f}; "
            "the processor has cropped the image or squeezed it. model.compression.show(image) finds out. Or say where "
            f"the grid lies: box=(0, 0, {width}, {height}) if on the whole image"
        )
    return 0, 0, width, height


def compare(
    images: Sequence[Any],
    kept_by_method: Mapping[str, Sequence[Sequence[int]]],
    grid: tuple[int, int],
    titles: Sequence[str] | None = None,
    path: str | Path = "hf-compress-compare.png",
    *,
    notes: Mapping[str, Sequence[str]] | None = None,
    dim: float = 0.9,
) -> Path:
    """Write a PNG with one row per image and one column per method; the first column is the image itself.

    Args:
        images: see `overlay`.
        kept_by_method: per method, per image, the kept token indices.
        grid: (rows, columns) of tokens of every image.
        titles: one line per image, on its left.
        path: where the PNG goes; its folder must exist.
        notes: per method, per image, a short line below the picture, such as "3 of 4 right". Methods may be missing.
        dim: see `overlay`.

    Returns:
        `path`.

    Raises:
        ValueError: counts do not match, or what `overlay` raises.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    _check_compare(images, kept_by_method, titles, notes or {}, path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shape = len(images), 1 + len(kept_by_method)
    figure = Figure(figsize=(0.4 + PANEL * shape[1], 0.5 + (PANEL + 0.2) * shape[0]), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(*shape, squeeze=False)
    for r, image in enumerate(images):
        draw(axes[r][0], pixels_of(image), "image" if r == 0 else "")
        axes[r][0].set_ylabel(titles[r] if titles else "", fontsize=7)
        for ax, (method, kept) in zip(axes[r][1:], kept_by_method.items()):
            overlay(image, kept[r], grid, ax, dim=dim, title=_title(method, kept, grid) if r == 0 else "")
            if notes and method in notes:
                ax.set_xlabel(notes[method][r], fontsize=7, labelpad=2)
    figure.savefig(path, dpi=150)
    return path


def _title(method: str, kept: Sequence[Sequence[int]], grid: tuple[int, int]) -> str:
    """Method and K of N; a range of K where images differ."""
    counts = sorted({len(k) for k in kept})
    size = str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    return f"{method}\n{size} of {grid[0] * grid[1]}"


def draw(ax: Axes, pixels: np.ndarray, title: str) -> None:
    ax.imshow(pixels, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set_color("0.6")
    if title:
        ax.set_title(title, fontsize=8)


def pixels_of(image: Any) -> np.ndarray:
    """(height, width, 3) floats in 0..1."""
    pixels = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or 0 in pixels.shape:
        raise ValueError(
            f"image of type {type(image).__name__} and shape {pixels.shape} cannot be drawn; pass a PIL image or a "
            "(height, width, 3) array (move the channels of a torch tensor to the end: image.permute(1, 2, 0))"
        )
    scaled = pixels / 255 if pixels.dtype == np.uint8 else pixels.astype(float)
    if not (np.isfinite(scaled).all() and scaled.min() >= 0 and scaled.max() <= 1):
        raise ValueError(
            f"image has values from {scaled.min():.3g} to {scaled.max():.3g}; pass uint8, or floats in 0..1 "
            "(pixel_values of a processor are normalised: pass the image that went into it)"
        )
    return np.broadcast_to(scaled[..., :3], (*scaled.shape[:2], 3))


def _cells(kept: Sequence[int], grid: tuple[int, int]) -> np.ndarray:
    """(rows, columns) bool, true where a token is kept."""
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid={grid!r} must be (rows, columns) of tokens, both at least 1")
    tokens = grid[0] * grid[1]
    index = np.asarray(kept if isinstance(kept, np.ndarray) else list(kept), dtype=np.int64)
    if index.ndim != 1:
        raise ValueError(f"kept has shape {index.shape}; pass the indices of one image, such as visual_kept[0][0]")
    if outside := [int(i) for i in index if not 0 <= i < tokens]:
        raise ValueError(
            f"kept={outside[:3]} lie outside the {grid[0]} x {grid[1]} grid of {tokens} tokens; indices run from 0 to "
            f"{tokens - 1}: check that grid belongs to this image"
        )
    if len(np.unique(index)) != len(index):
        raise ValueError("kept names a token twice; pass every kept index once")
    cells = np.zeros(tokens, bool)
    cells[index] = True
    return cells.reshape(grid)


def _check_compare(
    images: Sequence[Any],
    kept_by_method: Mapping[str, Sequence[Sequence[int]]],
    titles: Sequence[str] | None,
    notes: Mapping[str, Sequence[str]],
    path: Path,
) -> None:
    if not len(images):
        raise ValueError("images=[] is empty; pass at least one image")
    if not kept_by_method:
        raise ValueError("kept_by_method={} is empty; pass at least one method with its kept indices")
    for name, per_image in (*kept_by_method.items(), *notes.items(), *([("titles", titles)] if titles else [])):
        if len(per_image) != len(images):
            raise ValueError(f"{name!r} has {len(per_image)} entries for {len(images)} images; give one per image")
    if unknown := sorted(set(notes) - set(kept_by_method)):
        raise ValueError(f"notes for {unknown}, which are not in kept_by_method={list(kept_by_method)}; use its names")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: the folder {str(path.parent)!r} does not exist; create it first")
