"""What is asked and compared is what stands in the file, whoever reads it; a row that cannot be asked is named."""

import datetime
import json
from decimal import Decimal

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from hf_compress.evaluate import sweep
from hf_compress.evaluate.metrics import score_answers
from hf_compress.evaluate.tasks import load_task

WORDS = ["007", "1.50", "2020-01-01", "N/A", "None", "null", "nan", "true", "1e5", "-0", "5", " red ", "a,b", 'say "x"']
WORDS += ["12345678901234567890123", "two\nlines", "line\u2028separator", "1_000", "Ünï", "'", "[1, 2]"]


def as_csv(path, rows):
    pd.DataFrame(rows).to_csv(path, index=False)


def as_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def as_json(path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def as_columns(path, rows):
    path.write_text(json.dumps({key: [row[key] for row in rows] for key in rows[0]}), encoding="utf-8")


def as_parquet(path, rows):
    pd.DataFrame(rows).to_parquet(path)


WRITERS = [("csv", as_csv), ("jsonl", as_jsonl), ("json", as_json), ("json", as_jsonl), ("json", as_columns)]
WRITERS += [("parquet", as_parquet), ("CSV", as_csv)]


def rows_of(answers, **more):
    return [{"context": f"c {i}", "question": "q ?", "answer": a, **more} for i, a in enumerate(answers)]


# -- words ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("ending", "write"), WRITERS, ids=lambda value: getattr(value, "__name__", value))
def test_words_stay_as_they_are(ending, write, tmp_path):
    """In every role."""
    path = tmp_path / f"data.{ending}"
    write(path, [{"context": w, "question": w, "answer": w, "type": w, "context_id": w} for w in WORDS])
    task = load_task(str(path))
    assert task.questions == task.types == task.groups == task.shown(range(len(WORDS))) == WORDS
    assert task.answers == [[word] for word in WORDS]


@pytest.mark.parametrize("only", [["007", "012"], ["1.50", "2.00"], ["2020-01-01", "1999-12-31"], ["True", "False"]])
@pytest.mark.parametrize(("ending", "write"), WRITERS, ids=lambda value: getattr(value, "__name__", value))
def test_columns_that_look_like_something_else(ending, write, only, tmp_path):
    write(tmp_path / f"data.{ending}", rows_of(only))
    assert load_task(str(tmp_path / f"data.{ending}")).answers == [[word] for word in only]


def test_numbers_of_json_as_they_are_written(tmp_path):
    path = tmp_path / "data.jsonl"
    written = ["5", "2.5", "1.50", "-0.0", "1e5", "12345678901234567890123", "true", '"x"']
    path.write_text("".join(f'{{"context": 1, "question": 2.0, "answer": {w}}}\n' for w in written))
    task = load_task(str(path))
    assert [a for (a,) in task.answers] == [w.strip('"') for w in written]
    assert task.questions[0] == "2.0" and task.shown([0]) == ["1"]
    path.write_text('{"context": "c", "question": "q", "answers": [5, 2.50, "5"]}\n')
    assert load_task(str(path)).answers == [["5", "2.50", "5"]]


CLOCK = datetime.datetime(2020, 1, 1, 13, 5)
TYPED = {  # column of a typed table -> literal answers, each of which is right
    "integers": ([7, -3], ["7", "-3"]),
    "floats": ([0.1, 2.5], ["0.1", "2.5"]),
    "whole": ([5.0, 3.0], ["5", "3.0"]),  # what an integer becomes beside a gap
    "booleans": ([True, False], ["true", "False"]),
    "days": ([datetime.date(2020, 1, 1), datetime.date(1999, 12, 31)], ["2020-01-01", "1999-12-31"]),
    "moments": ([CLOCK, datetime.datetime(2020, 1, 1)], ["2020-01-01 13:05:00", "2020-01-01"]),
    "decimals": ([Decimal("1.50"), Decimal("2.00")], ["1.50", "2.00"]),
    "bytes": ([b"red", "ü".encode()], ["red", "ü"]),
    "lists": ([["a", "b"], ["c"]], ["b", "c"]),
    "lists of numbers": ([[1, 2], [3]], ["2", "3"]),
    "people": ([[{"answer": "1"}, {"answer": "2"}], [{"answer": "3"}]], ["2", "3"]),
    "squad": ([{"text": ["1", "2"], "start": [0, 1]}, {"text": ["3"], "start": [0]}], ["2", "3"]),
}


@pytest.mark.parametrize("kind", TYPED)
@pytest.mark.parametrize("source", ["datasets", "pandas", "pyarrow", "parquet", "saved", "torch"])
def test_types_that_a_table_has(kind, source, tmp_path):
    values, said = TYPED[kind]
    rows = {"context": ["c", "d"], "question": ["q", "q"], "answer": values}
    data = pd.DataFrame(rows) if source == "pandas" else datasets.Dataset.from_dict(rows)
    if source == "pyarrow":
        data = pa.table(rows)
    elif source == "torch" and kind not in ("days", "decimals", "bytes"):
        data = data.with_format("torch")
    elif source == "parquet":
        data.to_parquet(tmp_path / "data.parquet")
        data = tmp_path / "data.parquet"
    elif source == "saved":
        data.save_to_disk(tmp_path / "saved")
        data = tmp_path / "saved"
    task = load_task(data)
    assert score_answers("exact_match", said, task.answers) == [1, 1], task.answers


def test_narrow_floats_are_not_widened():
    table = pa.table({"context": ["c"], "question": ["q"], "answer": pa.array([0.1], pa.float32())})
    assert load_task(table).answers == [["0.1"]]
    lists = pa.table({"context": ["c"], "question": ["q"], "answer": pa.array([[0.1]], pa.list_(pa.float32()))})
    assert load_task(lists).answers == [["0.1"]]


def test_classes_go_by_their_names(tmp_path):
    names = datasets.ClassLabel(names=["cat", "dog"])
    text = datasets.Value("string")
    features = {"context": text, "question": text, "answer": names, "type": names}
    data = datasets.Dataset.from_dict(
        {"context": ["c"] * 2, "question": ["q"] * 2, "answer": [1, 0], "type": [0, 1]},
        features=datasets.Features(features),
    )
    data.to_parquet(tmp_path / "data.parquet")
    for source in (data, tmp_path / "data.parquet"):
        task = load_task(source)
        assert task.answers == [["dog"], ["cat"]] and task.types == ["cat", "dog"]
    several = datasets.Features({**features, "answer": datasets.List(names), "type": text})
    rows = {"context": ["c"], "question": ["q"], "answer": [[1, 0]], "type": ["t"]}
    assert load_task(datasets.Dataset.from_dict(rows, features=several)).answers == [["dog", "cat"]]
    unknown = datasets.Dataset.from_dict({**rows, "answer": [-1], "type": [0]}, features=datasets.Features(features))
    with pytest.raises(ValueError, match="row 1, column 'answer': the cell is empty"):
        load_task(unknown)
    frame = pd.DataFrame({"context": ["c"], "question": ["q"], "answer": pd.Categorical(["dog"])})
    frame.to_parquet(tmp_path / "frame.parquet")
    assert load_task(frame).answers == load_task(tmp_path / "frame.parquet").answers == [["dog"]]


def test_mixed_types_of_a_frame():
    frame = pd.DataFrame(rows_of([5, "x", 2.5, True, ["a", "b"], np.array(["c", "d"])]))
    assert load_task(frame).answers == [["5"], ["x"], ["2.5"], ["true"], ["a", "b"], ["c", "d"]]


def test_kinds_of_a_file_keep_their_names(tmp_path):
    """Only the built-in scenes have kinds that are called otherwise in tables."""
    as_jsonl(tmp_path / "data.jsonl", rows_of(["x"], type="list"))
    assert load_task(str(tmp_path / "data.jsonl")).types == ["list"]


def test_several_files_are_one_table(tmp_path):
    as_csv(tmp_path / "test-1.csv", rows_of(["007", "1"]))
    as_csv(tmp_path / "test-2.csv", rows_of(["008", ""]))
    as_csv(tmp_path / "train.csv", rows_of(["x"]))
    with pytest.raises(ValueError, match=r"test-2\.csv', row 2, column 'answer': the cell is empty"):
        load_task(str(tmp_path))
    with pytest.warns(UserWarning, match=r"1 of 4 rows are left out.*test-2\.csv', row 2"):
        assert load_task(str(tmp_path), on_error="skip").answers == [["007"], ["1"], ["008"]]
    assert load_task(str(tmp_path), split="train").answers == [["x"]]
    with pytest.raises(ValueError, match=r"split='dev' is not in .* there are: train, test"):
        load_task(str(tmp_path), split="dev")


# -- rows that cannot be asked --------------------------------------------------------------------------------------
EMPTY = [None, "", "  ", float("nan"), pd.NaT, pd.NA, [], [None], ["a", ""], {"text": []}, {"answer": None}]


@pytest.mark.parametrize("cell", EMPTY, ids=repr)
def test_empty_cells_are_no_references(cell):
    frame = pd.DataFrame(rows_of(["x", cell, "z"]))
    with pytest.raises(ValueError, match=r"row 2, column 'answer': .*empty.* on_error='skip'"):
        load_task(frame)
    with pytest.warns(UserWarning, match="1 of 3 rows are left out: .*row 2"):
        task = load_task(frame, on_error="skip")
    assert task.answers == [["x"], ["z"]] and task.shown([0, 1]) == ["c 0", "c 2"]
    assert len(task.skipped) == 1 and "row 2, column 'answer'" in task.skipped[0]


@pytest.mark.parametrize("column", ["question", "context", "context_id"])
@pytest.mark.parametrize(("ending", "write"), WRITERS, ids=lambda value: getattr(value, "__name__", value))
def test_whatever_is_asked_must_be_there(ending, write, column, tmp_path):
    rows = rows_of(["x", "y", "z"], context_id="i", type=None)  # a kind may be missing
    rows[2][column] = None
    write(tmp_path / f"data.{ending}", rows)
    with pytest.raises(ValueError, match=rf"data\.{ending}', row 3, column '{column}': the cell is empty"):
        load_task(str(tmp_path / f"data.{ending}"))


@pytest.mark.parametrize(
    ("ending", "text", "message"),
    [
        ("csv", "context,question,answer\nc,q,1,000\n", "row 1 has 1 cells more than the header"),
        ("csv", "context,question,answer\nc,q,x\nc,q\n", "row 2, column 'answer': the cell is empty"),
        ("csv", 'context,question,answer\nc,q,"x"y\n', "row 1 is no CSV"),
        ("jsonl", '{"context": "c", "question": "q", "answer": "x"}\n{"context"\n', "line 2 is no JSON"),
        ("jsonl", "[1]\n", r"line 1 is list, not a record"),
        ("json", "[1, 2]", "no table"),
        ("json", '{"context": ["c"], "question": ["q", "r"], "answer": ["x"]}', "unequal length"),
        ("jsonl", '{"context": "c", "question": "q", "answer": {"score": 1}}', r"record with \['score'\]"),
        ("jsonl", '{"context": "c", "question": ["q"], "answer": "x"}', "column 'question': it holds list"),
        ("jsonl", '{"context": "c", "question": "q", "answer": [["x"]]}', "column 'answer': it holds list"),
    ],
)
def test_files_that_are_no_tables(ending, text, message, tmp_path):
    (tmp_path / f"data.{ending}").write_text(text)
    with pytest.raises(ValueError, match=rf"data\.{ending}'.*{message}"):
        load_task(str(tmp_path / f"data.{ending}"))


def test_other_encodings(tmp_path):
    path, table = tmp_path / "data.csv", "context,question,answer\nc,q,ü\n"
    path.write_bytes(table.encode("utf-8-sig"))  # as spreadsheets write it
    assert load_task(str(path)).answers == [["ü"]]
    path.write_bytes(table.encode("latin-1"))
    with pytest.raises(ValueError, match=r"data\.csv' is not UTF-8"):
        load_task(str(path))


def test_nothing_left():
    with pytest.raises(ValueError, match=r"no row that can be asked; the first: .*row 1, column 'answer'"):
        load_task(pd.DataFrame(rows_of([None, None])), on_error="skip")
    with pytest.raises(ValueError, match="on_error='ignore' is not one of raise, skip"):
        load_task("demo:scenes", on_error="ignore")


# -- pictures -------------------------------------------------------------------------------------------------------
@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with a red picture; the working directory has a blue one of that name."""
    for folder, colour in (("data", "red"), ("elsewhere", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / folder / "a.png")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "data"


def struct(rows):
    return [{**row, "image": {"bytes": None, "path": row["image"]}} for row in rows]


def several(rows):
    return [{**row, "image": [row["image"]]} for row in rows]


def as_metadata(path, rows):
    as_jsonl(path, [{"file_name": row["image"], **{k: v for k, v in row.items() if k != "image"}} for row in rows])


def with_feature(path, rows):
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
    pd.DataFrame(data.to_list()).to_parquet(path)


PICTURED = [(f"q.{ending}", write) for ending, write in WRITERS]
PICTURED += [("s.parquet", lambda path, rows: as_parquet(path, struct(rows))), ("metadata.jsonl", as_metadata)]
PICTURED += [("l.parquet", lambda path, rows: as_parquet(path, several(rows))), ("f.parquet", with_feature)]
PICTURED += [("l.jsonl", lambda path, rows: as_jsonl(path, several(rows)))]


@pytest.mark.parametrize(("name", "write"), PICTURED, ids=lambda value: getattr(value, "__name__", value))
def test_pictures_lie_beside_the_file_that_names_them(name, write, elsewhere):
    rows = [{"image": path, "question": "colour ?", "answer": "007"} for path in ("a.png", str(elsewhere / "a.png"))]
    write(elsewhere / name, rows)
    task = load_task(str(elsewhere if name.startswith("metadata") else elsewhere / name))
    assert [image.getpixel((0, 0)) for image in task.shown([0, 1])] == [(255, 0, 0)] * 2
    assert task.answers == [["007"]] * 2 and task.groups[0] == task.groups[1]


def test_wide_strings_of_pandas(elsewhere):
    """pandas 3 writes texts as large_string."""
    table = pa.table({"image": pa.array(["a.png"], pa.large_string()), "question": ["q"], "answer": ["x"]})
    pd.DataFrame({"x": [1]}).to_parquet(elsewhere / "x.parquet")
    import pyarrow.parquet as pq

    pq.write_table(table, elsewhere / "q.parquet")
    assert load_task(str(elsewhere / "q.parquet")).shown([0])[0].getpixel((0, 0)) == (255, 0, 0)


def test_folders_of_folders(elsewhere):
    """Every metadata file names pictures beside itself, in words of its own."""
    for split, colour in (("train", "green"), ("test", "red")):
        (elsewhere / split).mkdir()
        Image.new("RGB", (8, 8), colour).save(elsewhere / split / "b.png")
        (elsewhere / split / "metadata.csv").write_text("file_name,question,answer\nb.png,q,007\n")
    task = load_task(str(elsewhere))
    assert task.answers == [["007"]] and task.shown([0])[0].getpixel((0, 0)) == (255, 0, 0)
    assert load_task(str(elsewhere), split="train").shown([0])[0].getpixel((0, 0)) == (0, 128, 0)


@pytest.mark.parametrize("kind", ["none", "absent", "truncated", "text"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_bad_picture_is_named_and_the_run_goes_on(kind, ending, elsewhere):
    raw = (elsewhere / "a.png").read_bytes()
    (elsewhere / "truncated.png").write_bytes(raw[:-30])
    (elsewhere / "text.png").write_text("<html>")
    rows = [{"image": "a.png", "question": f"q {i}", "answer": "x"} for i in range(3)]
    rows[1]["image"] = None if kind == "none" else f"{kind}.png"
    path = elsewhere / f"data.{ending}"
    dict(jsonl=as_jsonl, csv=as_csv, parquet=as_parquet)[ending](path, rows)
    with pytest.raises(ValueError, match=rf"data\.{ending}', row 2, column 'image': .*picture"):
        load_task(str(path))
    with pytest.warns(UserWarning, match=r"row 2, column 'image'"):
        task = load_task(str(path), on_error="skip")
    assert task.questions == ["q 0", "q 2"] and len(task.shown([0, 1])) == 2
    assert task.fingerprint != load_task(str(path), limit=1).fingerprint


def test_what_the_processor_refuses_is_named(tmp_path):
    """A picture that is none for this model: too narrow; a question with the mark of an image."""
    narrow = Image.new("RGB", (2000, 8))
    frame = pd.DataFrame({"image": [Image.new("RGB", (64, 64)), narrow], "question": ["q"] * 2, "answer": ["x"] * 2})
    options = dict(methods="uniform", ratios=[0.5], timed=False, progress=False, device="cpu")
    with pytest.raises(ValueError, match=r"data='data', row 2 cannot be asked: .*aspect ratio"):
        sweep("demo:qwen", frame, out=tmp_path / "narrow", **options)
    frame = frame.assign(image=frame["image"][0], question=["q", "<image> q"])
    with pytest.raises(ValueError, match=r"data='data', row 2 cannot be asked: .*<image>"):
        sweep("demo:llava", frame, out=tmp_path / "marked", **options)


def test_pictures_in_memory():
    pictures = [Image.new("RGBA", (4, 4), (255, 0, 0, 0)), Image.fromarray(np.full((4, 4), 65535, np.uint16))]
    frame = pd.DataFrame({"image": [*pictures, [*pictures]], "question": ["q"] * 3, "answer": ["x"] * 3})
    shown = load_task(frame).shown([0, 1, 2])
    assert [image.getpixel((0, 0)) for image in [*shown[:2], *shown[2]]] == [(255, 255, 255)] * 4
    rows = {"image": pictures, "question": ["q"] * 2, "answer": ["x"] * 2}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    assert [image.getpixel((0, 0)) for image in load_task(data).shown([0, 1])] == [(255, 255, 255)] * 2


def test_a_judged_file_with_bad_rows(demo, tmp_path):
    """From the file to the page: the good rows are asked, the page says what was left out."""
    scenes = load_task("demo:scenes", 2)
    lines = []
    for i, (image, question, answer) in enumerate(zip(scenes.shown([0, 1]), scenes.questions, scenes.answers)):
        image.save(tmp_path / f"{i}.png")
        lines.append({"image": f"{i}.png", "question": question, "answer": answer[0]})
    as_csv(tmp_path / "data.csv", [lines[0], {**lines[1], "image": "no.png"}, lines[1]])
    options = dict(processor=demo[1], timed=False, progress=False, device="cpu")
    with pytest.raises(ValueError, match=r"row 2, column 'image': the picture .*no\.png' cannot be read"):
        sweep(demo[0], str(tmp_path / "data.csv"), "uniform", [0.5], out=tmp_path / "out", **options)
    with pytest.warns(UserWarning, match="1 of 3 rows are left out"):
        results = sweep(
            demo[0], str(tmp_path / "data.csv"), "uniform", [0.5], out=tmp_path / "out", on_error="skip", **options
        )
    assert results.rows[0].accuracy[0] == 1 and results.settings["questions"] == 2
    assert "1 row of the data left out" in (tmp_path / "out" / "leaderboard.md").read_text()
