import subprocess
import sys

import pytest
from typer.testing import CliRunner

import hf_compress
from hf_compress.cli import main

invoke = CliRunner().invoke


def test_version():
    found = invoke(main, ["--version"])
    assert found.exit_code == 0 and found.output.strip() == hf_compress.__version__


def test_methods_lists_the_registry():
    found = invoke(main, ["methods"], env={"COLUMNS": "160"})
    assert found.exit_code == 0
    assert all(name in found.output for name in hf_compress.methods())
    found = invoke(main, ["methods", "--stage", "cache"], env={"COLUMNS": "160"})
    assert "snapkv" in found.output and "fastervlm" not in found.output


def test_architectures_lists_every_model_type():
    found = invoke(main, ["architectures"], env={"COLUMNS": "2000"})
    assert found.exit_code == 0
    assert all(name in found.output for name in hf_compress.architectures())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--methods", "fastvlm"], "fastervlm"),
        (["demo", "--ratios", "half"], "--ratios"),
        (["demo", "--ratios", "1.5"], "ratio=1.5"),
        (["demo", "--images", "0"], "images=0"),
        (["demo", "--images", "many"], "--images"),
        (["methods", "--stage", "tower"], "--stage"),
        (["nothing"], "nothing"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, message):
    found = invoke(main, arguments, env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    assert found.exit_code == 2 and message in found.output


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    found = invoke(main, ["demo", "--out", str(tmp_path / "file")], env={"COLUMNS": "200"})
    assert found.exit_code == 2 and "file" in found.output


def test_demo_runs(tmp_path):
    arguments = ["demo", "--images", "1", "--questions", "1", "--methods", "random,divprune+snapkv", "--ratios", "0.5"]
    found = invoke(main, [*arguments, "--batch-size", "1", "--out", str(tmp_path)], env={"COLUMNS": "100"})
    assert found.exit_code == 0, found.output
    assert "divprune+snapkv" in found.output and (tmp_path / "hf-compress-demo.png").exists()


def test_import_is_cheap():
    heavy = {"sklearn", "matplotlib", "datasets"}
    code = f"import sys, hf_compress.cli; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


EVAL = ["eval", "--model", "demo:llava", "--data", "demo:scenes", "--limit", "2", "--device", "cpu", "--no-time"]


def test_eval_and_leaderboard_run(tmp_path):
    out = str(tmp_path / "run")
    arguments = [*EVAL, "--methods", "fastv,divprune:positions=original", "--ratios", "0.5", "--out", out]
    found = invoke(main, [*arguments, "--knob", "fastv.layer=2"])
    assert found.exit_code == 0, found.output
    assert "| divprune:positions=original |" in found.output and "| *random* |" in found.output
    assert '"fastv": {"layer": 2}' in (tmp_path / "run" / "leaderboard.md").read_text()
    page = tmp_path / "page.md"
    found = invoke(main, ["leaderboard", out, "--out", str(page)])
    assert found.exit_code == 0 and "fastv" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "fastvlm"], "fastervlm"),
        (["--methods", "fastv", "--ratios", "half"], "--ratios"),
        (["--methods", "fastv", "--knob", "fastv"], "METHOD.NAME=VALUE"),
        (["--methods", "fastv", "--metric", "bleu"], "exact_match"),
        (["--methods", "fastv", "--limit", "0"], "--limit"),
        (["--methods", "fastv", "--protocol", "chat"], "two-turn"),
    ],
)
def test_bad_arguments_of_eval(arguments, message, tmp_path):
    environment = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    found = invoke(main, [*EVAL, "--out", str(tmp_path / "out"), *arguments], env=environment)
    assert found.exit_code == 2 and message in found.output
    assert not (tmp_path / "out").exists()


def test_leaderboard_needs_results(tmp_path):
    found = invoke(main, ["leaderboard", str(tmp_path), "--out", str(tmp_path / "page.md")], env={"COLUMNS": "200"})
    assert found.exit_code == 2 and "results.json" in found.output


def test_bench_has_its_own_help():
    found = invoke(main, ["bench", "--help"], env={"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"})
    assert found.exit_code == 0 and "parity" in found.output
