"""The page of a sweep: what it says is what the folder holds, it needs nothing beside it, and a browser shows it."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import hf_compress
from hf_compress.cli import main
from hf_compress.demo.dataset import load_scenes
from hf_compress.evaluate import explore, sweep
from hf_compress.evaluate.results import Results
from hf_compress.evaluate.scoring import encode
from tests import browser

METHODS, RATIO = ["fastervlm", "tome", "snapkv", "fastv:layer=1"], 0.75


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "run"
    options = {"limit": 8, "progress": False, "timed": False, "device": "cpu"}
    sweep("demo:llava", "demo:scenes", METHODS, [RATIO], out=out, **options)
    explore(out, images=1, progress=False)
    return out


def data_of(page):
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r"^const D = (.*);$", text, re.MULTILINE)[1])


def test_the_page_says_what_the_folder_holds(folder):
    found, board = data_of(folder / "report.html"), Results.read(folder)
    assert set(METHODS) < set(found["methods"]) and found["ratios"] == [RATIO]
    assert [(r["method"], r["ratio"]) for r in found["rows"]] == [(r.method, r.ratio) for r in board.rows]
    (about,) = found["about"]
    rows = load_scenes("test", images=2, questions=4).select(range(4))
    assert [q["question"] for q in about["asked"]] == rows["question"]
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    for method in METHODS:
        first = next(r for r in answers if r["run"].startswith(f"{method}|") and r["row"] == 0)
        text, right = about["asked"][0]["said"][f"{method}|{RATIO}"]
        assert text == first["answer"] and right == (text.lower().split() == rows["answer"][0].lower().split())
    picture = Image.open(io.BytesIO(base64.b64decode(about["pictures"][0].partition(",")[2])))
    assert np.array_equal(np.asarray(picture), np.asarray(rows[0]["image"]))


def test_tokens_are_those_that_the_method_keeps(folder):
    found = data_of(folder / "report.html")
    (about,) = found["about"]
    model, processor = hf_compress.load_demo("llava")
    row = load_scenes("test", images=2, questions=4)[0]
    for method in ("fastervlm", "tome"):
        with model.compressed(method, ratio=RATIO):
            model(**encode(processor, [row["image"]], [row["question"]]))
            owners = model.compression.last.visual_owners[0][0]
        (view,) = about["views"][f"{method}|{RATIO}"]
        assert view["owner"] == owners and view["kept"] == len({owner for owner in owners if owner >= 0}) == 49
    assert found["grids"] == [[[8.0 * x, 8.0 * y, 8.0 * x + 8, 8.0 * y + 8] for y in range(14) for x in range(14)]]
    assert f"snapkv|{RATIO}" not in about["views"]  # it drops no tokens
    (fastv,) = about["views"][f"fastv:layer=1|{RATIO}"]
    assert fastv["kept"] < 49  # in the last layer; the mean over all is the budget


def test_nothing_is_fetched(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text) and "</script>" in text
    assert "<" not in re.search(r"^const D = (.*);$", text, re.MULTILINE)[1]


def test_texts_and_pages_without_a_model(tmp_path):
    out = tmp_path / "recall"
    options = {"limit": 4, "progress": False, "timed": False, "device": "cpu"}
    sweep("demo:recall", "demo:recall", ["knorm"], [0.5], out=out, **options)
    page = explore(out, tmp_path / "pages" / "one.html", progress=False)
    (about,) = data_of(page)["about"]
    assert about["pictures"] == [] and len(about["text"]) > 1000 and not about["views"] and len(about["asked"]) == 4


def test_frames_of_a_video(tmp_path, clip_processor):
    from hf_compress.evaluate.explorer import Explorer
    from hf_compress.evaluate.plan import Run
    from hf_compress.evaluate.tasks import load_task

    model, _ = hf_compress.load_demo("qwen")
    task = load_task("demo:clips", limit=1)
    run = Run("strided", 0.5)
    explorer = Explorer(None, task, {}, {run: "strided"})
    about = [{"row": 0, "views": {}, "why": {}}]
    explorer.look(model, clip_processor, about, progress=False)
    views = about[0]["views"]["strided|0.5"]
    assert [view["picture"] for view in views] == list(range(0, 16, 2))  # two frames are one moment
    tokens, kept = sum(len(view["owner"]) for view in views), sum(view["kept"] for view in views)
    assert kept == tokens // 2 and all(sum(o >= 0 for o in view["owner"]) == view["kept"] for view in views)


def test_the_command(folder, tmp_path):
    found = CliRunner().invoke(main, ["report", str(folder), "--no-tokens", "--out", str(tmp_path / "page.html")])
    assert found.exit_code == 0 and found.stdout == f"wrote {tmp_path / 'page.html'}\n"
    assert not data_of(tmp_path / "page.html")["about"][0]["views"]
    found = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert found.exit_code == 2 and "holds no results.json" in found.stderr and found.stderr.count("\n") == 1


def test_other_questions_are_refused(folder):
    with pytest.raises(ValueError, match="not the questions of the sweep"):
        explore(folder, data="demo:scenes:mixed", progress=False)
    with pytest.raises(ValueError, match="images=0"):
        explore(folder, images=0, progress=False)


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium")
def test_a_person_clicks_in_a_browser(folder, tmp_path):
    """A method by its line in the table, then by its name; tokens are drawn, answers stand beside the right ones."""
    with browser.opened((folder / "report.html").as_uri(), tmp_path) as page:
        page.run("document.querySelector('tr.pick[data-method=tome]').click()")
        page.wait(f"document.querySelector('#tokens canvas')?.dataset.drawn === 'tome|{RATIO}'")
        assert "what reaches the last layer: 49 of 196 tokens" in page.run("document.body.innerText")
        assert page.run("document.querySelectorAll('#answers .yes, #answers .no').length") == 8
        colours = "new Set(document.querySelector('canvas').getContext('2d').getImageData(0, 0, 60, 60).data).size"
        merged = page.run(colours)
        page.run("(e => { e.value = 'fastervlm'; e.onchange({target: e}); })(document.querySelector('#method'))")
        page.wait(f"document.querySelector('#tokens canvas')?.dataset.drawn === 'fastervlm|{RATIO}'")
        assert page.run(colours) != merged and "method=fastervlm" in page.run("location.hash")
        page.run("(e => { e.value = 'snapkv'; e.onchange({target: e}); })(document.querySelector('#method'))")
        assert "no picture of its tokens" in page.run("document.querySelector('#kept').innerText")
        assert np.asarray(Image.open(io.BytesIO(page.picture())).convert("RGB")).std() > 10


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium")
def test_an_address_of_an_earlier_report(folder, tmp_path):
    """What is there no more is passed over, the rest is shown."""
    address = f"{(folder / 'report.html').as_uri()}#about=99&method=tome&ratio=0.123"
    with browser.opened(address, tmp_path) as page:
        page.wait(f"document.querySelector('#tokens canvas')?.dataset.drawn === 'tome|{RATIO}'")
