import csv
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import hf_compress
from hf_compress import catalog
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


def listed(*arguments):
    found = invoke(main, ["methods", *arguments, "--json"])
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def test_methods_are_searched_by_all_words():
    video = {entry["name"] for entry in listed("video")}
    assert {s.name for s in hf_compress.methods().values() if "video" in s.needs} <= video and "snapkv" not in video
    assert [entry["name"] for entry in listed("VisionZip:")] == ["visionzip"]  # a word of the title
    assert [entry["name"] for entry in listed("2404.14469")] == ["snapkv"]
    both = {entry["name"] for entry in listed("merging", "cls")}
    assert "visionzip" in both and "tome" not in both and "fastervlm" not in both
    found = invoke(main, ["methods", "repeat", "context"], env={"COLUMNS": "80"})
    assert "kvzip\n" in found.output and "cost" in found.output and "best for many" in found.output
    assert "1 method." in invoke(main, ["methods", "2404.14469"], env={"COLUMNS": "80"}).output


def test_methods_by_name_list_their_knobs():
    found = invoke(main, ["methods", "snapkv"], env={"COLUMNS": "120"})
    assert found.exit_code == 0
    for knob, default in hf_compress.methods()["snapkv"].knobs.items():
        assert any(line.split()[:2] == [knob, repr(default)] for line in found.output.splitlines()), knob
    assert 'model.compress("snapkv", ratio=0.5, window=4)' in found.output
    (entry,) = listed("snapkv")
    assert entry["knobs"]["window"] == 32 and entry["meanings"]["window"] == "observation window in tokens."


def test_explain_says_what_the_docstring_says():
    found = invoke(main, ["explain", "visionzip"], env={"COLUMNS": "100"})
    text = " ".join(found.output.split())
    for paragraph in inspect.getdoc(hf_compress.methods()["visionzip"].cls).partition("Args:")[0].split("\n\n"):
        assert " ".join(paragraph.split()) in text
    assert "contextual 0.15625" in text and "a [CLS] attention row, or a surrogate of it" in text
    assert json.loads(invoke(main, ["explain", "visionzip", "--json"]).stdout)["text"].startswith("Dominant tokens")


def test_explain_says_how_a_method_did():
    """As the leaderboard has it, beside random tokens and the uncompressed model; nothing where it was not judged."""
    with (Path(hf_compress.__file__).parents[1] / "benchmarks" / "leaderboard.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == "demo:llava" and row["protocol"] == "one-turn"]
    found = json.loads(invoke(main, ["explain", "divprune", "--json"]).stdout)["boards"]["demo:llava, one-turn"]
    assert set(found) == {"divprune", "random", "none"} and len(found["divprune"]) == 4
    for row in rows:
        if row["method"] in found and row["accuracy"]:
            assert found[row["method"]][row["ratio"]] == pytest.approx(float(row["accuracy"]), abs=6e-5)
    shown = invoke(main, ["explain", "divprune"], env={"COLUMNS": "100"}).output
    assert "right on demo:llava, one-turn, %" in shown and f"{100 * found['none']['']:.1f}" in shown
    assert "kvrandom" in invoke(main, ["explain", "snapkv"]).output
    assert catalog.boards("evs").get("demo:recall, one-turn") is None and catalog.boards("unheard of") == {}


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["methods", "snpkv"], "did you mean snapkv"),
        (["methods", "unheard-of"], "try a kind (control, saliency"),
        (["methods", "snapkv", "--stage", "vision"], "no method matches"),
        (["explain", "snpkv"], "did you mean 'snapkv'"),
    ],
)
def test_a_method_that_is_not_there_is_one_line(arguments, hint):
    found = invoke(main, arguments, env={"COLUMNS": "80"})
    assert found.exit_code == 2 and found.stderr.startswith("Error: ") and found.stderr.count("\n") == 1
    assert hint in found.stderr


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
    assert found.output.startswith("4 questions, about 10 seconds on one core")
    stages = [line for line in found.output.splitlines() if " of 4 questions in " in line]  # piped: a line a stage
    assert [line.partition(":")[0] for line in stages] == [
        "load the model", "uncompressed", "random 0.5", "divprune+snapkv 0.5",
    ]  # fmt: skip


COMMANDS = [
    "",
    "demo",
    "eval",
    "leaderboard",
    "methods",
    "explain",
    "architectures",
    "bench",
    "bench parity",
    "bench table",
]


def python(code, **environment):
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_version_and_help_take_no_second():
    """CPU time of all of them in one process, start included; none imports what the work needs."""
    code = f"""
import sys, time
from typer.testing import CliRunner
from hf_compress.cli import main
for command in {COMMANDS}:
    found = CliRunner().invoke(main, [*command.split(), "--help"])
    assert found.exit_code == 0 and "--help" in found.output, command
assert CliRunner().invoke(main, ["--version"]).exit_code == 0
heavy = ("torch", "transformers", "datasets", "matplotlib")
print(time.process_time(), [name for name in heavy if name in sys.modules])
"""
    seconds, heavy = python(code).split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(seconds) < len(COMMANDS)  # far below a second each


@pytest.mark.parametrize(
    "first",
    [
        "import hf_compress.methods.base, hf_compress",
        "import hf_compress, transformers.models.auto.modeling_auto",
        "from transformers import PreTrainedModel; import hf_compress",
    ],
)
def test_models_get_their_methods_in_any_order_of_imports(first):
    code = f"""
{first}
from transformers import AutoConfig, PreTrainedModel
assert PreTrainedModel.compress is hf_compress.compress and PreTrainedModel.decompress is hf_compress.decompress
assert PreTrainedModel.compression is None
models = [(PreTrainedModel, "from_pretrained"), (PreTrainedModel, "save_pretrained")]
for cls, name in (*models, (AutoConfig, "from_pretrained")):
    function = getattr(vars(cls)[name], "__func__", vars(cls)[name])
    assert function.__globals__["__name__"] == "hf_compress.loading"
    assert function.__wrapped__.__globals__["__name__"].startswith("transformers.")
assert "divprune" in hf_compress.methods("vision")
assert all(getattr(hf_compress, name) for name in hf_compress.__all__)
"""
    python(code)


def test_an_import_that_failed_is_extended_when_it_succeeds():
    code = """
import hf_compress, sys
sys.modules["transformers.generation"] = None  # what modeling_utils imports
try:
    import transformers.modeling_utils
except ImportError:
    del sys.modules["transformers.generation"]
import transformers.modeling_utils as found
assert found.PreTrainedModel.compression is None
"""
    python(code)


def test_completion():
    words = {
        "hf-compress ev": "eval",
        "hf-compress methods --stage ": "vision\nprompt\ndecoder\ncache",
        "hf-compress explain fastv": "fastv\nfastvid",
        "hf-compress bench pa": "parity",
    }
    code = "from hf_compress.cli import main; main(prog_name='hf-compress')"
    for text, expected in words.items():
        asked = {"COMP_WORDS": text, "COMP_CWORD": str(len(text.split(" ")) - 1)}
        given = python(code, _HF_COMPRESS_COMPLETE="complete_bash", **asked).split()
        assert sorted(given) == sorted(expected.split())


WIDTHS = [{"COLUMNS": "50"}, {"COLUMNS": "80"}, {"COLUMNS": "160"}, {}]


@pytest.mark.parametrize("environment", WIDTHS, ids=lambda e: e.get("COLUMNS", "pipe"))
@pytest.mark.parametrize("command", ["architectures", "methods"])
def test_lists_can_be_read_at_any_width(command, environment):
    found = invoke(main, [command], env={"COLUMNS": None, **environment})
    lines = found.output.splitlines()
    assert found.exit_code == 0 and max(map(len, lines)) <= int(environment.get("COLUMNS", 80))
    words = set(found.output.replace(",", " ").split())
    for entry in json.loads(invoke(main, [command, "--json"]).output):
        texts = [
            *entry.get("model_types", []),
            *entry.get("stages", []),
            *entry.get("gives", []),
            entry.get("name", ""),
        ]
        texts += [*entry.get("needs", []), entry.get("stage", ""), entry.get("paper", ""), entry.get("summary", "")]
        cut = {word for text in texts for word in text.replace(",", " ").split()} - words
        assert not cut


def test_bars_of_other_packages_are_not_drawn_into_a_pipe():
    bar = "from tqdm.auto import tqdm; list(tqdm(range(9)))"
    plain = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}  # other tests may have set it
    for before, shown in (("", True), ("from hf_compress.command import quiet; quiet(); ", False)):
        done = subprocess.run([sys.executable, "-c", before + bar], capture_output=True, text=True, env=plain)
        assert ("9/9" in done.stderr) is shown, done.stderr


@pytest.mark.parametrize(
    ("model", "terminal", "shown"),
    [("demo:llava", True, False), ("a/hub-name", True, True), ("a/hub-name", False, False)],
)
def test_what_has_to_be_fetched_shows_how_far_it_is(model, terminal, shown):
    """14 GB take longer than two seconds; those of the package do not, and nobody looks at a pipe."""
    done = python(
        "import os, sys; os.environ.pop('HF_HUB_DISABLE_PROGRESS_BARS', None)\n"
        f"sys.stderr.isatty = lambda: {terminal}; from hf_compress.command import quiet; quiet({model!r})\n"
        "import huggingface_hub, transformers; print(huggingface_hub.utils.are_progress_bars_disabled(),"
        " transformers.utils.logging.is_progress_bar_enabled())"
    )
    assert done.split() == [str(not shown), str(shown)]


def test_output_that_is_not_utf_8(tmp_path):
    run = CliRunner(charset="ascii").invoke
    for arguments in (["architectures"], ["methods"], ["eval", "--help"], ["leaderboard", str(tmp_path / "Größe→✓")]):
        found = run(main, arguments)
        assert not isinstance(found.exception, UnicodeError), arguments
    assert found.exit_code == 2 and found.stderr.count("\n") == 1
    arguments = [*EVAL, "--methods", "fastervlm", "--ratios", "0.89", "--out", str(tmp_path / "out")]
    found = run(main, arguments)
    assert found.exit_code == 0, found.output
    assert "Bold with *" in found.output and "fastervlm" in found.output


def test_what_the_encoding_lacks_is_replaced_by_what_is_near():
    code = ascii("1–2 → 3 × ✓ ü")
    code = f"from hf_compress.screen import readable; readable(); print({code})"
    assert python(code, PYTHONIOENCODING="ascii").strip() == "1-2 -> 3 x * ?"
    assert (
        python(code, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", PYTHONIOENCODING="").strip()
        == "1-2 -> 3 x * ?"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "--model", "demo:llava", "--data", "/no/such.csv", "--out", "out"],
        ["eval", "--model", "/no/such", "--data", "demo:scenes", "--out", "out"],
        ["eval", "--model", "demo:llava", "--data", "demo:scenes", "--limit", "1", "--out", "/dev/null/out"],
        ["leaderboard", "/no/such"],
        ["bench", "table", "/no/such.json"],
        ["demo", "--out", "/dev/null/out"],
    ],
    ids=" ".join,
)
def test_a_broken_path_is_one_line(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = invoke(main, arguments, env={"COLUMNS": "80"})
    assert found.exit_code == 2 and found.exception.__class__ is SystemExit
    assert found.stderr.startswith("Error: ") and found.stderr.count("\n") == 1
    assert any(path in found.stderr for path in ("/no/such", "/dev/null"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", [["demo"], ["eval", "--model", "demo:llava", "--data", "demo:scenes", "--limit", "1"]]
)
def test_two_methods_of_one_stage_are_refused(command, tmp_path):
    out = tmp_path / "out"
    found = invoke(main, [*command, "--methods", "divprune,fastv+pyramiddrop", "--out", str(out)])
    assert found.exit_code == 2 and "both act in the decoder stage" in found.stderr and not out.exists()


def test_a_metric_that_cannot_judge_is_refused_before_a_model_is_loaded(tmp_path):
    out = tmp_path / "out"
    arguments = ["eval", "--model", "/no/such/model", "--data", "demo:scenes", "--limit", "1", "--out", str(out)]
    found = invoke(main, [*arguments, "--metric", "vqa_accuracy"])
    assert found.exit_code == 2 and "several people" in found.stderr and not out.exists()
    arguments[arguments.index("demo:scenes")] = "/no/such.csv"  # nor is the data read, if there is no such metric
    assert "exact_match" in invoke(main, [*arguments, "--metric", "bleu"]).stderr


EVAL = ["eval", "--model", "demo:llava", "--data", "demo:scenes", "--limit", "2", "--device", "cpu", "--no-time"]


def test_eval_and_leaderboard_run(tmp_path):
    out = str(tmp_path / "run")
    arguments = [*EVAL, "--methods", "fastv,divprune:positions=original", "--ratios", "0.5", "--out", out]
    found = invoke(main, [*arguments, "--knob", "fastv.layer=3"])
    assert found.exit_code == 0, found.output
    assert "\ndivprune:positions=original " in found.output and "\nrandom " in found.output
    found = invoke(main, [*arguments, "--knob", "fastv.layer=3", "--json"])
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert json.loads(found.stdout) == written
    assert '"fastv": {"layer": 3}' in (tmp_path / "run" / "leaderboard.md").read_text()
    page = tmp_path / "page.md"
    found = invoke(main, ["leaderboard", out, "--out", str(page)])
    assert found.exit_code == 0 and "fastv" in page.read_text()
    assert json.loads(invoke(main, ["leaderboard", out, "--out", str(page), "--json"]).stdout) == [written]
    found = invoke(main, ["leaderboard", out, "--times", out, "--out", str(page)], env={"COLUMNS": "200"})
    assert found.exit_code == 2 and "holds no times; judge without --no-time" in found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "fastvlm"], "fastervlm"),
        (["--methods", "fastv", "--ratios", "half"], "--ratios"),
        (["--methods", "fastv", "--knob", "fastv"], "METHOD.NAME=VALUE"),
        (["--methods", "sts", "--weights", "sts"], "METHOD=FOLDER"),
        (["--methods", "sts", "--weights", "sts=nowhere"], "name a folder that model.compression.save wrote"),
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
