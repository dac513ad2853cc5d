"""The embedded Qwen2.5-VL for clips: what it is, what it answers, and that a clip can be compressed."""

from pathlib import Path

import pytest
import transformers

from hf_compress.demo import __file__ as package
from hf_compress.demo import load_demo
from hf_compress.demo.clip_dataset import grey_clip, load_clips
from hf_compress.demo.qwen_processor import ClipProcessor
from hf_compress.evaluate import answer, exact_match
from hf_compress.evaluate.models import load_model
from hf_compress.evaluate.prompts import encode
from hf_compress.pictures import Frames


@pytest.fixture(scope="module")
def demo():
    return load_demo("video")


@pytest.fixture(scope="module")
def data():
    return load_clips("test", clips=15, questions=4)


def share(answers, data):
    """Of right answers."""
    right = exact_match(answers, data["answer"])
    return sum(right) / len(right)


def test_what_it_is(demo):
    model, processor = demo
    assert type(model) is transformers.Qwen2_5_VLForConditionalGeneration and not model.training
    assert isinstance(processor, ClipProcessor) and processor.tokenizer.padding_side == "left"
    assert (Path(package).parent / "video" / "model.safetensors").stat().st_size < 6e6
    assert type(load_model("demo:video")[1]) is ClipProcessor
    inputs = encode(processor, [Frames(grey_clip())], ["what moves ?"])
    assert int((inputs["input_ids"] == model.config.video_token_id).sum()) == 8 * 64


def test_answers_held_out_questions(demo, data):
    found = share(answer(*demo, data, 20), data)
    grey = [{"video": grey_clip(), "question": question} for question in data["question"][:20]]
    assert found > 0.75 and share(answer(*demo, grey, 20), data.select(range(20))) < 0.3


def test_batches_answer_as_each_alone(demo, data):
    """Clips of several lengths, padded on the left."""
    rows = [row | {"video": row["video"][: 16 - 4 * (i % 3)]} for i, row in enumerate(data.select(range(6)))]
    assert answer(*demo, rows, 6) == answer(*demo, rows, 1)
    with demo[0].compressed("vidcom2", ratio=0.75):
        assert answer(*demo, rows, 6) == answer(*demo, rows, 1)


def test_compressed_it_still_sees(demo, data):
    model, _ = demo
    found = {}
    for method in ("vidcom2", "frames"):
        with model.compressed(method, ratio=0.9):
            found[method] = share(answer(*demo, data, 20), data)
            before, layers = model.compression.last.prompt_tokens, model.compression.last.layer_tokens
            assert all(b - a == round(0.9 * 512) for tokens in layers for b, a in zip(before, tokens))
    assert found["vidcom2"] > found["frames"] + 0.15
