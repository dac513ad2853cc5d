"""The server of transformers gives what the compressed model gives, asked by a real client."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from openai import OpenAI
from typer.testing import CliRunner

import hf_compress
from hf_compress.cli import main
from hf_compress.config import CompressionConfig, MethodConfig
from hf_compress.demo.dataset import load_scenes
from hf_compress.demo.recall_data import load_recall, prompt
from hf_compress.serve import dressed, place_of, server

ROOT = Path(__file__).parents[1]
CONFIG = CompressionConfig([MethodConfig("snapkv", 0.75, knobs={"window": 8})])


def test_a_dressed_checkpoint_is_restored_compressed(tmp_path):
    from transformers import AutoModelForCausalLM

    found = dressed(place_of("demo:recall"), tmp_path / "one", CONFIG)
    model = AutoModelForCausalLM.from_pretrained(found)
    assert model.compression.config == CONFIG
    bare = dressed(found, tmp_path / "two", None)
    assert AutoModelForCausalLM.from_pretrained(bare).compression is None
    assert all(file.is_symlink() for file in bare.iterdir() if file.name != "config.json")


def test_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        dressed(tmp_path, tmp_path / "new", None)
    with pytest.raises(ValueError, match="demo:llava"):
        place_of("demo:lava")
    with pytest.raises(ValueError, match="not within reach"):
        place_of("nobody/nothing")


def test_wrong_options_are_one_line():
    found = CliRunner().invoke(main, ["serve", "--method", "snpkv"])
    assert found.exit_code == 2 and "did you mean 'snapkv'" in found.stderr and found.stderr.count("\n") == 1


def test_what_keeps_it_from_serving_is_said_before_anything_is_fetched(monkeypatch):
    def fetched(model):
        raise AssertionError(f"{model} was asked for")

    monkeypatch.setattr("hf_compress.serve.place_of", fetched)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = CliRunner().invoke(main, ["serve", "--host", "127.0.0.1", "--port", str(port)])
    assert found.exit_code == 2 and f"port={port} of host='127.0.0.1' is not to be had (" in found.stderr
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    found = CliRunner().invoke(main, ["serve", "--host", "127.0.0.1", "--port", str(port)])
    assert found.exit_code == 2 and "pip install 'hf-compress[serve]'" in found.stderr


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def client():
    started = []

    def start(folder):
        port = free_port()
        options = {"host": "127.0.0.1", "port": port, "device": "cpu", "dtype": "float32", "non_blocking": True}
        started.append(server(folder, **options))
        found = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
        (model,) = found.models.list().data
        assert model.id == str(folder)
        return found, model.id

    yield start
    for one in started:
        one.kill_server()


def test_a_client_asks_about_a_text(client, tmp_path):
    rows = load_recall("test", contexts=1)
    ask, name = client(dressed(place_of("demo:recall"), tmp_path / "recall", CONFIG))
    model, tokenizer = hf_compress.load_demo("recall")
    model.compress(CONFIG)
    for row in rows:
        text = prompt(row["context"], row["question"])
        said = ask.completions.create(model=name, prompt=text, max_tokens=2, temperature=0).choices[0].text
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        own = tokenizer.decode(model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :])
        assert said.split() == own.split() == row["answer"].split()


def test_a_client_asks_about_a_picture(client, tmp_path):
    row = load_scenes("test", images=1, questions=1)[0]
    buffer = io.BytesIO()
    row["image"].save(buffer, "png")
    address = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    config = CompressionConfig([MethodConfig("divprune", 0.75)])
    ask, name = client(dressed(place_of("demo:llava"), tmp_path / "llava", config))
    content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": row["question"]}]
    turn = [{"role": "user", "content": content}]
    found = ask.chat.completions.create(model=name, messages=turn, max_tokens=6, temperature=0)
    assert found.choices[0].message.content.strip() == row["answer"]
    assert (
        json.loads((tmp_path / "llava" / "config.json").read_text())["compression_config"]["methods"][0]["ratio"]
        == 0.75
    )


def test_the_command_serves_until_it_is_interrupted():
    port = free_port()
    options = ["--method", "snapkv:window=8", "--ratio", "0.75", "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-c", "from hf_compress.cli import main; main()", "serve", "--model", "demo:recall"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=40)
            row = load_recall("test", contexts=1)[0]
            text = prompt(row["context"], row["question"])
            said = client.completions.create(model="demo:recall", prompt=text, max_tokens=2, temperature=0)
            assert said.choices[0].text.split() == row["answer"].split()
        finally:
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60)
    assert told.startswith(f"demo:recall, snapkv(ratio=0.75, window=8), at http://127.0.0.1:{port}/v1\n")
    assert "Traceback" not in told and "Application shutdown complete" in told, told
