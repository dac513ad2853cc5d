import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from hf_compress.show import compare, overlay

IMAGE = np.full((28, 42, 3), 200, np.uint8)


def drawn(ax):
    return np.asarray(ax.images[0].get_array())


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_overlay_shows_kept_cells_and_fades_the_others():
    pixels = np.random.default_rng(0).integers(0, 256, (28, 42, 3), np.uint8)
    shown = drawn(overlay(Image.fromarray(pixels), torch.tensor([0, 5]).tolist(), (2, 3), title="two"))
    for i in range(6):
        cell = np.s_[i // 3 * 14 : i // 3 * 14 + 14, i % 3 * 14 : i % 3 * 14 + 14]
        same = np.allclose(shown[cell], pixels[cell] / 255)
        assert same == (i in (0, 5)), i
    assert shown[:14, 14:28].std() < (pixels[:14, 14:28] / 255).std()


def test_overlay_of_a_grid_that_does_not_divide_the_image():
    shown = drawn(overlay(IMAGE, range(35), (5, 7), dim=1))
    assert np.allclose(shown, IMAGE / 255)


def test_overlay_draws_on_given_axes_and_takes_grey_and_float_images():
    _, ax = plt.subplots()
    assert overlay(np.zeros((8, 8)), [], (2, 2), ax) is ax
    assert drawn(ax).shape == (8, 8, 3) and drawn(ax).min() > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IMAGE, [6], (2, 3)), "outside the 2 x 3 grid"),
        ((IMAGE, [-1], (2, 3)), "indices run from 0 to 5"),
        ((IMAGE, [1, 1], (2, 3)), "twice"),
        ((IMAGE, [[1]], (2, 3)), "visual_kept"),
        ((IMAGE, [], (0, 3)), "grid="),
        ((np.zeros((3, 8, 8)), [], (2, 2)), "permute"),
        ((np.full((8, 8, 3), -1.0), [], (2, 2)), "normalised"),
        ((np.full((8, 8, 3), np.nan), [], (2, 2)), "0..1"),
    ],
)
def test_overlay_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        overlay(*arguments)


def test_overlay_refuses_a_dim_outside():
    with pytest.raises(ValueError, match="dim=2"):
        overlay(IMAGE, [], (2, 3), dim=2)


def test_compare_writes_a_readable_png(tmp_path):
    kept = {"one": [[0], [1, 2]], "two": [[3], [4]]}
    path = compare([IMAGE, IMAGE], kept, (2, 3), ["first", "second"], tmp_path / "p.png", notes={"two": ["yes", "no"]})
    picture = np.asarray(Image.open(path))
    assert path == tmp_path / "p.png" and picture.shape[0] > 300 and picture[..., :3].std() > 10
    assert not plt.get_fignums()  # nothing is left open


def test_compare_refuses(tmp_path):
    with pytest.raises(ValueError, match="images"):
        compare([], {"a": []}, (2, 3))
    with pytest.raises(ValueError, match="kept_by_method"):
        compare([IMAGE], {}, (2, 3))
    with pytest.raises(ValueError, match="'a' has 2 entries for 1 images"):
        compare([IMAGE], {"a": [[0], [1]]}, (2, 3))
    with pytest.raises(ValueError, match="notes for"):
        compare([IMAGE], {"a": [[0]]}, (2, 3), notes={"b": ["x"]})
    with pytest.raises(FileNotFoundError, match="create it first"):
        compare([IMAGE], {"a": [[0]]}, (2, 3), path=tmp_path / "no" / "p.png")
