"""The embedded Qwen2.5-VL: what it is, what it answers, and that it can be compressed."""

from pathlib import Path

import pytest
import torch
import transformers

import hf_compress
from hf_compress.demo import MODELS, load_demo
from hf_compress.demo import __file__ as package
from hf_compress.demo.dataset import grey_image, load_scenes
from hf_compress.evaluate import answer, exact_match
from hf_compress.evaluate.scoring import encode

SIZES = ((112, 112), (64, 64), (104, 80))  # pixels, width and height; 196, 64 and 130 visual tokens


@pytest.fixture(scope="module")
def demo():
    return load_demo("qwen")


@pytest.fixture(scope="module")
def data():
    return load_scenes("test", images=10, questions=2)


@pytest.fixture(scope="module")
def blind(demo, data):
    grey = [{"image": grey_image(), "question": question} for question in data["question"]]
    return share(answer(*demo, grey, 32), data)


def share(answers, data):
    """Of right answers."""
    right = exact_match(answers, data["answer"])
    return sum(right) / len(right)


def test_what_it_is(demo):
    model, processor = demo
    assert type(model) is transformers.Qwen2_5_VLForConditionalGeneration and not model.training
    assert isinstance(processor, transformers.Qwen2_5_VLProcessor) and processor.tokenizer.padding_side == "left"
    tower = model.config.vision_config
    assert tower.fullatt_block_indexes[-1] == tower.depth - 1 and len(tower.fullatt_block_indexes) < tower.depth
    weights = [Path(package).parent / folder / "model.safetensors" for folder in MODELS.values()]
    assert sum(path.stat().st_size for path in weights) < 25e6


@pytest.mark.parametrize(
    ("size", "tokens"), [*zip(SIZES, (196, 64, 130)), ((300, 200), 187), ((40, 30), 70)], ids=str
)  # beyond 64 to 196 tokens an image is resized
def test_resolution_is_dynamic(demo, data, size, tokens):
    model, processor = demo
    inputs = encode(processor, [data[0]["image"].resize(size)], ["count the digits ."])
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == tokens
    assert inputs["pixel_values"].shape == (4 * tokens, 3 * 2 * 4 * 4)


def test_a_scene_reaches_the_model_unchanged(demo, data):
    image = data[0]["image"]
    inputs = encode(demo[1], [image], ["count the digits ."])
    pixels = demo[1].image_processor(image, do_resize=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"], pixels)


def test_answers_held_out_questions(demo, data, blind):
    found = share(answer(*demo, data, 32), data)
    assert found > 0.85 and found > blind + 0.4


def test_batches_of_mixed_resolution_answer_as_each_alone(demo, data):
    model, processor = demo
    rows = data.select(range(0, 20, 2))
    sized = [row | {"image": row["image"].resize(SIZES[i % 3])} for i, row in enumerate(rows)]
    found = answer(model, processor, sized, 10)
    assert found == answer(model, processor, sized, 1) and share(found, rows) > 0.7
    inputs = encode(processor, [row["image"] for row in sized[:3]], [row["question"] for row in sized[:3]])
    alone = encode(processor, [sized[1]["image"]], [sized[1]["question"]])
    with torch.inference_mode():
        together = model(**inputs, logits_to_keep=1).logits[1, -1]
        torch.testing.assert_close(together, model(**alone, logits_to_keep=1).logits[0, -1], rtol=1e-3, atol=1e-3)
    with model.compressed("fastervlm", ratio=0.75):
        assert answer(model, processor, sized[:6], 6) == answer(model, processor, sized[:6], 1)


@pytest.mark.parametrize("method", ["fastervlm", "divprune", "random"])
def test_compressed_it_still_sees(demo, data, blind, method):
    model, processor = demo
    with model.compressed(method, ratio=0.75):
        found = answer(model, processor, data, 32)
        run = model.compression.last
        for tokens in run.layer_tokens:
            assert [before - after for before, after in zip(run.prompt_tokens, tokens)] == [147] * len(tokens)
    assert share(found, data) > blind + 0.2


def test_attention_received_finds_the_objects(demo, data):
    """It stands in for [CLS], which this architecture lacks."""
    shares = {}
    for method in ("fastervlm", "random"):
        with demo[0].compressed(method, ratio=0.89):
            shares[method] = share(answer(*demo, data, 32), data)
    assert shares["fastervlm"] > shares["random"] + 0.15


def test_unknown_demo_is_named():
    with pytest.raises(ValueError, match=r"name='qwen3'.*qwen"):
        hf_compress.load_demo("qwen3")
