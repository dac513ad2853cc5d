"""Marks: how many chance alone gives, the correction for their number, and none from few images."""

from dataclasses import replace

import numpy as np
import pytest

from hf_compress.evaluate import mean_of
from hf_compress.evaluate.figures import _label
from hf_compress.evaluate.intervals import DIFFERENCES
from hf_compress.evaluate.results import Results
from hf_compress.evaluate.rows import ENOUGH, Row, correct, join, take_times
from hf_compress.evaluate.tables import by_chance, cell, markdown


def row(method, delta, control=False):
    """A method whose paired differences to random are `delta`, one per image."""
    found = mean_of(delta, bounds=DIFFERENCES)
    out = Row(method, "vision", 0.5, groups=len(delta), control=control, accuracy=(0.7, 0.6, 0.8))
    out.over, out.chance = {"random": (found.value, *found.interval())}, found.p_value()
    out.lost = ["random"] if out.over["random"][1] <= 0 else []
    return out


def page(rows):
    settings = dict(
        model="m",
        data="d",
        protocol="one-turn",
        questions=9,
        dtype="float32",
        batch_size=1,
        fingerprint="f",
        skipped=0,
        max_new_tokens=9,
    )
    bare = Row("none", "", None, accuracy=(0.9, 0.8, 1.0))
    machine = dict.fromkeys(("cpu", "device", "threads", "torch", "transformers", "hf_compress"), "x")
    return Results(settings, "exact_match", machine, "cpu", {}, {}, "a", 0.1, [bare, *rows])


def test_chance_alone():
    """128 methods that are as good as random: some are above it by their own interval, none after the correction."""
    rng = np.random.default_rng(0)
    one = page([row(f"m{i}", rng.choice([-1.0, 0.0, 1.0], 50).tolist()) for i in range(128)])
    correct([one])
    marks = [cell(r) for r in one.rows[1:]]
    lucky = sum("✓" in mark for mark in marks)
    assert 0 < lucky < 10 and not any("✓✓" in mark for mark in marks)
    said = by_chance([one])
    assert said in markdown([one]) and "128 comparisons" in said and "about 3.2 of the intervals" in said
    assert f"{lucky} are, 0 of them also after" in said


def test_a_method_that_is_better_stays_marked():
    rng = np.random.default_rng(0)
    rows = [row(f"m{i}", rng.choice([-1.0, 0.0, 1.0], 50).tolist()) for i in range(60)]
    better, control = row("better", [1.0] * 30 + [0.0] * 20), row("uniform", [1.0] * 50, control=True)
    one, other = page([*rows[:30], better]), page([*rows[30:], control])
    correct([one, other])
    assert cell(better) == "**70.0 ✓✓**" and _label(better) == "70 ✓✓"
    assert cell(control) == "70.0" and control.corrected is None
    ranked = sorted(r.chance for r in [*rows, better])  # Benjamini & Hochberg by hand: 61 comparisons on the page
    assert better.corrected == pytest.approx(61 * better.chance) and ranked[0] == better.chance


def test_few_images_get_no_mark():
    few, enough = row("few", [1.0] * (ENOUGH - 1)), row("enough", [1.0] * ENOUGH)
    worse = row("worse", [-1.0] * (ENOUGH - 1))
    one = page([few, enough, worse])
    correct([one])
    assert [cell(r) for r in (few, enough, worse)] == ["70.0", "**70.0 ✓✓**", "70.0"]
    assert not few.beats and "1 comparison with" in by_chance([one])
    assert "Nothing is marked" in by_chance([page([few])])
    enough.marked = False  # the uncompressed model answers at the floor
    assert cell(enough) == "70.0" and "Nothing is marked" in by_chance([page([enough])])


def test_boards_of_one_setting_are_joined():
    """Rows of both, each once; a refused one gives way; what differs is refused, and other settings stay apart."""
    control = row("uniform", [0.0] * 30, control=True)
    one, other = page([control, row("a", [1.0] * 30)]), page([control, row("b", [1.0] * 30)])
    refused = Row("c", "vision", 0.5, note="no weights")
    one.rows.append(refused)
    one.left_out, other.machine = {"b": "no weights", "x": "videos"}, {**one.machine, "cpu": "y"}
    other.rows.insert(1, row("c", [0.5] * 30))
    for boards in ([one, other], [one, other, other]):
        (found,) = join(boards)
        assert [r.method for r in found.rows] == ["none", "uniform", "a", "c", "b"]
        assert found.rows[3].accuracy and found.left_out == {"x": "videos"}
        assert found.machine == {**one.machine, "cpu": "x and y"}
    assert [r.method for r in one.rows] == ["none", "uniform", "a", "c"] and one.rows[-1] is refused
    other.rows[2] = replace(control, accuracy=(0.7, 0.6, 0.9))
    with pytest.raises(ValueError, match=r"m on d: .* differ in accuracy of 'uniform' at ratio 0.5; judge both in one"):
        join([one, other])
    other.settings = {**one.settings, "questions": 10}
    assert join([one, other]) == [one, other]


def test_times_of_a_sweep_of_few_questions():
    """They go to the rows of equal method, ratio and knobs, and the page says where they are from."""
    one, few = page([row("a", [1.0] * 30), row("b", [1.0] * 30), row("c", [1.0] * 30)]), page([row("a", [1.0] * 4)])
    few.settings |= {"questions": 4, "fingerprint": "other"}
    few.machine |= {"cpu": "quiet", "load": 1.0}
    assert "run of their own" not in markdown([one])
    with pytest.raises(ValueError, match="times='m on d' holds no times; judge without --no-time"):
        take_times([one], [few])
    few.rows[1].prefill, few.rows[1].decode, few.rows[1].prefill_range = 0.25, 0.75, (0.2, 0.3)
    few.rows.append(replace(few.rows[1], method="b", knobs='{"b": {"k": 1}}'))
    take_times([one], [few])
    a, b, c = one.rows[1:]
    assert (a.prefill, a.decode, a.prefill_range, a.accuracy) == (0.25, 0.75, (0.2, 0.3), (0.7, 0.6, 0.8))
    assert b.prefill is None and c.prefill is None
    said = markdown([one])
    assert "in a run of their own, of 4 questions, on quiet (x, x threads; load 1.0 at its end)" in said
    assert "0.25 (0.20–0.30)" in said and "9 questions" in said
    with pytest.raises(ValueError, match="has times already"):
        take_times([one], [few])
    few.settings["protocol"] = "two-turn"
    with pytest.raises(ValueError, match="no other folder is of this model"):
        take_times([page([row("a", [1.0] * 30)])], [few])


def test_methods_of_a_kind_stand_together_with_their_cost():
    """Kinds by their best method, methods by accuracy within, controls last; times at the ratio in the middle."""
    rows = []
    for at, ratio in enumerate((0.5, 0.75, 0.9)):
        for name, accuracy in dict(random=0.9, fastervlm=0.7, tome=0.8, vtc_cls=0.6, avgpool=0.3, mine=0.5).items():
            one = row(name, [0.5, 1.0] * 15, control=name == "random")
            one.ratio, one.accuracy, one.prefill, one.decode = ratio, (accuracy, 0.0, 1.0), 0.1 + at, 1.1 + at
            rows.append(one)
    shown = markdown([page(rows)]).split("###")[1].split("## ")[0]
    table = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ")]
    assert [line[0].strip("| ") for line in table[2:]] == [
        "tome", "avgpool", "fastervlm", "vtc_cls", "mine", "*random*"
    ]  # fmt: skip
    assert [line[1] for line in table[2:]] == ["merging", "merging", "saliency", "saliency", "", "control"]
    assert table[0][-2:] == ["prefill at 0.75", "decode at 0.75 |"] and table[2][-2:] == ["1.10", "2.10 |"]
    untimed = [row("tome", [0.5, 1.0] * 15)]
    assert "prefill at" not in markdown([page(untimed)]).split("###")[1]


def test_curves_show_the_intervals():
    """A bar from low to high for what is named: methods and controls, none for the others."""
    from matplotlib.figure import Figure

    from hf_compress.evaluate.figures import NAMED, STYLES, _curves

    rows = [Row(f"method {i}", "vision", 0.5, accuracy=(0.9 - i / 100, 0.8, 0.95), visual=9.0) for i in range(10)]
    rows.append(Row("random", "vision", 0.5, control=True, accuracy=(0.5, 0.4, 0.65), visual=9.0))
    axis = Figure().subplots()
    _curves(axis, rows, lambda row: row.visual)
    bars = [tuple(bar.get_segments()[0][:, 1].round(2).tolist()) for bar in axis.collections]
    assert sorted(bars) == sorted([(40.0, 65.0)] + [(80.0, 95.0)] * len(NAMED))
    assert {line.get_marker() for line in axis.get_lines() if "method" in str(line.get_label())} == set(NAMED.values())
    assert page(rows)._repr_markdown_() == page(rows).overview()
    for controls in (("random", "uniform", "downsample"), ("kvrandom", "streaming"), ("uniform", "strided", "frames")):
        assert len({STYLES[name][1] for name in controls}) == len(controls)  # told apart where each is one point


def test_a_text_has_no_visual_tokens():
    """Methods that take rows of a text out of the model stand under their own heading, and without a control say so."""
    one = page([row("zipvl", [0.5, 1.0] * 15)])
    assert "### Fewer visual tokens" in markdown([one])
    one.rows[0].visual = 0.0
    said = markdown([one])
    assert "### Fewer tokens of the prompt\n\nThere is no control with the same budget.\n" in said
    one.rows.append(row("random", [0.0] * 30, control=True))
    assert "The controls `random` keep as many" in markdown([one])
