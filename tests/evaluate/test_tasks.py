import json

import datasets
import pytest
from PIL import Image

from hf_compress.demo.scenes import QUESTION_TYPES
from hf_compress.evaluate.tasks import SCENES, load_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pictures, three questions, as files of every kind."""
    path = tmp_path_factory.mktemp("data")
    colours = ("red", "blue")
    for colour in colours:
        Image.new("RGB", (8, 8), colour).save(path / f"{colour}.png")
    rows = [
        {"image": "red.png", "question": "what colour ?", "answers": ["red", "crimson"], "type": "colour"},
        {"image": "red.png", "question": "how many ?", "answers": ["1"], "type": "counting"},
        {"image": "blue.png", "question": "what colour ?", "answers": ["blue"], "type": "colour"},
    ]
    (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    absolute = [{**row, "image": str(path / row["image"])} for row in rows]
    data = datasets.Dataset.from_list(absolute).cast_column("image", datasets.Image())
    data.to_parquet(path / "data.parquet")
    data.save_to_disk(path / "saved")
    pictures = path / "pictures"
    pictures.mkdir()
    for colour in colours:
        (path / f"{colour}.png").rename(pictures / f"{colour}.png")
        Image.new("RGB", (8, 8), colour).save(path / f"{colour}.png")
    lines = [{"file_name": f"{c}.png", "question": "what colour ?", "answer": c} for c in colours]
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet", "saved"])
def test_files(folder, name):
    task = load_task(str(folder / name))
    assert task.questions == ["what colour ?", "how many ?", "what colour ?"]
    assert task.answers == [["red", "crimson"], ["1"], ["blue"]]
    assert task.types == ["colour", "counting", "colour"]
    assert task.groups[0] == task.groups[1] != task.groups[2]  # one picture, drawn together
    shown = task.shown([2, 0])
    assert [image.getpixel((0, 0)) for image in shown] == [(0, 0, 255), (255, 0, 0)]


def test_a_folder_of_images(folder):
    task = load_task(str(folder / "pictures"))
    assert sorted(task.answers) == [["blue"], ["red"]] and task.types == ["", ""]
    assert task.shown([task.answers.index(["red"])])[0].getpixel((0, 0)) == (255, 0, 0)


def test_limit_and_fingerprint(folder):
    whole, part = (load_task(str(folder / "data.parquet"), limit) for limit in (None, 2))
    assert len(part) == 2 and part.questions == whole.questions[:2]
    assert part.fingerprint != whole.fingerprint == load_task(str(folder / "saved")).fingerprint


def test_answers_of_vqa_and_squad():
    rows = {
        "context": ["a b", "a b"],
        "question": ["x", "y"],
        "answers": [{"text": ["1", "2"], "answer_start": [0, 1]}, {"text": ["3"], "answer_start": [0]}],
    }
    task = load_task(datasets.Dataset.from_dict(rows))
    assert task.answers == [["1", "2"], ["3"]] and task.shown([0]) == ["a b"] and task.groups[0] == task.groups[1]
    people = {"context": ["a"], "question": ["x"], "answers": [[{"answer": "1"}, {"answer": "2"}]]}
    assert load_task(datasets.Dataset.from_dict(people)).answers == [["1", "2"]]


def test_built_in():
    scenes = load_task("demo:scenes", 6)
    assert len(scenes) == 6 and scenes.image == "image" and len(set(scenes.groups)) == 2
    assert set(scenes.types) <= set(SCENES.values())
    recall = load_task("demo:recall", 7)
    assert len(recall) == 7 and recall.context == "context" and set(recall.types[:5]) == set(recall.types)


def test_every_type_of_the_scenes_has_a_name():
    assert set(QUESTION_TYPES) <= set(SCENES)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("demo:faces", {}, "demo:scenes"),
        ("demo:scenes", {"limit": 0}, "limit=0"),
        ("/nowhere/data.parquet", {}, "no such file"),
        (datasets.Dataset.from_dict({"question": ["x"], "answer": ["y"]}), {}, "image or images"),
        (datasets.Dataset.from_dict({"context": ["x"], "answer": ["y"]}), {}, "question or query"),
        (datasets.Dataset.from_dict({"context": ["x"], "question": ["y"]}), {}, "answers or answer"),
        (datasets.DatasetDict(), {}, "one split"),
        ([1, 2], {}, "datasets.Dataset"),
    ],
)
def test_wrong_data(data, options, message):
    with pytest.raises(ValueError, match=message):
        load_task(data, **options)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "data.txt").touch()
    with pytest.raises(ValueError, match=r"'\.txt'; pass one of \.parquet"):
        load_task(str(tmp_path / "data.txt"))


def test_several_images_per_question():
    pictures = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    features = datasets.Features(
        {"images": datasets.List(datasets.Image()), **dict.fromkeys(("question", "answer"), datasets.Value("string"))}
    )
    rows = {"images": [pictures[:1], pictures], "question": ["x", "y"], "answer": ["1", "2"]}
    task = load_task(datasets.Dataset.from_dict(rows, features=features))
    one, two = task.shown([0, 1])
    assert [image.getpixel((0, 0)) for image in (one, *two)] == [(255, 0, 0), (255, 0, 0), (0, 0, 255)]
    with pytest.raises(ValueError, match="row 1, column 'images': the list of images is empty"):
        load_task(datasets.Dataset.from_dict({**rows, "images": [[], pictures]}, features=features))


def test_fingerprints_tell_pictures_and_texts_apart(tmp_path):
    """By content: other pixels under the same name are other data, equal files under other names are the same."""
    feature = datasets.Features({"image": datasets.Image()})

    def picture(kind, colours):
        images = [Image.new("RGB", (8, 8), colour) for colour in colours]
        if kind == "paths":
            for i, image in enumerate(images):
                image.save(tmp_path / f"{i}.png")
            images = [str(tmp_path / f"{i}.png") for i in range(len(images))]
        if kind == "lists":
            images = [[image] for image in images]
        column = {"image": datasets.List(datasets.Image())} if kind == "lists" else feature
        data = datasets.Dataset.from_dict({"image": images}, features=datasets.Features(column))
        data = data.add_column("question", ["what colour ?"] * 2).add_column("answer", ["red"] * 2)
        return load_task(data)

    for kind in ("bytes", "paths", "lists"):
        one, same, other = (picture(kind, colours) for colours in (("red", "red"), ("red", "red"), ("red", "blue")))
        assert one.fingerprint == same.fingerprint != other.fingerprint, kind
        assert len(set(one.groups)) == 1 and len(set(other.groups)) == 2, kind
    columns = {"question": ["which ?"] * 2, "answer": ["a"] * 2}
    texts = [load_task(datasets.Dataset.from_dict({"context": ["a", last], **columns})) for last in ("b", "b", "c")]
    texts = [task.fingerprint for task in texts]
    assert texts[0] == texts[1] != texts[2]
