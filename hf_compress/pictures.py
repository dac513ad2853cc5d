"""Pictures as a person sees them: whatever the file stores, three channels of 8 bits, upright, on white."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


class Frames(tuple[Image.Image, ...]):
    """The frames of one video, in the order of time; what is no `Frames` is an image, or a list of them."""


def as_seen(image: Image.Image) -> Image.Image:
    """A picture in RGB, as a viewer shows it.

    Turned as its EXIF data says; white where it is transparent; of an animation the frame that is set. Grey values of
    16 bits span black to white. Of other numbers (modes I and F), 0 to 1, 0 to 255 or 0 to 65535 span black to white,
    the first of these ranges that holds them all, and lowest to highest value where none does. (Integers: the first of
    the last two.)

    Returns:
        the picture itself where it is like that already.

    Raises:
        ValueError: it holds numbers that are not finite.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        return _grey(image).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """8 bits of a picture with one number per pixel."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"a picture of mode {image.mode} holds numbers that are not finite")
    low, high = float(values.min()), float(values.max())
    ranges = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    top = next((top for top in ranges if low >= 0 and high <= top), None)
    if top is not None:
        low, high = 0.0, float(top)
    return Image.fromarray((255 * (values - low) / ((high - low) or 1)).round().astype(np.uint8))


def content(cell: Any, folder: str | Path | None = None) -> bytes:
    """The encoded bytes of one picture of a table.

    Args:
        cell: a path or URL, bytes, what `datasets` stores ({"bytes": ..., "path": ...}), a PIL image or an array.
        folder: where relative paths start, a URL too; None: the working directory.

    Raises:
        ValueError: there is no picture, or it cannot be read.
    """
    if isinstance(cell, Mapping):
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if isinstance(cell, (bytes, bytearray)) and cell:
        return bytes(cell)
    if isinstance(cell, (Image.Image, np.ndarray)):
        buffer = io.BytesIO()
        as_seen(Image.fromarray(cell) if isinstance(cell, np.ndarray) else cell).save(buffer, "png")
        return buffer.getvalue()
    if not isinstance(cell, (str, Path)) or not str(cell).strip():
        empty = cell is None or cell != cell or not cell
        raise ValueError("there is no picture" if empty else f"{type(cell).__name__} is no picture and no path of one")
    path = str(cell)
    if folder is not None and "://" not in path:
        path = f"{folder}/{path}" if "://" in str(folder) else str(Path(folder) / path)
    try:
        if "://" in path:  # inside an archive, or on a hub
            from datasets.utils.file_utils import xopen

            with xopen(path, "rb") as file:
                return bytes(file.read())
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        shown, why = path if len(path) <= 200 else f"{path[:100]}...", getattr(error, "strerror", None) or error
        raise ValueError(f"the picture {shown!r} cannot be read ({why})") from error


def decode(raw: bytes) -> Image.Image:
    """The picture of these bytes `as_seen`.

    Raises:
        ValueError: they are no picture, or only a part of one.
    """
    try:
        with Image.open(io.BytesIO(raw)) as image:
            image.load()
            return as_seen(image)
    except UnidentifiedImageError as error:  # which names the buffer
        raise ValueError("the picture cannot be decoded (it is of no format that PIL knows)") from error
    except Exception as error:  # decoders raise whatever they trip over
        raise ValueError(f"the picture cannot be decoded ({error})") from error
