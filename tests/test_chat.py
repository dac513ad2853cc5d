"""A conversation is what the model gives when it is fed the same tokens in one piece."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import hf_compress
from hf_compress.chat import Chat
from hf_compress.cli import main
from hf_compress.demo.dataset import load_scenes
from hf_compress.evaluate.prompts import render_turn

ROWS = load_scenes("test", images=1, questions=3)
IMAGE = ROWS[0]["image"]


@pytest.fixture(scope="module")
def llava():
    return hf_compress.load_demo("llava")


@pytest.mark.parametrize(
    "method", [None, ("divprune", {"ratio": 0.75}), ("snapkv", {"ratio": 0.5, "window": 4})], ids=str
)
def test_turns_go_on_with_the_cache(llava, method):
    model, processor = llava
    if method is not None:
        model.compress(method[0], **method[1])
    try:
        talk = Chat(model, processor, IMAGE, max_new_tokens=6)
        said = []
        turns = [talk.ask(row["question"], said.append) for row in ROWS]
    finally:
        if method is not None:
            model.decompress()
    assert turns[0].answer == ROWS[0]["answer"] and "".join(said).strip() == "".join(t.answer for t in turns)
    assert all(0 < turn.first <= turn.total and turn.length <= 6 for turn in turns)
    # the whole conversation, fed at once, is continued alike
    ids = talk._inputs["input_ids"]
    assert turns[1].fed < 30 < turns[0].fed and turns[1].visual == 0
    if method is None:
        assert turns[0].kv_bytes is None and "cache" not in str(turns[0])
        pixels = processor(images=IMAGE, text="USER: <image>\nx ASSISTANT:", return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0]
        last = slice(ids.shape[1] - turns[-1].length - 1, ids.shape[1] - 1)
        assert logits[last].argmax(-1).tolist() == ids[0, last.start + 1 :].tolist()
    else:
        assert (turns[0].visual, turns[0].kept) == ((196, 49) if method[0] == "divprune" else (0, 0))
        assert turns[1].full_kv_bytes > turns[0].full_kv_bytes > turns[0].kv_bytes


def test_what_the_template_writes_between(llava):
    assert render_turn(llava[1], "where is it ?") == "</s>USER: where is it ? ASSISTANT:"
    _, tokenizer = hf_compress.load_demo("recall")
    assert render_turn(tokenizer, "? anna stone") == " ? anna stone"  # no template

    class Single:
        chat_template = "{{ messages[0]['content'] }}"
        tokenizer = None

        def apply_chat_template(self, turns, **options):
            return "first"

    with pytest.raises(ValueError, match="takes no second question"):
        render_turn(Single(), "more")


def test_an_empty_question(llava):
    with pytest.raises(ValueError, match="ask something"):
        Chat(*llava, IMAGE).ask("  ")


invoke = CliRunner().invoke


def test_the_command(tmp_path):
    IMAGE.save(tmp_path / "photo.png")
    text = "\n".join(ROWS["question"][:2]) + "\n\nnot asked\n"
    options = ["--image", str(tmp_path / "photo.png"), "--device", "cpu", "--max-new-tokens", "6"]
    found = invoke(main, ["chat", *options], input=text)
    assert found.exit_code == 0, found.output
    assert found.stdout.splitlines()[0].strip() == ROWS[0]["answer"] and len(found.stdout.splitlines()) == 2
    assert "divprune(ratio=0.75" in found.stderr and found.stderr.count("196 -> 49 visual") == 1
    found = invoke(main, ["chat", *options, "--json", "--method", "none"], input=text)
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [line["question"] for line in lines] == ROWS["question"][:2] and lines[0]["answer"] == ROWS[0]["answer"]


def test_a_text_needs_no_method_to_be_named(tmp_path):
    (tmp_path / "notes.txt").write_text("the owner closes the shop at night . ruth miller new hammer . " * 4)
    options = ["--file", str(tmp_path / "notes.txt"), "--model", "demo:recall", "--device", "cpu"]
    found = invoke(main, ["chat", *options], input="? ruth miller\n")
    assert found.exit_code == 0 and "LlamaForCausalLM, kvzip(ratio=0.75)" in found.stderr, found.output


@pytest.mark.parametrize("command", [["show"], ["chat", "--image"]], ids=" ".join)
def test_what_is_no_picture_is_named(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.jpg").write_text("milk, bread")
    found = invoke(main, [*command, "notes.jpg"])
    assert found.exit_code == 2 and found.stderr.startswith("Error: 'notes.jpg': the picture cannot be decoded")


def test_show_writes_the_picture(tmp_path):
    IMAGE.save(tmp_path / "photo.png")
    out = tmp_path / "kept.png"
    found = invoke(
        main, ["show", str(tmp_path / "photo.png"), "--method", "tome", "--out", str(out), "--device", "cpu"]
    )
    assert found.exit_code == 0, found.output
    assert "196 visual tokens, 49 enter the language model" in found.stdout
    assert np.asarray(Image.open(out)).std() > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat"], "name what to talk about"),
        (["chat", "--image", "no.png", "--file", "no.txt"], "name what to talk about"),
        (["chat", "--file", "no.txt"], "file='no.txt' cannot be read (No such file"),
        (["chat", "--file", "."], "file='.' cannot be read (Is a directory"),
        (["chat", "--image", "photo.png", "--model", "demo:recall", "--method", "snapkv"], "reads no pictures"),
        (["show", "photo.png", "--model", "demo:recall", "--method", "snapkv"], "reads no pictures"),
        (["show", "photo.png", "--out", "photo.png/kept.png"], "out='photo.png' is a file"),
        (["chat", "--image", "no.png"], "cannot be read"),
        (["show", "no.png"], "cannot be read"),
        (["show", "photo.png", "--method", "tom"], "did you mean 'tome'"),
        (["show", "photo.png", "--ratio", "1"], "ratio=1"),
        (["show", "photo.png", "--method", "none"], "--method"),
        (["show", "photo.png", "--dtype", "float99"], "dtype='float99' is not a dtype of weights"),
        (["show", "photo.png", "--dtype", "nn"], "dtype='nn' is not a dtype of weights"),
        (["chat", "--image", "photo.png", "--device", "tpu9"], "device='tpu9' cannot be used here"),
        (["show", "photo.png", "--out", "kept.jpg"], "kept.jpg is no name of a PNG"),
        (["show", "photo.png", "--model", "demo:lava"], "is not a demonstration model; there are: facts, llava"),
    ],
    ids=" ".join,
)
def test_what_is_wrong_is_said(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    IMAGE.save("photo.png")
    found = invoke(main, arguments, env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    assert found.exit_code == 2 and message in found.output and [p.name for p in tmp_path.iterdir()] == ["photo.png"]
