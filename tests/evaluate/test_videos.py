"""Questions about videos: read from tables, shown as frames, judged beside the controls of videos."""

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hf_compress.demo import load_demo
from hf_compress.demo.clip_dataset import load_clips
from hf_compress.evaluate import answer, leaderboard, sweep
from hf_compress.evaluate.plan import controls_of, plan
from hf_compress.evaluate.prompts import encode_rows, render
from hf_compress.evaluate.tasks import load_task
from hf_compress.pictures import Frames

QUIET = dict(batch_size=4, timed=False, progress=False, device="cpu")


def test_clips_are_a_task():
    task, data = load_task("demo:clips", 6), load_clips(clips=2)
    assert len(task) == 6 and task.modality == "video" and task.video == "video" and task.image is task.context is None
    assert task.groups == ["0"] * 4 + ["1"] * 2 and task.questions == data["question"][:6]
    (shown,) = task.shown([4])
    assert isinstance(shown, Frames) and len(shown) == 16
    for frame, given in zip(shown, data[4]["video"]):
        assert np.array_equal(np.asarray(frame), np.asarray(given))
    assert load_task(data, 6).fingerprint == task.fingerprint != load_task(data, 5).fingerprint


def test_columns_of_frames(tmp_path):
    """Files beside the table, in a column of either name; an image that is there too comes first, as before."""
    for i in range(3):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    row = {"question": "what moves ?", "answer": "red 3"}
    for column in ("video", "frames"):
        pd.DataFrame([{**row, column: ["0.png", "1.png", "2.png"]}]).to_json(
            tmp_path / f"{column}.jsonl", orient="records", lines=True
        )
        task = load_task(str(tmp_path / f"{column}.jsonl"))
        assert task.modality == "video" and [f.getpixel((0, 0))[0] for f in task.shown([0])[0]] == [0, 40, 80]
    both = {"image": [str(tmp_path / "0.png")], "frames": ["24"], "question": ["x"], "answer": ["y"]}
    assert load_task(datasets.Dataset.from_dict(both)).modality == "image"
    with pytest.raises(ValueError, match=r"column 'video': the picture .* cannot be read"):
        load_task(datasets.Dataset.from_dict({"video": [["no.png"]], "question": ["x"], "answer": ["y"]}))


def test_controls_of_videos():
    assert controls_of("evs", "video") == {
        "random": "random",
        "uniform": "uniform",
        "time": "strided",
        "frames": "frames",
    }
    assert list(controls_of("evs+snapkv", "video").values()) == [
        "random+kvrandom", "uniform+streaming", "strided+streaming", "frames+streaming",
    ]  # fmt: skip
    assert controls_of("snapkv", "video") == controls_of("snapkv") and controls_of("frames", "video").keys() == {
        "random", "uniform", "time",
    }  # fmt: skip
    assert {run.method for run in plan(["evs"], [0.5], modality="video")} == {
        "none", "random", "uniform", "strided", "frames", "evs",
    }  # fmt: skip


def test_the_judge_shows_videos(clip_processor, tmp_path):
    """Counts of tokens, the controls of videos, and answers that are those of `answer`."""
    model, _ = load_demo("qwen")
    results = sweep(
        model, "demo:clips", "evs", [0.75], processor=clip_processor, out=tmp_path / "out", limit=5, **QUIET
    )
    rows = {row.method: row for row in results.rows}
    assert rows["none"].visual == 8 * 64 and rows["evs"].visual == rows["strided"].visual == 2 * 64
    assert {name for name, row in rows.items() if row.control} == {"random", "uniform", "strided", "frames"}
    assert set(rows["evs"].over) == {"random", "uniform", "time", "frames"}
    text = (tmp_path / "out" / "leaderboard.md").read_text()
    assert "The controls `random` (3 seeds), `uniform`, `strided` and `frames` keep as many visual tokens." in text
    said = answer(model, clip_processor, load_clips(clips=2).select(range(5)), batch_size=4)
    lines = pd.read_json(tmp_path / "out" / "answers.jsonl", lines=True)
    assert [str(a) for a in lines[lines.run == "none"].sort_values("row").answer] == said
    assert "*strided*" in leaderboard([tmp_path / "out"], tmp_path / "page.md")[0].read_text()


def test_two_turns_cut_behind_the_video(clip_processor):
    task = load_task("demo:clips", 2)
    batch = encode_rows(clip_processor, [0], task.questions[:1], task.shown([0]), "two-turn")
    assert int((batch.inputs["input_ids"] == clip_processor.video_token_id).sum()) == 512
    assert not (batch.later == clip_processor.video_token_id).any()
    assert render(clip_processor, "what moves ?", task.shown([0])[0]).count("<|video_pad|>") == 1


def test_models_that_cannot_see_videos_say_so(demo, tmp_path):
    with pytest.raises(ValueError, match="shows videos, which LlavaForConditionalGeneration cannot see"):
        sweep(demo[0], "demo:clips", "random", processor=demo[1], out=tmp_path / "a", limit=1, **QUIET)
    model, processor = load_demo("qwen")
    with pytest.raises(ValueError, match="shows videos, and processor=ImageOnlyProcessor reads none"):
        sweep(model, "demo:clips", "random", processor=processor, out=tmp_path / "b", limit=1, **QUIET)
