"""Visual tokens drawn over the image they came from: kept cells as they are, merged ones as one, dropped ones faded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_compress.show.geometry import Box, grid_boxes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNSEEN, DROPPED, KEPT, MERGED = 0, 1, 2, 3
LEGEND = {  # of a state: how it is drawn (face, edge), and what that means
    KEPT: ("#3b75af", "#3b75af", "kept: in its own colours"),
    MERGED: ("#b8a06a", "#d95f02", "merged: an outline is one token, in its mean colour"),
    DROPPED: ("#e0e0e0", "#c0c0c0", "dropped: pale"),
    UNSEEN: ("#404040", "#404040", "not seen by the model: dark"),
}
SQUARE = 1.25  # how much longer than high a cell may be where nothing says that it covers the image
PANEL = 1.6  # inches, width and height of one picture of a comparison
ABREAST = 5.0  # inches, width that two entries of the legend take beside each other


def overlay(
    image: Any,
    kept: Sequence[int],
    grid: tuple[int, int],
    ax: Axes | None = None,
    *,
    dim: float = 0.9,
    title: str = "",
    box: tuple[float, float, float, float] | None = None,
    owners: Sequence[int] | None = None,
) -> Axes:
    """Draw an image with the cells of its kept tokens visible and all other cells faded to a pale grey.

    Cells that were merged into one token are outlined together, in the mean of their colours.

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
        owners: of every token of the grid the kept one that it was merged into, -1 where it is gone, such as
            `model.compression.last.visual_owners[0][0]`; by default none was merged.

    Returns:
        the axes.

    Raises:
        ValueError: the image has no such shape, the grid is empty, a kept index lies outside it or occurs twice, `dim`
            is not in 0..1, the box is not inside the image, or there is none and the grid does not fit the image;
            `owners` are not one per token of the grid, or name one that is not kept.
    """
    pixels, cells = pixels_of(image), _cells(kept, grid)
    if not 0 <= dim <= 1:
        raise ValueError(f"dim={dim!r} must lie in 0..1; 0 leaves dropped cells as they are, 1 makes them pale grey")
    left, top, right, bottom = _box(box, pixels.shape[:2], cells.shape)
    owner = _owners(owners, cells.ravel())
    rows = np.arange(bottom - top) * cells.shape[0] // (bottom - top)
    columns = np.arange(right - left) * cells.shape[1] // (right - left)
    region = np.full(pixels.shape[:2], -2)
    region[top:bottom, left:right] = owner.reshape(cells.shape)[rows][:, columns]
    states = np.append(states_of(owner), [UNSEEN, DROPPED])  # of regions -2 and -1
    state = states[region]
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(2 * PANEL, 2 * PANEL))
    draw(ax, shade(pixels, state, dim, region), title)
    outline(ax, state, region, grid_boxes((left, top, right, bottom), *cells.shape))
    return ax


def states_of(owner: np.ndarray) -> np.ndarray:
    """(N,): the state of each token, KEPT or MERGED of those that stand for themselves alone or for others too."""
    real = owner[owner >= 0]
    size = np.bincount(real, minlength=len(owner))
    return np.where(owner < 0, DROPPED, np.where(size[owner.clip(min=0)] > 1, MERGED, KEPT))


def shade(pixels: np.ndarray, state: np.ndarray, dim: float, region: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3), by `state` (H, W): what is kept as it is, what is merged in the mean colour of its `region` (H, W),
    what is dropped faded by `dim`, what was never seen dark."""
    grey = pixels.mean(-1, keepdims=True)
    faded = dim * (0.25 * grey + 0.75) + (1 - dim) * pixels
    mean = pixels
    if region is not None and (state == MERGED).any():
        number = region.clip(min=0).ravel()
        sums = np.stack([np.bincount(number, channel) for channel in pixels.reshape(-1, 3).T], -1)
        mean = (sums / np.bincount(number).clip(min=1)[:, None])[number].reshape(pixels.shape)
    kinds = [state[..., None] == kind for kind in (KEPT, MERGED, DROPPED)]
    return np.select(kinds, [pixels, mean, faded], 0.3 * grey)


def outline(ax: Axes, state: np.ndarray, region: np.ndarray, boxes: Sequence[Box]) -> None:
    """Draw the edges of merged regions: the sides of those of `boxes` behind which another region lies."""
    from matplotlib.collections import LineCollection

    height, width = state.shape
    lines = []
    for left, top, right, bottom in boxes:
        x, y = (left + right) / 2, (top + bottom) / 2
        here = _at(region, x, y)
        if here is None or state[min(int(y), height - 1), min(int(x), width - 1)] != MERGED:
            continue
        sides = {(left - 1, y): (left, top, left, bottom), (right + 1, y): (right, top, right, bottom)}
        sides |= {(x, top - 1): (left, top, right, top), (x, bottom + 1): (left, bottom, right, bottom)}
        lines += [((a, b), (c, d)) for beyond, (a, b, c, d) in sides.items() if _at(region, *beyond) != here]
    corners = [[(x - 0.5, y - 0.5) for x, y in line] for line in lines]  # pixels are drawn around whole numbers
    ax.add_collection(LineCollection(corners, colors=LEGEND[MERGED][1], linewidths=0.5), autolim=False)


def _at(region: np.ndarray, x: float, y: float) -> int | None:
    inside = 0 <= x < region.shape[1] and 0 <= y < region.shape[0]
    return int(region[int(y), int(x)]) if inside else None


def legend(figure: Any, states: Sequence[int]) -> None:
    """Below a figure what each of the `states` that occur in it looks like."""
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=face, edgecolor=edge, label=text) for s, (face, edge, text) in LEGEND.items() if s in states
    ]
    columns = 2 if figure.get_figwidth() >= ABREAST else 1
    figure.legend(handles=handles, loc="outside lower center", fontsize=7, frameon=False, ncols=columns)


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
    owners: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> Path:
    """Write a PNG with one row per image and one column per method; the first column is the image itself.

    A legend below says how kept, merged and dropped tokens are drawn.

    Args:
        images: see `overlay`.
        kept_by_method: per method, per image, the kept token indices.
        grid: (rows, columns) of tokens of every image.
        titles: one line per image, on its left.
        path: where the PNG goes; its folder must exist.
        notes: per method, per image, a short line below the picture, such as "3 of 4 right". Methods may be missing.
        dim: see `overlay`.
        owners: per method, per image, what went into what, see `overlay`. Methods may be missing.

    Returns:
        `path`.

    Raises:
        ValueError: counts do not match, or what `overlay` raises.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    notes, owners = notes or {}, owners or {}
    _check_compare(images, kept_by_method, titles, {"notes": notes, "owners": owners}, path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shape = len(images), 1 + len(kept_by_method)
    figure = Figure(figsize=(0.4 + PANEL * shape[1], 1.2 + (PANEL + 0.2) * shape[0]), layout="compressed")
    FigureCanvasAgg(figure)
    axes = figure.subplots(*shape, squeeze=False)
    for r, image in enumerate(images):
        draw(axes[r][0], pixels_of(image), "image" if r == 0 else "")
        axes[r][0].set_ylabel(titles[r] if titles else "", fontsize=7)
        for ax, (method, kept) in zip(axes[r][1:], kept_by_method.items()):
            mine = owners[method][r] if method in owners else None
            title = _title(method, kept, grid) if r == 0 else ""
            overlay(image, kept[r], grid, ax, dim=dim, title=title, owners=mine)
            if method in notes:
                ax.set_xlabel(notes[method][r], fontsize=7, labelpad=2)
    merged = any(states_of(np.asarray(o)).max(initial=0) == MERGED for per_image in owners.values() for o in per_image)
    legend(figure, [KEPT, DROPPED, *([MERGED] if merged else [])])
    figure.savefig(path, dpi=150, bbox_inches="tight")  # no title is cut, however many lines it has
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


def _owners(owners: Sequence[int] | None, kept: np.ndarray) -> np.ndarray:
    """(N,) int64: of every token the kept one that it went into, -1 where it is gone."""
    if owners is None:
        return np.where(kept, np.arange(len(kept)), -1)
    owner = np.asarray(owners, dtype=np.int64)
    if owner.shape != kept.shape:
        raise ValueError(f"owners has shape {owner.shape}; pass one number per token of the grid, {len(kept)} of them")
    stays = owner[owner >= 0]
    if (owner < -1).any() or (stays >= len(kept)).any() or not kept[stays].all():
        raise ValueError("owners names tokens that are not kept; pass visual_owners and visual_kept of the same image")
    return owner


def _check_compare(
    images: Sequence[Any],
    kept_by_method: Mapping[str, Sequence[Sequence[int]]],
    titles: Sequence[str] | None,
    further: Mapping[str, Mapping[str, Sequence[Any]]],
    path: Path,
) -> None:
    if not len(images):
        raise ValueError("images=[] is empty; pass at least one image")
    if not kept_by_method:
        raise ValueError("kept_by_method={} is empty; pass at least one method with its kept indices")
    more = [item for one in further.values() for item in one.items()]
    for name, per_image in (*kept_by_method.items(), *more, *([("titles", titles)] if titles else [])):
        if len(per_image) != len(images):
            raise ValueError(f"{name!r} has {len(per_image)} entries for {len(images)} images; give one per image")
    for argument, one in further.items():
        if unknown := sorted(set(one) - set(kept_by_method)):
            raise ValueError(
                f"{argument} for {unknown}, which are not in kept_by_method={list(kept_by_method)}; use its names"
            )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: the folder {str(path.parent)!r} does not exist; create it first")
