"""A film strip: what methods kept of a video, frame by frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_compress.show.overlay import DROPPED, KEPT, draw, legend, overlay, pixels_of

FRAME = 1.1  # inches, width of a frame
MOST = 32  # frames that one strip shows


def strip(
    frames: Sequence[Any],
    kept_by_method: Mapping[str, Sequence[int]],
    grid: tuple[int, int, int],
    path: str | Path = "hf-compress-strip.png",
    *,
    notes: Mapping[str, str] | None = None,
    dim: float = 0.9,
) -> Path:
    """Write a PNG with the frames of a video from left to right, and below them one row per method.

    Kept cells are as they are, dropped ones faded; above each frame stands how many of its tokens are kept. A token
    that others were merged into is drawn where it stands. A legend below says how they are drawn.

    Args:
        frames: in the order of time, images as `overlay` takes them. Where the model joins frames (two of Qwen2-VL) all
            that went in: the first one of those that became one is drawn.
        kept_by_method: per method the kept tokens of the whole video, such as
            `model.compression.last.visual_kept[0][0]`.
        grid: (T, rows, columns) of tokens, `video_grid_thw` with rows and columns of merged patches. Of more than 32
            moments evenly spaced ones are drawn.
        path: where the PNG goes; its folder must exist.
        notes: per method a short line at its left, such as its answer. Methods may be missing.
        dim: see `overlay`.

    Returns:
        `path`.

    Raises:
        ValueError: the grid is none, the frames are not a multiple of its moments, there is no method, a note belongs
            to none, a token lies outside the video, or what `overlay` raises.
        FileNotFoundError: the folder does not exist.
    """
    path, notes = Path(path), notes or {}
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"grid={grid!r} must be (moments, rows, columns) of tokens, each at least 1")
    moments, rows, columns = grid
    if not len(frames) or len(frames) % moments:
        raise ValueError(f"frames: {len(frames)} given; pass {moments}, as grid={grid!r} says, or a multiple of it")
    if not kept_by_method:
        raise ValueError("kept_by_method={} is empty; pass at least one method with its kept indices")
    if unknown := sorted(set(notes) - set(kept_by_method)):
        raise ValueError(f"notes for {unknown}, which are not in kept_by_method={list(kept_by_method)}; use its names")
    parts = {name: _by_moment(name, kept, moments, rows * columns) for name, kept in kept_by_method.items()}
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: the folder {str(path.parent)!r} does not exist; create it first")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [i * moments // min(moments, MOST) for i in range(min(moments, MOST))]
    pictures = [frames[t * (len(frames) // moments)] for t in shown]
    height, width = pixels_of(pictures[0]).shape[:2]
    size = 0.8 + FRAME * len(shown), 0.5 + (FRAME * height / width + 0.25) * (1 + len(parts))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1 + len(parts), len(shown), squeeze=False)
    for ax, t, picture in zip(axes[0], shown, pictures):
        draw(ax, pixels_of(picture), str(t))
    for line, (name, kept) in zip(axes[1:], parts.items()):
        for ax, t, picture in zip(line, shown, pictures):
            overlay(picture, kept[t], (rows, columns), ax, dim=dim, title=f"{len(kept[t])} of {rows * columns}")
        total = sum(map(len, kept))
        label = f"{name}\n{total} of {moments * rows * columns}" + (f"\n{notes[name]}" if name in notes else "")
        line[0].set_ylabel(label, fontsize=7)
    legend(figure, [KEPT, DROPPED])
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path


def _by_moment(name: str, kept: Sequence[int], moments: int, tokens: int) -> list[list[int]]:
    """The kept tokens of each moment, counted from its first one."""
    index = np.asarray(kept if isinstance(kept, np.ndarray) else list(kept), dtype=np.int64).reshape(-1)
    if outside := [int(i) for i in index if not 0 <= i < moments * tokens]:
        raise ValueError(
            f"{name!r} keeps {outside[:3]}, which lie outside a video of {moments} x {tokens} tokens; check that grid "
            "belongs to it"
        )
    return [(index[index // tokens == t] - t * tokens).tolist() for t in range(moments)]
