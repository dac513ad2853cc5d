"""What lies in the folder of a sweep: what was written comes back, and a failure leaves it as it was."""

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from hf_compress.bench.results import File
from hf_compress.demo import main_job
from hf_compress.evaluate import judge, sweep
from hf_compress.evaluate.results import Results
from hf_compress.evaluate.store import Lines, claimed, open_folder
from hf_compress.saving import replaced, write_json

ROOT = Path(__file__).parents[2]
SMALL = dict(methods=["uniform"], ratios=[0.5], limit=2, timed=False, progress=False, device="cpu")


@contextmanager
def full_disk(room):
    """As if the disk had room for so many bytes per file: writes beyond fail half way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize(
    "odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\r\n", "\n", "\0", "\ud800", "é"]
)
def test_lines_are_what_was_written(odd, tmp_path):
    records = [{"run": "none", "row": i, "answer": f"first{odd}second"} for i in range(2)]
    Lines(tmp_path / "answers.jsonl").append(records)
    assert list(Lines(tmp_path / "answers.jsonl").found["none"].values()) == records


@pytest.mark.parametrize("line", [b"3", b"{}", b'{"run": 1}', b"[]", b"\xff", b"", b"null"])
def test_a_line_that_is_no_record_is_named(line, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"run": "a", "row": 0}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 2 is damaged"):
        Lines(path)


def test_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "answers.jsonl"
    lines = Lines(path)
    lines.append([{"run": "a", "row": 0}])
    before = path.read_bytes()
    with full_disk(len(before) + 10), pytest.raises(ValueError, match=r"answers\.jsonl.*cannot be written"):
        lines.append([{"run": "a", "row": 1, "answer": "x" * 100}])
    assert path.read_bytes() == before and lines.lacking("a", [0, 1]) == [1]
    lines.append([{"run": "a", "row": 1}])  # there is room again
    assert Lines(path).lacking("a", [0, 1]) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_device_that_is_full():
    with pytest.raises(ValueError, match=r"'/dev/full' cannot be written \(No space left on device\)"):
        Lines(Path("/dev/full")).append([{"run": "a", "row": 0}])


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "settings.json"
    write_json(path, {"a": 1})
    before = content(tmp_path)
    with full_disk(100), pytest.raises(ValueError, match=r"settings\.json"):
        write_json(path, {"a": "x" * 1000})
    with pytest.raises(KeyboardInterrupt), replaced(path) as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert content(tmp_path) == before
    (tmp_path / "link.json").symlink_to(path)
    write_json(tmp_path / "link.json", {"a": 2})
    assert (tmp_path / "link.json").is_symlink() and json.loads(path.read_text()) == {"a": 2}
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", {})  # as /dev/stdout and /dev/null: what is no file stays what it is
    assert os.read(reader, 10) == b"{}\n" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_results_of_a_bench_are_kept_on_a_full_disk(tmp_path):
    file = File(tmp_path / "bench.json")
    file.begin("cache", {})
    file.save()
    before = content(tmp_path)
    file.begin("cache", {"note": "x" * 1000})
    with full_disk(100), pytest.raises(ValueError, match=r"bench\.json.*cannot be written"):
        file.save()
    assert content(tmp_path) == before


def test_the_demo_finds_a_full_disk_before_it_loads_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr(main_job.hf_compress, "load_demo", lambda *_: pytest.fail("the model was loaded"))
    with full_disk(100), pytest.raises(ValueError, match="cannot be written"):
        main_job.run(main_job.Settings(out=tmp_path))


def test_torn_settings(tmp_path):
    """Without answers they are written anew, with answers they are missed by name."""
    for torn in ("", '{"a": 1', "[]"):
        (tmp_path / "settings.json").write_text(torn)
        open_folder(tmp_path, {"a": 1})
        assert json.loads((tmp_path / "settings.json").read_text()) == {"a": 1}
    (tmp_path / "answers.jsonl").write_text('{"run": "none", "row": 0}\n')
    for torn in ("", '{"a": 1', "[]"):
        (tmp_path / "settings.json").write_text(torn)
        with pytest.raises(ValueError, match=r"settings\.json' is damaged.*name another folder"):
            open_folder(tmp_path, {"a": 1})


def test_a_folder_without_answers_is_begun_anew(tmp_path):
    open_folder(tmp_path, {"batch_size": 64})
    (tmp_path / "answers.jsonl").write_bytes(b'{"run": "none", "ro')  # stopped within the first line
    (tmp_path / "refused.jsonl").write_text('{"run": "fastv", "reason": "of another model"}\n')
    open_folder(tmp_path, {"batch_size": 8})
    assert json.loads((tmp_path / "settings.json").read_text()) == {"batch_size": 8}
    assert not (tmp_path / "refused.jsonl").exists()
    (tmp_path / "answers.jsonl").write_bytes(b'{"run": "none", "row": 0}\n')
    with pytest.raises(ValueError, match=r"batch_size=8 \(now 4\)"):
        open_folder(tmp_path, {"batch_size": 4})


def test_a_failed_run_leaves_nothing_and_blocks_nothing(demo, tmp_path, monkeypatch):
    model, processor = demo
    out = tmp_path / "new" / "out"

    def fails(*_):
        raise MemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(judge, "reply", fails)
        with pytest.raises(MemoryError):
            sweep(model, "demo:scenes", processor=processor, out=out, batch_size=64, **SMALL)
        assert not any(tmp_path.iterdir())
    assert len(sweep(model, "demo:scenes", processor=processor, out=out, batch_size=2, **SMALL).rows) == 4


def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(judge, "load_task", lambda *_: pytest.fail("the data was loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file.out' cannot be written \(Not a directory\)"):
        sweep("demo:llava", "demo:scenes", out=tmp_path / "file" / "out", **SMALL)
    with full_disk(1000), pytest.raises(ValueError, match=r"new.out' cannot be written \(File too large\)"):
        sweep("demo:llava", "demo:scenes", out=tmp_path / "new" / "out", **SMALL)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_home_that_cannot_be_written_is_one_line(tmp_path):
    """In a process of its own: the libraries read the variables once. Found before the model is loaded."""
    (tmp_path / "file").touch()
    kept = {k: v for k, v in os.environ.items() if not k.endswith(("_CACHE", "_HOME"))}
    command = [sys.executable, "-m", "hf_compress.cli", "eval", "--model", "demo:nothing", "--data", "demo:scenes"]
    command += ["--methods", "uniform", "--ratios", ".5", "--limit", "2", "--no-time", "--out", str(tmp_path / "out")]
    environment = kept | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "file"), "COLUMNS": "1000"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and "set HF_HOME" in run.stderr and "Traceback" not in run.stderr, run.stderr[-2000:]
    assert not (tmp_path / "out").exists()


def test_two_runs_at_once(demo, tmp_path):
    """The second one is refused at once, and the folder is free when the first one ends, however it does."""
    model, processor = demo
    with pytest.raises(KeyError), claimed(tmp_path):
        with pytest.raises(ValueError, match="another run is at work"):
            sweep(model, "demo:scenes", processor=processor, out=tmp_path, **SMALL)
        raise KeyError
    sweep(model, "demo:scenes", processor=processor, out=tmp_path, **SMALL)
    with claimed(tmp_path):
        assert (tmp_path / "results.json").exists()


def test_other_knobs_are_other_rows_and_never_a_mean(demo, tmp_path):
    """Each row says what a folder of its own says, and is compared with the control of its own setting."""
    model, processor = demo
    options = dict(SMALL, methods=["divprune+fastv"], limit=4, batch_size=4)
    layers, apart = (1, 2), {}
    for layer in layers:
        knobs = {"fastv": {"layer": layer}}
        alone = sweep(model, "demo:scenes", processor=processor, out=tmp_path / str(layer), knobs=knobs, **options)
        apart[layer] = {row.method: row for row in alone.rows}
        together = sweep(model, "demo:scenes", processor=processor, out=tmp_path / "both", knobs=knobs, **options)
    rows = {row.method: row for row in together.rows}
    assert len(rows) == len(together.rows) == 1 + 2 * 4
    for layer in layers:
        for part in ("divprune", "random"):
            row, wanted = rows[f"{part}+fastv:layer={layer}"], apart[layer][f"{part}+fastv"]
            assert {**vars(row), "method": wanted.method} == vars(wanted)
    first, second = (rows[f"divprune+fastv:layer={layer}"] for layer in layers)
    assert first.knobs == '{"fastv": {"layer": 1}}' and first.visual != second.visual and first.seeds == 1


def test_results_without_a_method_that_could_be_done(demo, tmp_path):
    """The reasons are written, and no picture of nothing."""
    model, processor = demo
    knobs = {"fastv": {"layer": 5}}
    options = dict(SMALL, methods=["divprune+fastv"], ratios=[0.9])
    found = sweep(model, "demo:scenes", processor=processor, out=tmp_path, knobs=knobs, **options)
    assert [row.method for row in found.rows if row.accuracy] == ["none"] and all(r.note for r in found.rows[1:])
    assert not (tmp_path / "pareto.png").exists() and "pareto.png" not in (tmp_path / "leaderboard.md").read_text()


def test_damaged_results_are_named(tmp_path):
    for torn, why in (
        ("", "damaged"),
        ("[]", "damaged"),
        ('{"rows": []}', "another version"),
        ("{}", "another version"),
    ):
        (tmp_path / "results.json").write_text(torn)
        with pytest.raises(ValueError, match=rf"results\.json' is .*{why}.*hf-compress eval --out"):
            Results.read(tmp_path)
