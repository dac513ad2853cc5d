"""The page: what it shows is what the model does, and a browser opens it with a result."""

import io

import pytest
from PIL import Image

import hf_compress
from hf_compress.app import Studio, page
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


@pytest.fixture
def address(studio):
    pytest.importorskip("gradio")
    found = page(studio, ROW["image"], ROW["question"])
    _, local, _ = found.launch(prevent_thread_lock=True, quiet=True, inbrowser=False)
    yield local
    found.close()


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium")
def test_a_person_asks_in_a_browser(address, tmp_path):
    """It opens with a result; another ratio and a click give another one."""
    with browser.opened(address, tmp_path) as page:
        page.wait("document.body.innerText.includes('196 -> 49')")
        assert page.run("[...document.querySelectorAll('textarea, input')].map(e => e.value)").count(ROW["answer"]) == 2
        page.run(
            """(() => { const box = document.querySelector('input[type=range]');
            Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(box, '0.5');
            box.dispatchEvent(new Event('input', {bubbles: true})); })()"""
        )
        page.run("[...document.querySelectorAll('button')].find(e => e.innerText.includes('Ask both')).click()")
        page.wait("document.body.innerText.includes('196 -> 98')")
        assert Image.open(io.BytesIO(page.picture())).size[0] > 1000
