"""The judge on what is not built in: checkpoints in folders, pictures of many sizes, names that lead nowhere."""

import json

import pytest
import torch
from transformers import AutoTokenizer

import hf_compress
from hf_compress import budget
from hf_compress.demo.dataset import load_scenes
from hf_compress.demo.qwen_processor import ImageOnlyProcessor
from hf_compress.evaluate import sweep
from hf_compress.evaluate.models import load_model
from hf_compress.evaluate.tasks import load_task

QUIET = dict(timed=False, progress=False, device="cpu")
PIXELS = 8  # side of a visual token


@pytest.fixture(scope="module")
def scenes():
    """Six scenes of six sizes, one question each."""
    return load_scenes("test", images=6, questions=1, mixed=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The models that ship with the package as a user's checkpoints: model and processor saved into one folder."""
    out = {}
    for name in ("llava", "qwen", "recall"):
        out[name] = str(tmp_path_factory.mktemp("checkpoints") / name)
        for part in hf_compress.load_demo(name):
            part.save_pretrained(out[name])
    return out


def answers(out):
    """(run, row) -> record."""
    records = map(json.loads, (out / "answers.jsonl").read_text().splitlines())
    return {(record["run"], record["row"]): record for record in records}


# -- checkpoints ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "method"), [("llava", "divprune"), ("qwen", "divprune"), ("recall", "snapkv")])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_folder_is_judged_as_the_model_in_it(name, method, dtype, folders, tmp_path):
    data, options = "demo:recall" if name == "recall" else "demo:scenes", dict(limit=4, batch_size=4, dtype=dtype)
    found = {}
    for model in (f"demo:{name}", folders[name]):
        out = tmp_path / model.split(":")[0].strip("/").replace("/", "-")
        results = sweep(model, data, method, [0.75], out=out, **options, **QUIET)
        assert results.settings["dtype"] == (dtype or "float32")
        found[model] = {key: record["answer"] for key, record in answers(out).items()}
    ours, theirs = found.values()
    assert ours == theirs and all(ours.values())


def test_dtype_of_the_weights(folders):
    for name, dtype in ((folders["recall"], torch.float32), ("demo:recall", torch.float32)):
        assert load_model(name)[0].dtype == dtype and load_model(name, dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_processor_that_reads_no_images_is_refused(folders, scenes, tmp_path):
    """What AutoProcessor gives where a folder's processor is of a class that it does not know."""
    model = hf_compress.load_demo("llava")[0]
    tokenizer = AutoTokenizer.from_pretrained(folders["llava"])
    tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="reads none; pass the model's processor"):
        sweep(model, scenes, "divprune", [0.5], processor=tokenizer, out=tmp_path / "out", **QUIET)


def test_marks_of_images_without_names(folders, tmp_path):
    """Tokenizers of published Qwen2.5-VL checkpoints hold the marks, under no name of their own."""
    tokenizer = AutoTokenizer.from_pretrained(folders["qwen"])
    named = ImageOnlyProcessor.from_pretrained(folders["qwen"])
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for key in ("model_specific_special_tokens", "image_token", "video_token"):
        settings.pop(key, None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    bare = AutoTokenizer.from_pretrained(tmp_path)
    assert not hasattr(bare, "image_token")
    processor = ImageOnlyProcessor(named.image_processor, bare, chat_template=named.chat_template)
    assert (processor.image_token, processor.image_token_id) == (named.image_token, named.image_token_id)


# -- pictures -------------------------------------------------------------------------------------------------------
def test_scenes_of_many_sizes(scenes):
    """Whole visual tokens, the same scenes and questions, boxes where the objects are."""
    plain = load_scenes("test", images=6, questions=1)
    assert scenes["question"] == plain["question"] and len({image.size for image in scenes["image"]}) > 4
    for ours, full in zip(scenes, plain):
        width, height = ours["image"].size
        assert full["image"].size == (112, 112) and {width % PIXELS, height % PIXELS} == {0}
        assert min(width, height) >= 64 and max(width, height) <= 112
        for one, other in zip(ours["objects"], full["objects"]):
            back = [v * 112 / side for v, side in zip(one["box"], (width, height) * 2)]
            assert back == pytest.approx(other["box"], abs=1) and one["name"] == other["name"]
    assert load_task("demo:scenes:mixed", 5).shown([4])[0].size == load_scenes(images=2, mixed=True)[4]["image"].size


def pictures(scenes, path):
    """The scenes as a folder of images."""
    path.mkdir()
    lines = []
    for i, row in enumerate(scenes):
        row["image"].save(path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "question": row["question"], "answer": row["answer"]}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return str(path)


def test_mixed_resolutions(scenes, tmp_path):
    """Rows of unequal length in one batch: the answers of each row alone, and exactly its own budget."""
    task = load_task(pictures(scenes, tmp_path / "pictures"))
    scenes.to_parquet(tmp_path / "data.parquet")
    same = load_task(str(tmp_path / "data.parquet"))
    assert [i.size for i in task.shown(range(6))] == [i.size for i in same.shown(range(6))]
    found = {}
    for size in (1, 6):
        out = tmp_path / f"out{size}"
        results = sweep("demo:qwen", task, ["divprune", "snapkv"], [0.75], out=out, batch_size=size, **QUIET)
        found[size] = answers(out)
        assert next(row for row in results.rows if row.method == "none").accuracy[0] >= 0.8
    keys = ("answer", "length", "visual", "entries")
    alone, together = ({key: [r[k] for k in keys] for key, r in found[size].items()} for size in (1, 6))
    assert alone == together
    for row, (width, height) in enumerate(picture.size for picture in task.shown(range(6))):
        full = width * height // PIXELS**2
        kept = {key[0].split("|")[0]: record for key, record in found[6].items() if key[1] == row}
        assert kept["none"]["visual"] == kept["snapkv"]["visual"] == full
        assert kept["divprune"]["visual"] == budget.kept(full, 0.75)
        text = kept["none"]["entries"] - full
        assert kept["divprune"]["entries"] == budget.kept(full, 0.75) + text
        assert kept["snapkv"]["entries"] == budget.kept(full + text, 0.75, floor=True)


# -- names that lead nowhere ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "somebody/llava"}, r"model='somebody/llava' cannot be loaded: .* Pass demo:llava, demo:qwen"),
        ({"model": "/nowhere/llava"}, "no such folder"),
        ({"data": "somebody/vqa"}, r"'somebody/vqa' is no file or folder here, and not within reach .* demo:scenes"),
        ({"data": "demo:scenes:big"}, "demo:scenes, demo:scenes:mixed"),
        ({"dtype": "bf"}, "dtype='bf' is not"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is not"),
        ({"device": "gpu"}, "device='gpu' cannot be used here"),
    ],
    ids=lambda value: next(iter(value.items()))[1] if isinstance(value, dict) else "",
)
def test_names_that_lead_nowhere(change, message, tmp_path):
    options = dict(model="demo:llava", data="demo:scenes", methods="divprune", ratios=[0.5], limit=2, **QUIET)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        sweep(**{**options, **change}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else(demo, tmp_path):
    options = dict(methods="divprune", ratios=[0.5], out=tmp_path / "out", **QUIET)
    with pytest.raises(ValueError, match="cannot be loaded: Unrecognized model"):
        sweep(str(tmp_path), "demo:scenes", **options)
    with pytest.raises(ValueError, match="cannot be read"):
        sweep(demo[0], str(tmp_path), processor=demo[1], **options)
    with pytest.raises(ValueError, match=r"a model object has its own; call model\.to"):
        sweep(demo[0], "demo:scenes", processor=demo[1], dtype=torch.bfloat16, **options)
