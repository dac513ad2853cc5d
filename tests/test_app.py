"""The page: what it shows is what the model does, clients reach it, and a browser opens it with a result."""

import io
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

import hf_compress
from hf_compress.app import Studio, page
from hf_compress.cli import main
from hf_compress.demo.dataset import load_scenes
from tests import browser

ROW = load_scenes("test", images=2, questions=1)[1]


@pytest.fixture(scope="module")
def studio():
    return Studio("demo:llava", *hf_compress.load_demo("llava"), max_new_tokens=6)


@pytest.mark.parametrize("method", ["divprune", "fastv", "snapkv:window=8", "divprune+snapkv"])
def test_both_answers_and_what_they_took(studio, method):
    picture, bare, short, rows = studio.compare(ROW["image"], ROW["question"], method, 0.5)
    assert bare == ROW["answer"] and short and picture.size[0] > 400
    table = {name: values for name, *values in rows}
    assert table["visual tokens that enter"][1] == {"divprune": "196 -> 98", "divprune+snapkv": "196 -> 98"}.get(
        method, "196 -> 196" if method == "fastv" else "-"
    )
    whole, stored = (int(value.replace(",", "")) for value in table["bytes of the cache"])
    assert table["method"][1].startswith(method.split(":")[0].split("+")[0] + "(ratio=0.5")
    assert stored < 0.65 * whole and all(float(value) > 0 for value in table["first token, s"])
    assert studio.model.compression is None


def test_what_is_offered_can_act(studio):
    names = studio.methods()
    assert {"divprune", "snapkv", "fastv"} <= set(names) and "evs" not in names and "explainability" not in names


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((None, "what ?", "divprune", 0.5), "choose a picture"),
        ((ROW["image"], " ", "divprune", 0.5), "ask something"),
        ((ROW["image"], "what ?", "divprun", 0.5), "did you mean 'divprune'"),
        ((ROW["image"], "what ?", "fastv", 0.95), "cannot be reached"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_said(studio, values, message):
    with pytest.raises(ValueError, match=message):
        studio.compare(*values)
    assert studio.model.compression is None


def test_a_name_that_is_typed_is_the_first_that_fits():
    names = Studio("demo:qwen", *hf_compress.load_demo("qwen")).methods()
    assert {"fastv", "fastvid", "random", "kvrandom"} <= set(names)
    assert all(next(other for other in names if name in other) == name for name in names)


def test_pictures_are_taken_as_a_person_sees_them(studio):
    """White where they are transparent."""
    clear = Image.new("RGBA", (112, 112), (0, 0, 0, 0))
    seen = [
        studio.compare(i, "where is it ?", "divprune", 0.75)[0] for i in (clear, Image.new("RGB", (112, 112), "white"))
    ]
    assert np.array_equal(*map(np.asarray, seen))


def test_models_without_eyes_are_refused():
    with pytest.raises(ValueError, match="'demo:recall' reads no pictures; name one that does"):
        Studio("demo:recall", *hf_compress.load_demo("recall"))


def test_the_command_says_what_is_missing_before_it_loads(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    found = CliRunner().invoke(main, ["app", "--model", "nobody/nothing"])
    assert found.exit_code == 2 and found.stderr.count("\n") == 1
    assert "pip install 'hf-compress[app]'" in found.stderr


@pytest.fixture
def address(studio):
    pytest.importorskip("gradio")
    found = page(studio, ROW["image"], ROW["question"])
    _, local, _ = found.launch(prevent_thread_lock=True, quiet=True, inbrowser=False)
    yield local
    found.close()


def test_clients_take_turns(address, studio, tmp_path):
    """What they ask at the same time is answered one after the other; a refusal is theirs alone."""
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False)
    ROW["image"].save(tmp_path / "scene.png")
    picture = handle_file(tmp_path / "scene.png")
    methods = ["divprune", "nonsense", "snapkv:window=8", "fastv"]
    jobs = [client.submit(picture, "what color ?", method, 0.5, api_name="/compare") for method in methods]
    with pytest.raises(AppError, match="'nonsense' is not a method"):
        jobs.pop(1).result()
    names = [job.result()[3]["data"][0][2].partition("(")[0] for job in jobs]
    assert names == ["divprune", "snapkv", "fastv"] and studio.model.compression is None


def test_a_port_that_is_taken(address):
    found = CliRunner().invoke(main, ["app", "--port", address.rstrip("/").rpartition(":")[2]])
    assert found.exit_code == 2 and "is not to be had" in found.stderr and found.stderr.count("\n") == 1


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium")
def test_a_person_asks_in_a_browser(address, tmp_path):
    """It opens with a result; another ratio gives another one, so does a picture of one's own after a refusal."""
    ask = "[...document.querySelectorAll('button')].find(e => e.innerText.includes('Ask both')).click()"
    said = "[...document.querySelectorAll('textarea')].map(e => e.value)"
    own = Image.new("RGB", (112, 112), "white")
    ImageDraw.Draw(own).ellipse((40, 40, 90, 90), fill="red")
    own.save(tmp_path / "own.png")
    with browser.opened(address, tmp_path / "browser") as page:
        page.wait("document.body.innerText.includes('196 -> 49')")
        assert page.run(said)[1:] == [ROW["answer"]] * 2
        page.put("input[type=range]", "0.5")
        page.run(ask)
        page.wait("document.body.innerText.includes('divprune(ratio=0.5)')")
        assert "196 -> 98" in page.run("document.body.innerText")
        page.run("document.querySelector('button[aria-label=\"Remove Image\"]').click()")
        page.wait("document.body.innerText.includes('Drop Image Here')")
        page.run(ask)
        page.wait("document.body.innerText.includes('choose a picture first')")
        page.choose("input[type=file]", tmp_path / "own.png")
        page.put("textarea", "what color is the circle ?")
        page.wait("!document.body.innerText.includes('Drop Image Here')")
        page.run(ask)
        page.wait(f"{said}.slice(1).join() === 'red,red'")
        assert Image.open(io.BytesIO(page.picture())).size[0] > 1000
