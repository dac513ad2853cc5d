"""The judge end to end on the trained models: what it asks, stops and goes on, refuses, and says."""

import copy
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import hf_compress
from hf_compress.demo.dataset import load_scenes
from hf_compress.demo.recall_data import load_recall
from hf_compress.engine import trained
from hf_compress.evaluate import answer, exact_match, judge, leaderboard, sweep
from hf_compress.evaluate.plan import Run
from hf_compress.evaluate.prompts import encode_rows, reply
from hf_compress.evaluate.results import Results
from hf_compress.evaluate.store import Lines
from hf_compress.evaluate.tasks import load_task
from hf_compress.evaluate.times import time_run

CHECK = trained.check_trained  # as it is outside of the tests, see conftest.py
METHODS = ["divprune", "fastv", "divprune+snapkv"]
SMALL = dict(methods=METHODS, ratios=[0.89], limit=6, batch_size=4, timed=False, progress=False, device="cpu")


@pytest.fixture(scope="module")
def swept(demo, tmp_path_factory):
    """Six questions."""
    model, processor = demo
    out = tmp_path_factory.mktemp("sweep") / "new"
    before = dict(model.__dict__), dict(model.config.__dict__)
    results = sweep(model, "demo:scenes", processor=processor, out=out, **SMALL)
    assert model.compression is None and (dict(model.__dict__), dict(model.config.__dict__)) == before
    return results, out


def lines(out):
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def by_method(results):
    return {row.method: row for row in results.rows}


def test_rows_and_controls(swept):
    results, _ = swept
    rows = by_method(results)
    both = {"random+kvrandom", "uniform+streaming", "downsample+streaming"}
    assert set(rows) == {"none", "random", "uniform", "downsample", *METHODS, *both}
    assert {name for name, row in rows.items() if row.control} == {"random", "uniform", "downsample", *both}
    assert rows["random"].seeds == rows["random+kvrandom"].seeds == 3 and rows["random"].spread
    assert set(rows["divprune"].over) == {"random", "uniform", "downsample"}
    assert results.title == "demo:llava on demo:scenes"  # a model object from load_demo has its name


def test_answers_are_those_of_the_model(demo, swept):
    """Asked by hand, other batches, the same answers and score."""
    model, processor = demo
    results, out = swept
    data = load_scenes("test", images=2, questions=4).select(range(6))
    said = {}
    for line in lines(out):
        said.setdefault(line["run"].split("|")[0], {})[line["row"]] = line["answer"]
    bare = answer(model, processor, data, 3)
    assert [said["none"][i] for i in range(6)] == bare
    with model.compressed("divprune", ratio=0.89):
        compressed = answer(model, processor, data, 3)
    assert [said["divprune"][i] for i in range(6)] == compressed
    row = by_method(results)["divprune"]
    assert row.accuracy[0] == np.mean(exact_match(compressed, data["answer"]))
    assert row.agreement == np.mean([a == b for a, b in zip(compressed, bare)])


def test_realised_budgets(swept):
    rows = by_method(swept[0])
    none, ours, both = rows["none"], rows["divprune"], rows["divprune+snapkv"]
    assert none.visual == 196 and none.kv_share == 1 and ours.visual == rows["random"].visual == 22
    assert ours.entries == pytest.approx(none.entries - 174)
    assert rows["downsample"].visual == 20
    assert both.visual == 22 and both.entries < 0.12 * ours.entries and both.kv_share < 0.12 * ours.kv_share
    assert 0.1 < ours.kv_share < 0.2


def test_times(demo, swept, tmp_path, monkeypatch):
    """Every method and ratio once, whatever its seeds; a second call has nothing left to time."""
    timed = []

    def fake(model, run, batch):
        timed.append(run.method)
        return {"prefill": 0.5, "decode": 0.75}

    monkeypatch.setattr(judge, "time_run", fake)
    folder = tmp_path / "timed"
    shutil.copytree(swept[1], folder)
    for _ in range(2):
        results = sweep(demo[0], "demo:scenes", processor=demo[1], out=folder, **{**SMALL, "timed": True})
    rows = by_method(results)
    assert sorted(timed) == sorted(set(rows) - {"none", "fastv"})
    assert rows["none"].prefill is None and rows["random"].prefill == 0.5 and rows["divprune"].decode == 0.75


def test_a_method_is_timed_against_the_model(demo):
    model, processor = demo
    task = load_task("demo:scenes", 4)
    batch = encode_rows(processor, [0, 1, 2, 3], task.questions, task.shown(range(4)))
    found = time_run(model, Run("random", 0.9), batch)
    assert 0 < found["prefill"] < 1 and found["decode"] > 0 and model.compression is None


def test_what_cannot_be_done_is_a_row_with_the_reason(swept):
    results, out = swept
    row = by_method(results)["fastv"]
    assert row.accuracy is None and "layer 1 of 6" in row.note  # the knob that fits 6 layers is set
    assert "layer 1 of 6" in (out / "leaderboard.md").read_text()


def test_files(swept):
    results, out = swept
    again = Results.read(out)
    assert [vars(r) for r in again.rows] == json.loads(json.dumps([vars(r) for r in results.rows]))
    assert again.machine["torch"] and again.settings["fingerprint"]
    table = list(csv.DictReader((out / "leaderboard.csv").open()))
    assert [line["method"] for line in table] == [row.method for row in results.rows]
    assert np.asarray(Image.open(out / "pareto.png").convert("L")).std() > 10


def stopped(out, folder, share=0.6):
    """As if the sweep had been killed while it wrote a line."""
    folder.mkdir()
    shutil.copy(out / "settings.json", folder)
    raw = (out / "answers.jsonl").read_bytes()
    (folder / "answers.jsonl").write_bytes(raw[: int(len(raw) * share)])
    return folder


def test_a_stopped_run_goes_on(demo, swept, tmp_path, monkeypatch):
    model, processor = demo
    results, out = swept
    folder = stopped(out, tmp_path / "stopped")
    asked = []

    def count(model, processor, batch, limit):
        asked.extend(batch.rows)
        return reply(model, processor, batch, limit)

    monkeypatch.setattr(judge, "reply", count)
    again = sweep(model, "demo:scenes", processor=processor, out=folder, **SMALL)
    key = lambda line: (line["run"], line["row"])
    assert sorted(lines(folder), key=key) == sorted(lines(out), key=key)  # nothing lost, nothing twice
    assert 0 < len(asked) < 0.6 * len(lines(out))
    assert [row.accuracy for row in again.rows] == [row.accuracy for row in results.rows]
    asked.clear()
    sweep(model, "demo:scenes", processor=processor, out=folder, **SMALL)
    assert not asked


def test_more_methods_may_come_later(demo, swept, tmp_path):
    model, processor = demo
    folder = tmp_path / "more"
    shutil.copytree(swept[1], folder)
    options = {**SMALL, "methods": ["tome"]}
    results = sweep(model, "demo:scenes", processor=processor, out=folder, **options)
    rows = by_method(results)
    assert set(rows) == {"tome", *by_method(swept[0])} and rows["tome"].over
    assert (
        "layer 1 of 6" in rows["fastv"].note and rows["divprune"].accuracy == by_method(swept[0])["divprune"].accuracy
    )


def test_another_setting_is_refused(demo, swept):
    model, processor = demo
    for change, message in (({"batch_size": 3}, r"batch_size=4 \(now 3\)"), ({"limit": 5}, r"questions=6 \(now 5\)")):
        with pytest.raises(ValueError, match=message):
            sweep(model, "demo:scenes", processor=processor, out=swept[1], **{**SMALL, **change})


def test_leaderboard_joins_folders(swept, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(swept[1], other)
    data = json.loads((other / "results.json").read_text())
    data["settings"]["data"] = "demo:others"
    (other / "results.json").write_text(json.dumps(data))
    files = leaderboard([swept[1], other], tmp_path / "new" / "page.md")
    page = files[0].read_text()
    assert all(page.count(f"## demo:llava on demo:{name}") == 1 for name in ("scenes", "others"))
    assert "✓" in page and all(f.exists() for f in files)
    assert all(f"![]({f.name})" in page for f in files if f.suffix == ".png")
    with pytest.raises(ValueError, match=r"results\.json"):
        leaderboard([tmp_path], tmp_path / "page.md")
    with pytest.raises(ValueError, match=r"\.md"):
        leaderboard([swept[1]], tmp_path / "page.txt")


def test_folders_of_one_title_are_told_apart_on_a_page(swept, tmp_path):
    """By the settings that differ; in the table too."""
    other = tmp_path / "other"
    shutil.copytree(swept[1], other)
    data = json.loads((other / "results.json").read_text())
    weights, data["settings"]["weights"] = data["settings"]["weights"], "ffff"
    (other / "results.json").write_text(json.dumps(data))
    page, table, *_ = leaderboard([swept[1], other], tmp_path / "page.md")
    for name in (weights, "ffff"):
        assert page.read_text().count(f"## demo:llava on demo:scenes (weights {name})") == 1
    assert {line["label"] for line in csv.DictReader(table.open())} == {f"weights {weights}", "weights ffff"}


def test_methods_are_added_to_a_page(demo, swept, tmp_path):
    """Judged later in another folder they stand in one table, as if all had been judged in one."""
    model, processor = demo
    given = {**SMALL, "processor": processor}
    sweep(model, "demo:scenes", out=tmp_path / "more", **{**given, "methods": ["vispruner", "fastv"]})
    shutil.copytree(swept[1], tmp_path / "all")
    sweep(model, "demo:scenes", out=tmp_path / "all", **{**given, "methods": [*METHODS, "vispruner"]})
    pages = [[swept[1], tmp_path / "more"], [tmp_path / "all"]]
    tables = [leaderboard(folders, tmp_path / f"{n}.md")[1] for n, folders in enumerate(pages)]
    joined, whole = ({line["method"]: line for line in csv.DictReader(t.open())} for t in tables)
    assert joined == whole and "vispruner" in joined
    assert (tmp_path / "0.md").read_text().count("## demo:llava on demo:scenes\n") == 1


def test_two_turns_on_the_bare_model_are_one(demo):
    """The prompt is the same text, split before the question; so are the answers."""
    model, processor = demo
    task = load_task("demo:scenes", 4)
    questions = ["what digit is at the top left ?", "what digit is at the top right ?"]
    shown = task.shown([0, 2])
    said = {}
    for protocol in ("one-turn", "two-turn"):
        batch = encode_rows(processor, [0, 1], questions, shown, protocol)
        said[protocol] = [r["answer"] for r in reply(model, processor, batch)]
        with model.compressed("divprune", ratio=0.5):
            said[protocol] += [r["answer"] for r in reply(model, processor, batch)]
    assert said["one-turn"] == said["two-turn"] and all(said["one-turn"])


def test_recall_in_both_protocols(tmp_path):
    """The same questions; hiding them from the compression costs a method that looks at them most of its answers."""
    model, tokenizer = hf_compress.load_demo("recall")
    found = {}
    data = load_recall("test", contexts=2)
    for protocol in ("one-turn", "two-turn"):
        results = sweep(
            model, data, "snapkv", [0.75], processor=tokenizer, out=tmp_path / protocol, protocol=protocol,
            batch_size=10, timed=False, progress=False,
        )  # fmt: skip
        found[protocol] = by_method(results)
    for rows in found.values():
        assert rows["none"].accuracy[0] == 1 and rows["none"].visual == 0
        assert set(rows["snapkv"].over) == {"random", "streaming"} and rows["snapkv"].kv_share == pytest.approx(
            0.25, rel=0.02
        )
    assert found["one-turn"]["none"].entries == 512 and found["two-turn"]["none"].entries == 509
    assert found["one-turn"]["snapkv"].accuracy[0] >= 0.9 > found["two-turn"]["snapkv"].accuracy[0] + 0.2
    ours = found["one-turn"]["snapkv"]
    assert ours.over["random"][0] > 0.5 and not ours.beats  # two contexts are no evidence
    assert ours.over["random"][1] < 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["fastvlm"]}, "fastervlm"),
        ({"ratios": [1.0]}, "ratio=1.0"),
        ({"protocol": "chat"}, "one-turn, two-turn"),
        ({"metric": "bleu"}, "exact_match"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"processor": None}, "processor=None"),
        ({"data": "demo:recall", "model": "demo:nobody"}, "nobody"),
        ({"knobs": {"fastv": {"depth": 1}}}, "depth"),
    ],
)
def test_wrong_arguments_leave_nothing_behind(demo, change, message, tmp_path):
    options = {"model": demo[0], "data": "demo:scenes", "processor": demo[1], "out": tmp_path / "out", **SMALL}
    with pytest.raises(ValueError, match=message):
        sweep(**{**options, **change})
    assert not (tmp_path / "out").exists()


def test_a_compressed_model_and_a_blind_one_are_refused(demo, tmp_path):
    model, processor = demo
    with model.compressed("random", ratio=0.5), pytest.raises(ValueError, match="decompress"):
        sweep(model, "demo:scenes", processor=processor, out=tmp_path / "out", **SMALL)
    training = copy.deepcopy(model).train()
    with pytest.raises(ValueError, match=r"model\.eval"):
        sweep(training, "demo:scenes", processor=processor, out=tmp_path / "out", **SMALL)
    with pytest.raises(ValueError, match="cannot see"):
        sweep("demo:recall", "demo:scenes", out=tmp_path / "out", **{**SMALL, "methods": ["snapkv"]})


def test_all_is_what_the_model_can_do():
    names, left_out = judge.everything(hf_compress.load_demo("recall")[0])
    assert "snapkv" in names and "visual tokens" in left_out["fastv"]
    assert {*names, *left_out} == set(hf_compress.methods())


def test_methods_that_are_trained(demo, tmp_path, monkeypatch):
    """With weights they are judged, and are what the same weights give by hand; without, refused; others are named."""
    monkeypatch.setattr(trained, "check_trained", CHECK)
    model, processor = copy.deepcopy(demo[0]), demo[1]
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        with model.compressed("sts", ratio=0.5):
            trained.pass_as_trained(model)
            model.compression.save(tmp_path / name)
    settings = {**SMALL, "methods": ["sts"], "processor": processor, "out": tmp_path / "out"}
    results = sweep(model, "demo:scenes", **settings)
    assert "its module is new" in by_method(results)["sts"].note
    results = sweep(model, "demo:scenes", **settings, weights={"sts": tmp_path / "one"})
    assert by_method(results)["sts"].accuracy and not by_method(results)["sts"].note
    said = [record for record in lines(tmp_path / "out") if record["run"].startswith("sts")]
    assert len(said) == 6
    model.compress("sts", ratio=0.89, weights=tmp_path / "one")
    task = load_task("demo:scenes", 6)
    rows = [record["row"] for record in said]
    batch = encode_rows(processor, rows, [task.questions[r] for r in rows], task.shown(rows), "one-turn")
    assert [r["answer"] for r in reply(model, processor, batch, 16)] == [record["answer"] for record in said]
    model.decompress()
    sweep(model, "demo:scenes", **settings, weights={"sts": tmp_path / "other"})
    assert len({r["run"] for r in lines(tmp_path / "out") if r["run"].startswith("sts")}) == 2
    with pytest.raises(ValueError, match="are of methods"):
        sweep(model, "demo:scenes", **{**settings, "methods": ["ia_red2"]}, weights={"ia_red2": tmp_path / "one"})
    assert model.compression is None
    names, left_out = judge.everything(model)
    assert "sts" not in names and "--weights sts=FOLDER" in left_out["sts"]
    assert "sts" in judge.everything(model, {"sts": tmp_path / "one"})[0]


def test_lines_repair_and_refuse(tmp_path):
    path = tmp_path / "answers.jsonl"
    records = [{"run": "a", "row": i, "answer": "é"} for i in range(3)]
    Lines(path).append([*records, records[0]])
    assert len(path.read_text().splitlines()) == 3
    with path.open("ab") as file:
        file.write(b'{"run": "a", "row": 3, "ans')
    read = Lines(path)
    assert read.lacking("a", range(5)) == [3, 4] and read.lacking("b", [0]) == [0]
    read.append([{"run": "a", "row": 3, "answer": "x"}])
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
    path.write_text('{"run": "a", "row": 0}\nnonsense\n{"run": "a", "row": 1}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        Lines(path)


def test_an_uncompressed_cache_counts_the_prompt_alone(demo):
    """However long the answer gets: keys and values of every token of the padded prompt, in every layer."""
    model, processor = demo
    task = load_task("demo:scenes", 4)
    batch = encode_rows(processor, [0, 1], task.questions[:2], task.shown([0, 1]))
    config = model.config.text_config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    for found in (reply(model, processor, batch, 1), reply(model, processor, batch, 5)):
        assert [r["bytes"] for r in found] == pytest.approx([batch.inputs["input_ids"].shape[1] * per_token] * 2)
        assert [r["entries"] for r in found] == batch.inputs["attention_mask"].sum(1).tolist()
        assert [r["full_bytes"] for r in found] == [r["bytes"] for r in found]
