"""The film strip: every frame with what was kept of it."""

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from hf_compress.show import strip

FRAMES = [Image.fromarray(np.full((16, 24, 3), 40 * i, np.uint8)) for i in range(6)]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are written."""
    made, save = [], matplotlib.figure.Figure.savefig

    def keep(self, *args, **kwargs):
        made.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return made


def test_a_row_per_method_and_a_column_per_moment(tmp_path, figures):
    """Pairs of frames are one moment; kept cells have their colour, counts stand above."""
    kept = {"one": [0, 7, 8, 12], "none": []}
    path = strip(FRAMES, kept, (3, 2, 3), tmp_path / "strip.png", notes={"one": "right"}, dim=1)
    assert Image.open(path).size[0] > 400
    (meaning,) = figures[0].legends
    assert [text.get_text() for text in meaning.get_texts()] == ["kept: in its own colours", "dropped: pale"]
    axes = np.array(figures[0].axes).reshape(3, 3)
    pictures = [[np.asarray(ax.images[0].get_array()) for ax in row] for row in axes]
    for t in range(3):
        assert np.allclose(pictures[0][t], 80 * t / 255)
        for name, row in zip(kept, pictures[1:]):
            for cell in range(6):
                y, x = cell // 3 * 8, cell % 3 * 8
                same = np.allclose(row[t][y : y + 8, x : x + 8], 80 * t / 255)
                assert same == (t * 6 + cell in kept[name]), (name, t, cell)
    assert [ax.get_title() for ax in axes[1]] == ["1 of 6", "2 of 6", "1 of 6"]
    assert axes[1, 0].get_ylabel() == "one\n4 of 18\nright" and axes[2, 0].get_ylabel() == "none\n0 of 18"


def test_long_videos_show_some_moments(tmp_path, figures):
    strip([FRAMES[0]] * 70, {"all": range(70 * 6)}, (70, 2, 3), tmp_path / "strip.png")
    assert len(figures[0].axes) == 2 * 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (2, 3)}, r"grid=\(2, 3\) must be \(moments"),
        ({"grid": (4, 2, 3)}, r"frames: 6 given; pass 4"),
        ({"frames": []}, r"frames: 0 given"),
        ({"kept_by_method": {}}, "is empty"),
        ({"kept_by_method": {"one": [18]}}, r"'one' keeps \[18\], which lie outside a video of 3 x 6"),
        ({"notes": {"two": "x"}}, r"notes for \['two'\]"),
        ({"dim": 2}, "dim=2"),
        ({"grid": (3, 2, 2)}, "gives cells"),
    ],
)
def test_refuses(change, message, tmp_path):
    arguments = {"frames": FRAMES, "kept_by_method": {"one": [0]}, "grid": (3, 2, 3), "path": tmp_path / "strip.png"}
    with pytest.raises(ValueError, match=message):
        strip(**arguments | change)
    assert not (tmp_path / "strip.png").exists()


def test_refuses_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        strip(FRAMES, {"one": [0]}, (3, 2, 3), tmp_path / "no" / "strip.png")
