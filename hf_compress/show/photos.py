"""`model.compression.show(photo)`: what the last prompt kept, on the photo itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from hf_compress.engine.context import Context
from hf_compress.engine.encoded import Crop
from hf_compress.engine.recorder import LastRun
from hf_compress.show.geometry import Box, View, area, grid_boxes, views
from hf_compress.show.overlay import KEPT, MERGED, UNSEEN, draw, legend, outline, pixels_of, shade, states_of

WHOLE = 0.98  # a crop that covers so much of what all crops cover is a view of the whole, not a tile
PANEL = 3.2  # inches
SAME = 0.05  # mean difference of normalised pixels up to which a picture is the one that the model saw


@dataclass
class Fate:
    """What became of some tokens of a sample.

    Attributes:
        owner: the kept token that each went into, counted through the images of the sample; -1: it is gone.
        state: how each is drawn.
        stays: bool, those that are kept themselves.
    """

    owner: np.ndarray
    state: np.ndarray
    stays: np.ndarray

    def of(self, rows: np.ndarray) -> Fate:
        """That of some of them."""
        return Fate(self.owner[rows], self.state[rows], self.stays[rows])


@dataclass
class Piece:
    """One crop on the photo: the boxes of its tokens and what became of them."""

    boxes: list[Box]
    fate: Fate


def show(
    context: Context,
    images: Any,
    processor: Any = None,
    *,
    sample: int = 0,
    video: bool = False,
    layers: bool = False,
    dim: float = 0.9,
) -> Image.Image:
    """The photos of the last prompt with what was kept of them as it is, what was dropped faded, the rest dark.

    What was merged before the language model is outlined, each part that became one token in its mean colour. The
    processor is asked where its crops lie, so that cells stand where the model saw them: resized, cropped, padded or
    cut into tiles. Views of the whole photo and tiles have a panel each; the frames of a video lie side by side.

    Args:
        context: `model.compression.context`.
        images, processor, sample, video: see `placed`.
        layers: a panel for every set of tokens that layers of the language model saw; else what reaches the last one.
        dim: how far dropped cells fade, 0 to 1.

    Returns:
        a picture; `.save("kept.png")` writes it.

    Raises:
        ValueError: as `placed`, or `dim` is not in 0..1.
    """
    if not 0 <= dim <= 1:
        raise ValueError(f"dim={dim!r} must lie in 0..1; 0 leaves dropped cells as they are, 1 makes them pale grey")
    seen = _sets(context, sample) if layers else {-1: ""}
    panels: list[tuple[Image.Image, list[Panel]]] = []
    for layer, name in seen.items():
        given = placed(context, images, processor, sample=sample, video=video, layer=layer)
        more = [_panels(pieces, photo.size, name) for photo, pieces in given]
        panels = panels or [(photo, []) for photo, _ in given]
        panels = [(photo, before + new) for (photo, before), new in zip(panels, more)]
    return _picture(panels, dim, across=video)


def placed(
    context: Context,
    images: Any,
    processor: Any = None,
    *,
    sample: int = 0,
    video: bool = False,
    layer: int = -1,
) -> list[tuple[Image.Image, list[Piece]]]:
    """Every photo of the last prompt with its crops: where the tokens lie on it, and what became of them.

    Args:
        context: `model.compression.context`.
        images: the photo of a sample, or the list of all its photos in the order of the prompt: PIL images or arrays as
            `overlay` takes them, the very ones that went into the processor.
        processor: what made the inputs, or its image processor; by default what is saved beside the checkpoint.
        sample: which row of the batch.
        video: `images` are the frames of the one video of the sample, as many as the model saw; where the model joins
            frames, the first of them counts.
        layer: of the language model, whose tokens count as kept; -1: the last one.

    Raises:
        ValueError: nothing has been read yet; no method acts on visual tokens; these are not the photos that the model
            saw, or not as many; there is no processor, or it does not tell where its crops lie.
    """
    run = _last(context, sample)
    listed = images if isinstance(images, (list, tuple)) else [images]
    photos = [Image.fromarray((255 * pixels_of(photo)).round().astype(np.uint8)) for photo in listed]
    crops = run.visual_crops[sample] if run.visual_crops else []
    if not (context.vision_method or context.decoder_method):
        raise ValueError(
            "images: nothing to draw, for no method of this compression acts on visual tokens, and all of them stay; "
            "compress with a method of the vision or decoder stage"
        )
    if not crops or not photos:
        raise ValueError(
            f"images: {len(photos)} given; sample {sample} of the last prompt shows {len(crops)} that a method reads"
        )
    reader = _reader(context.model, processor, "video" if video else "image")
    find = _frame_pieces if video else _photo_pieces
    return find(photos, reader, crops, _fates(run, sample, layer))


def _last(context: Context, sample: int) -> LastRun:
    run = None if context.recorder is None else context.recorder.run()
    if run is None:
        raise ValueError("compression.show: no prompt has been read yet; call the model or generate first")
    if not 0 <= sample < len(run.prompt_tokens):
        raise ValueError(f"sample={sample}: the last prompt had {len(run.prompt_tokens)} rows; count them from 0")
    return run


def _sets(context: Context, sample: int) -> dict[int, str]:
    """First layer of every run of layers that see the same rows, and what the run is called."""
    rows = [layer[sample] for layer in _last(context, sample).layer_index]
    first = [i for i in range(len(rows)) if not i or rows[i] != rows[i - 1]]
    ends = [*first[1:], len(rows)]
    return {a: f"layer {a}" if b == a + 1 else f"layers {a}–{b - 1}" for a, b in zip(first, ends)}


def _photo_pieces(
    photos: Sequence[Image.Image], reader: Any, crops: Sequence[Sequence[Crop]], fates: Sequence[Fate]
) -> list[tuple[Image.Image, list[Piece]]]:
    """Every photo with its crops."""
    found = [views(lambda one: reader(images=one, return_tensors="pt"), [photo], reader) for photo in photos]
    out = []
    for photo, mine, images_of in zip(photos, found, _deal(found, crops)):
        parts = [_pieces(photo, mine, crops[image], fates[image], number) for number, image in images_of]
        out.append((photo, [piece for part in parts for piece in part]))
    return out


def _frame_pieces(
    frames: Sequence[Image.Image], reader: Any, crops: Sequence[Sequence[Crop]], fates: Sequence[Fate]
) -> list[tuple[Image.Image, list[Piece]]]:
    """Every frame, the first of those that the model joins, with its crop."""
    found = views(lambda some: reader(videos=[some], do_sample_frames=False, return_tensors="pt"), frames, reader)
    if len(crops) != 1 or [crop.crop for crop in crops[0]] != list(range(len(found))):
        raise ValueError(
            f"images: {len(frames)} frames, of which the processor makes {len(found)}; the last prompt shows "
            f"{len(crops)} images and videos, the first of {len(crops[0])} frames: pass the frames of its only video"
        )
    pieces = _pieces(frames[0], found, crops[0], fates[0], None)
    return [(frames[i * len(frames) // len(found)], [piece]) for i, piece in enumerate(pieces)]


def _reader(model: Any, processor: Any, modality: str) -> Any:
    """The part of a processor that reads images, or videos."""
    if processor is None:
        from transformers import AutoImageProcessor, AutoVideoProcessor

        name, auto = model.name_or_path, AutoVideoProcessor if modality == "video" else AutoImageProcessor
        try:
            processor = auto.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"processor=None: none is saved beside the checkpoint {name!r}; pass the one that made the inputs"
            ) from error
    reader = getattr(processor, f"{modality}_processor", processor)
    if not callable(reader) or not hasattr(reader, "model_input_names"):
        raise ValueError(f"processor={type(processor).__name__} reads no {modality}s; pass the model's processor")
    return reader


def _fates(run: LastRun, sample: int, layer: int = -1) -> list[Fate]:
    """Per image what became of its rows until a layer, by default the last one."""
    alive, before, out = np.asarray(run.layer_index[layer][sample], dtype=np.int64), 0, []
    for rows, owners in zip(run.visual_rows[sample], run.visual_owners[sample]):
        owner = np.asarray(owners, dtype=np.int64)
        owner = np.where((owner >= 0) & np.isin(rows, alive)[owner], owner, -1)
        stays = owner == np.arange(len(owner))
        out.append(Fate(np.where(owner < 0, -1, owner + before), states_of(owner), stays))
        before += len(rows)
    return out


def _deal(found: Sequence[Sequence[View]], crops: Sequence[Sequence[Crop]]) -> list[list[tuple[int | None, int]]]:
    """Per photo the images of the prompt that show it: (number of the crop, None for all of them; number of the image).

    Some models take a photo and its tiles as one image, some take every tile as an image of its own.
    """
    counts = [len(mine) for mine in found]
    if len(crops) == len(found):
        return [[(None, i)] for i in range(len(crops))]
    if len(crops) == sum(counts):
        starts = np.cumsum([0, *counts]).tolist()
        return [[(n, start + n) for n in range(count)] for start, count in zip(starts, counts)]
    raise ValueError(
        f"images: {len(found)} given, of which the processor makes {sum(counts)} crops; the prompt of the "
        f"sample shows {len(crops)}: pass all photos of the sample in the order of the prompt, and the processor that "
        "was used"
    )


def _pieces(
    photo: Image.Image, found: Sequence[View], crops: Sequence[Crop], fate: Fate, number: int | None
) -> list[Piece]:
    """The crops of one image of the prompt on its photo."""
    out = []
    for crop in crops:
        at = number or crop.crop
        if crop.grid is None:
            raise ValueError(
                "the last prompt did not tell the grid of its image; pass pixel_values and the grid argument"
            )
        if at >= len(found):
            raise ValueError(f"images: the model saw crop {at} of a photo of which the processor makes {len(found)}")
        view = found[at]
        _check_same(view, crop)
        if crop.crops > 1:  # over all tiles together, which is the photo
            boxes = grid_boxes((0.0, 0.0, float(photo.width), float(photo.height)), *crop.grid)
        elif crop.source is None:
            boxes = view.cells(*crop.grid)
        else:  # what unpadding left of a tile, on the grid of the base view
            base = crops[0].grid
            assert base is not None
            every = view.cells(*base)
            boxes = [every[i] for i in crop.source.tolist()]
        out.append(Piece(boxes, fate.of(crop.rows.cpu().numpy())))
    return out


def _check_same(view: View, crop: Crop) -> None:
    """Raises ValueError if the model saw other pixels than the processor makes of this photo."""
    height, width = view.pixels.shape[1:]
    alike = True
    if crop.grid is not None and crop.source is None and crop.crops == 1:
        alike = height * crop.grid[1] == width * crop.grid[0]  # tokens are squares
    if crop.sample is not None:
        numbers, of = crop.sample
        flat, n = view.flat.reshape(-1), numbers.shape[-1]
        mine = view.flat[:, 0] if view.flat.ndim == 2 else flat[:: max(1, len(flat) // n)][:n]
        seen = numbers.float().cpu().numpy().reshape(-1)
        if view.flat.ndim == 2 or len(flat) == of:  # else the batch was padded to a larger picture
            alike = alike and len(seen) == len(mine) and float(np.abs(seen - mine).mean()) <= SAME
    if not alike:
        raise ValueError(
            "images: the processor makes other pixels of this photo than the model saw in the last prompt; pass the "
            "same photo, in the order of the prompt (sample= names the row of a batch), and the processor that was used"
        )


@dataclass
class Panel:
    """One drawing of a photo: the state and the region of every pixel, (H, W), and the boxes of the tokens."""

    title: str
    state: np.ndarray
    region: np.ndarray
    boxes: list[Box]


def parts(pieces: Sequence[Piece], size: tuple[int, int]) -> list[tuple[str, list[Piece]]]:
    """The crops of a photo of `size` (width, height) that can be drawn together: views of the whole, then the tiles."""
    boxes = [area(piece.boxes, size) for piece in pieces]
    _, everything = area([box for box, _ in boxes], size)
    whole = [piece for piece, (_, share) in zip(pieces, boxes) if share >= WHOLE * everything]
    tiles = [piece for piece, (_, share) in zip(pieces, boxes) if share < WHOLE * everything]
    out = [("whole view" if len(pieces) > 1 else "", [piece]) for piece in whole]
    return [*out, (f"{len(tiles)} tiles", tiles)] if tiles else out


def _panels(pieces: Sequence[Piece], size: tuple[int, int], layers: str = "") -> list[Panel]:
    """The panels of a photo; `layers` names those of which they are."""
    return [_panel(some, ", ".join(filter(None, [layers, name])), size) for name, some in parts(pieces, size)]


def _panel(pieces: Sequence[Piece], name: str, size: tuple[int, int]) -> Panel:
    state, region = np.full(size[::-1], UNSEEN, np.uint8), np.full(size[::-1], -2)
    for piece in pieces:
        for (left, top, right, bottom), owner, kind in zip(piece.boxes, piece.fate.owner, piece.fate.state):
            x, y = (slice(max(0, round(a)), max(0, round(b))) for a, b in ((left, right), (top, bottom)))
            state[y, x], region[y, x] = kind, owner
    tokens, kept = sum(len(p.boxes) for p in pieces), sum(int(p.fate.stays.sum()) for p in pieces)
    title = f"{name}: {kept} of {tokens}".removeprefix(": ")
    return Panel(title, state, region, [box for piece in pieces for box in piece.boxes])


def _picture(photos: Sequence[tuple[Image.Image, list[Panel]]], dim: float, across: bool = False) -> Image.Image:
    """A row per photo, or `across` a column each: the photo, then its panels; below, what the colours mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panel = PANEL / 2 if across else PANEL
    columns = 1 + max(len(panels) for _, panels in photos)
    heights = [min(2.0, photo.height / photo.width) for photo, _ in photos]
    shape = (columns, len(photos)) if across else (len(photos), columns)
    down = [max(heights)] * columns if across else heights
    size = max(panel * shape[1], PANEL), sum(panel * height + 0.4 for height in down) + 0.4
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(*shape, squeeze=False, height_ratios=down)
    for number, (row, (photo, panels)) in enumerate(zip(grid.T if across else grid, photos)):
        draw(row[0], pixels_of(photo), f"frame {number}" if across else "photo")
        for ax, one in zip(row[1:], panels):
            draw(ax, shade(pixels_of(photo), one.state, dim, one.region), one.title)
            outline(ax, one.state, one.region, one.boxes)
            kinds = set(np.unique(one.state).tolist())
            if KEPT in kinds and len(kinds) > 1 and MERGED not in kinds:  # with it an outline means one token
                ax.contour(one.state == KEPT, [0.5], colors="tab:orange", linewidths=0.5)
        for ax in row[1 + len(panels) :]:
            ax.set_axis_off()
    legend(figure, _shown([one.state for _, panels in photos for one in panels]))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _shown(states: Sequence[np.ndarray]) -> list[int]:
    """The states that occur; an edge that rounding left unseen is none."""
    seen = {int(kind) for state in states for kind in np.unique(state)}
    if all((state == UNSEEN).mean() < 0.01 for state in states):
        seen.discard(UNSEEN)
    return sorted(seen)
