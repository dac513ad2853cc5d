"""`model.compression.show_cache()`: which entries of the KV cache stay, by layer, head and place in the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from hf_compress.engine.context import Context

WIDTH, LINE, BINS = 9.0, 0.07, 1000  # inches of the picture and of the line of a head; places
KEPT, GONE, TEXT, VISUAL = "#1f4e79", "#f0ece2", "#8c8c8c", "#d95f02"


def show_cache(context: Context, sample: int = 0) -> Image.Image:
    """A line per layer and KV head, the prompt from left to right: dark where an entry was stored behind the prompt.

    Heads that hold the same entries share a line. Below, where the prompt is text and where it shows images. Entries
    that were merged into others are not stored, and what is stored in fewer bits is.

    Args:
        context: `model.compression.context`.
        sample: which row of the batch.

    Returns:
        a picture; `.save("cache.png")` writes it.

    Raises:
        ValueError: nothing has been read yet, the model kept no cache, or there is no such sample.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lines, owners, length, visual = stored(context, sample)
    figure = Figure(figsize=(WIDTH, 1.6 + LINE * len(lines)), layout="constrained", dpi=130)
    canvas = FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[max(1.0, LINE * len(lines)), 0.12])
    look: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "vmin": 0, "vmax": 1}
    shades = LinearSegmentedColormap.from_list("stored", [GONE, KEPT])
    upper.imshow(_binned(lines), cmap=shades, extent=(0, length, len(lines), 0), **look)
    starts = [i for i, owner in enumerate(owners) if not i or owner != owners[i - 1]]
    upper.hlines(starts[1:], 0, length, colors="white", linewidth=0.8)
    ends = [*starts[1:], len(lines)]
    upper.set_yticks([(a + b) / 2 for a, b in zip(starts, ends)], [str(owners[a]) for a in starts], fontsize=7)
    upper.set_ylabel("layer" if len(starts) == len(lines) else "layer, a line per head", fontsize=8)
    upper.set_title(f"{context.name}: {lines.mean():.1%} of the entries", fontsize=9, loc="left")
    shades = LinearSegmentedColormap.from_list("shown", [TEXT, VISUAL])
    lower.imshow(_binned(visual[None]), cmap=shades, extent=(0, length, 1, 0), **look)
    lower.set_yticks([])
    lower.tick_params(labelsize=7)
    lower.set_xlabel("place in the prompt", fontsize=8)
    swatches = {"kept": KEPT, "gone": GONE, "text": TEXT} | ({"image": VISUAL} if visual.any() else {})
    handles = [Patch(facecolor=face, edgecolor="0.6", label=name) for name, face in swatches.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _binned(lines: np.ndarray) -> np.ndarray:
    """Long lines as shares of neighbouring places, so that none is left out that stands alone."""
    length = lines.shape[1]
    if length <= BINS:
        return lines.astype(float)
    edges = np.arange(BINS) * length // BINS
    return np.add.reduceat(lines.astype(float), edges, axis=1) / np.diff([*edges, length])


def stored(context: Context, sample: int) -> tuple[np.ndarray, list[int], int, np.ndarray]:
    """(lines, S) bool, the layer of each line, S, and (S,) bool: what of the prompt is visual."""
    recorder = context.recorder
    if recorder is None:
        raise ValueError("compression.show_cache: no prompt has been read yet; call the model or generate first")
    run = recorder.run()
    if not 0 <= sample < len(run.prompt_tokens):
        raise ValueError(f"sample={sample}: the last prompt had {len(run.prompt_tokens)} rows; count them from 0")
    rows = [(i, head) for i, heads in enumerate(recorder.entries(sample)) for head in heads or ()]
    if not rows:
        raise ValueError("compression.show_cache: the model kept no KV cache (use_cache=False)")
    length = 1 + max(max(head, default=0) for _, head in rows)
    visual_rows = recorder.visual(sample)
    length = max(length, 1 + max(visual_rows, default=0))
    lines = np.zeros((len(rows), length), bool)
    for line, (_, head) in zip(lines, rows):
        line[head] = True
    visual = np.zeros(length, bool)
    visual[visual_rows] = True
    return lines, [layer for layer, _ in rows], length, visual
