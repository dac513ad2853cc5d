"""What a person sees of a picture, whatever its file stores."""

import io

import numpy as np
import pytest
from PIL import Image

from hf_compress.pictures import as_seen, content, decode


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corner(image):
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_what_is_plain_stays_itself():
    image = Image.new("RGB", (3, 2), (1, 2, 3))
    assert np.array_equal(as_seen(image), image)
    assert corner(as_seen(Image.new("L", (2, 2), 7))) == (7, 7, 7)
    assert corner(as_seen(Image.new("1", (2, 2), 1))) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_grey_of_16_bits_is_not_white(kind):
    """Pillow alone cuts everything above 255 off."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    seen = np.asarray(decode(encoded(Image.fromarray(ramp), kind)))
    assert np.abs(seen[..., 0] - ramp / 257.0).max() <= 0.5 and np.ptp(seen, axis=2).max() == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.float32([[0, 0.5, 1]]), [0, 128, 255]),  # shares
        (np.float32([[0, 51, 255]]), [0, 51, 255]),
        (np.float32([[0, 257, 65535]]), [0, 1, 255]),
        (np.float32([[-1, 0, 1]]), [0, 128, 255]),  # of no known range: from the lowest to the highest
        (np.int32([[0, 51, 200]]), [0, 51, 200]),
        (np.int32([[0, 257, 51400]]), [0, 1, 200]),
        (np.int32([[-100, 0, 100]]), [0, 128, 255]),
        (np.float32([[-3, -3, -3]]), [0, 0, 0]),  # one value only
    ],
)
def test_numbers_that_are_no_bytes(values, expected):
    seen = decode(encoded(Image.fromarray(values), "tiff"))
    assert np.abs(np.asarray(seen)[0, :, 0].astype(int) - expected).max() <= 1


def test_numbers_that_are_none():
    with pytest.raises(ValueError, match="not finite"):
        as_seen(Image.fromarray(np.float32([[0, np.nan]])))


def test_transparent_is_white():
    """Alone and half; in every mode that knows it, palettes and single transparent colours too."""
    layer = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    layer.putpixel((1, 0), (255, 0, 0, 128))
    assert [as_seen(layer).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (255, 127, 127)]
    assert corner(as_seen(Image.new("LA", (1, 1), (0, 0)))) == (255, 255, 255)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    for kind in ("png", "gif"):
        seen = decode(encoded(palette, kind, transparency=0))
        assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]
    assert corner(decode(encoded(Image.new("RGB", (1, 1), "black"), "png", transparency=(0, 0, 0)))) == (255,) * 3


def test_inks():
    red = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg", quality=95))
    assert np.abs(np.array(corner(red)) - (255, 0, 0)).max() < 8


def test_upright():
    image = Image.new("RGB", (20, 10), "blue")
    image.paste("red", (0, 0, 20, 5))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: a viewer turns it clockwise
    seen = decode(encoded(image, "png", exif=exif))
    assert seen.size == (10, 20) and seen.getpixel((9, 10)) == (255, 0, 0) and seen.getpixel((0, 10)) == (0, 0, 255)
    assert np.array_equal(as_seen(seen), seen)


def test_the_first_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert corner(decode(encoded(frames[0], "gif", save_all=True, append_images=frames[1:]))) == (255, 0, 0)


def test_cells(tmp_path):
    image = Image.new("RGB", (2, 2), "red")
    raw = encoded(image, "png")
    (tmp_path / "a.png").write_bytes(raw)
    cells = ["a.png", tmp_path / "a.png", raw, {"bytes": raw, "path": "x.png"}, {"bytes": None, "path": "a.png"}]
    assert all(content(cell, tmp_path) == raw for cell in cells)
    for cell in (image, np.asarray(image), Image.new("RGBA", (2, 2), (255, 0, 0, 255))):
        assert np.array_equal(decode(content(cell)), image)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "there is no picture"),
        ("", "there is no picture"),
        (b"", "there is no picture"),
        (float("nan"), "there is no picture"),
        ({"bytes": None, "path": None}, "there is no picture"),
        (3, "int is no picture"),
        ("no.png", r"'.*no\.png' cannot be read \(No such file"),
        ("x" * 5000, r"x\.\.\.' cannot be read \(File name too long"),
        ("a\0.png", "cannot be read"),
    ],
)
def test_cells_without_a_picture(cell, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        content(cell, tmp_path)


def test_a_part_of_a_picture():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    for kind in ("png", "jpeg", "gif", "tiff", "webp"):
        raw = encoded(noise, kind)
        assert decode(raw).size == (40, 40)
        with pytest.raises(ValueError, match="cannot be decoded"):
            decode(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"cannot be decoded \(it is of no format that PIL knows\)"):
        decode(b"<html>not found</html>")
