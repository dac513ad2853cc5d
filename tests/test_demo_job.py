import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from hf_compress.demo.main_job import FULL_METHODS, METHODS, RATIOS, Row, Settings, conclusions, duration, run
from hf_compress.evaluate import score
from hf_compress.registry import get

SMALL = dict(images=2, questions=1, batch_size=2)


def quiet(width=100):
    return Console(file=io.StringIO(), width=width)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new"
    console = quiet(80)
    found = run(Settings.full(**SMALL, ratios=(0.89,), out=folder), console)
    return found, folder, console.file.getvalue()


def test_every_method_has_a_row_and_its_budget(result):
    found, _, text = result
    rows = {row.method: row for row in found.rows}
    assert list(rows) == ["none", "grey image", *FULL_METHODS]
    assert "…" not in text  # nothing is cut off at 80 columns
    for name in FULL_METHODS:
        assert name in text
        row = rows[name]
        if row.score is None:
            assert "reach" in row.note and row.stage == "decoder"
            continue
        assert row.score.total == 2
        assert all(0 < t.low <= t.median <= t.high for t in (row.against_full, row.against_native))
        assert row.visual == {"downsample": 20, "snapkv": 196, "kvrandom": 196}.get(name, 22)
        assert row.entries < 40
    assert rows["snapkv"].entries == rows["kvrandom"].entries == pytest.approx(0.11 * rows["none"].entries, abs=1)
    assert rows["random+kvrandom"].entries == rows["divprune+snapkv"].entries
    assert found.sentences[-1].startswith("Of 2 images no method is called better or worse")


def test_files(result):
    found, folder, text = result
    png, numbers = found.files
    assert png == folder / "hf-compress-demo.png" and f"wrote {png}" in text and f"wrote {numbers}" in text
    picture = np.asarray(Image.open(png).convert("RGB"))
    assert picture.std() > 20 and picture.shape[1] > 1000
    data = json.loads(numbers.read_text())
    assert len(data["rows"]) == len(found.rows) and data["machine"]["torch"]


def test_conclusions_follow_the_numbers():
    def row(name, right, stage="vision"):
        correct = [True] * right + [False] * (40 - right)
        return Row(name, stage, 0.9, score=score(correct), correct=correct)

    rows = [
        row("random", 20),
        row("divprune", 36),
        row("uniform", 20),
        row("tome", 4),
        row("kvrandom", 30, "cache"),
        row("snapkv", 30, "cache"),
        row("random+kvrandom", 10, "vision+cache"),
        row("divprune+snapkv", 20, "vision+cache"),
        Row("fastv", "decoder", 0.9, note="out of it"),
    ]
    first, tokens, entries, both, last = conclusions(rows, range(40))
    assert first == "Out of reach: fastv at out of it."
    assert tokens.startswith("Against random at ratio 0.9: more accurate: divprune (+40.0%")
    assert "not distinguishable: uniform" in tokens and "less accurate: tome" in tokens and "snapkv" not in tokens
    assert entries.startswith("Against kvrandom at ratio 0.9: not distinguishable: snapkv (+0.0%")
    assert both.startswith("Against random+kvrandom at ratio 0.9: more accurate: divprune+snapkv (+25.0%")
    assert "of 5 comparisons chance alone would call about 0.3 different" in last
    without = conclusions([r for r in rows if r.method != "random+kvrandom"], range(40))
    assert "No comparison of divprune+snapkv: 'random+kvrandom'" in without[-2]
    few = conclusions(rows, [i // 4 for i in range(40)])  # the same answers about ten images
    assert few[1:] == ["Of 10 images no method is called better or worse; ask about 20 or more."]


def test_accuracy_does_not_change_between_runs(result):
    found, folder, _ = result
    again = run(Settings(**SMALL, ratios=(0.89,), methods=("random", "tome"), out=folder), quiet())
    before = {row.method: row.correct for row in found.rows}
    assert all(before[row.method] == row.correct for row in again.rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(images=0), "images=0"),
        (dict(questions=21), "1 to 20"),
        (dict(methods=("fastvlm",)), "did you mean 'fastervlm'"),
        (dict(ratios=(1.0,)), "ratio=1.0"),
        (dict(methods=()), "at least one"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(Settings(**(SMALL | change), out=tmp_path / "out"), quiet())
    assert not (tmp_path / "out").exists()


def test_defaults_name_known_methods():
    assert all(get(part) for name in FULL_METHODS for part in name.split("+")) and set(METHODS) < set(FULL_METHODS)
    assert all(0 <= r < 1 for r in RATIOS)


def test_how_long_it_takes_is_said_before():
    assert Settings().asked == (2 + len(METHODS)) * 80 and "seconds" in duration(Settings())
    assert Settings.full().asked == (2 + 3 * len(FULL_METHODS)) * 160 and "minutes" in duration(Settings.full())
    assert "about 10 seconds" in duration(Settings(images=1))
    assert Settings.full(images=3).images == 3
