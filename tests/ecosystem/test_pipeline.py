"""pipeline("image-text-to-text"), chat templates and AutoModelForImageTextToText, with the model that ships."""

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image

from hf_compress.demo.dataset import load_scenes, prompt
from tests.ecosystem.cases import CONFIGS, STACK

NEW = dict(max_new_tokens=6, do_sample=False)


@pytest.fixture(scope="module")
def rows():
    scenes = load_scenes("test", images=3, questions=1)
    return [scenes[i] for i in range(3)]


def chat(row):
    content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": row["question"]}]
    return [{"role": "user", "content": content}]


def by_hand(model, processor, rows):
    """What generate says, one question at a time."""
    answers = []
    for row in rows:
        batch = processor(images=row["image"], text=prompt(row["question"]), return_tensors="pt")
        new = model.generate(**batch, **NEW)[0, batch["input_ids"].shape[1] :]
        answers.append(processor.decode(new, skip_special_tokens=True))
    return answers


def said(out):
    """The texts of a pipeline's output, for one input or many; it keeps the space in front."""
    return [o["generated_text"].strip() for item in out for o in (item if isinstance(item, list) else [item])]


@pytest.mark.parametrize("name", CONFIGS)
def test_pipeline_says_what_generate_says(name, demo, rows):
    model, processor = demo
    pipe = T.pipeline("image-text-to-text", model=model, processor=processor, generate_kwargs=NEW)
    chats = [chat(row) for row in rows]
    with model.compressed(CONFIGS[name]):
        expected = by_hand(model, processor, rows)
        assert said(pipe(text=chats, return_full_text=False)) == expected
        assert said(pipe(text=chats, return_full_text=False, batch_size=3)) == expected
        asked = [prompt(row["question"]) for row in rows]
        whole = said(pipe(images=[row["image"] for row in rows], text=asked))
        for question, answer, full in zip(asked, expected, whole):
            assert full.startswith(question.split("<image>")[0]) and full.endswith(answer) and len(full) > len(answer)
        assert model.compression.last is not None
    assert said(pipe(text=chats[:1], return_full_text=False)) == by_hand(model, processor, rows[:1])


def test_pipeline_of_a_compressed_checkpoint(demo, rows, tmp_path):
    """The folder alone: model, processor and compression come from it; or the compression in the same line."""
    model, processor = demo
    with model.compressed(STACK):
        expected = by_hand(model, processor, rows)
        model.save_pretrained(tmp_path / "stack")
    model.save_pretrained(tmp_path / "plain")
    for folder in ("stack", "plain"):
        processor.save_pretrained(tmp_path / folder)
    options = dict(task="image-text-to-text", processor=processor)
    restored = T.pipeline(model=str(tmp_path / "stack"), **options)
    one_line = T.pipeline(model=str(tmp_path / "plain"), model_kwargs={"compression_config": STACK}, **options)
    for pipe in (restored, one_line):
        assert [m.method for m in pipe.model.compression.config.methods] == ["visionzip", "fastv", "snapkv"]
        out = pipe(text=[chat(row) for row in rows], return_full_text=False, generate_kwargs=NEW)
        assert said(out) == expected


def test_a_chat_template_counts_the_images_before_compression(demo, rows):
    """One tokenised chat serves the bare and the compressed model: the caller's ids do not change."""
    model, processor = demo
    batch = processor.apply_chat_template(
        chat(rows[0]), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    plain = processor(images=rows[0]["image"], text=prompt(rows[0]["question"]), return_tensors="pt")
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert torch.equal(batch["pixel_values"], plain["pixel_values"])
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 196
    with model.compressed("fastervlm", ratio=0.75):
        out = model.generate(**batch, **NEW)
        assert torch.equal(out[:, : batch["input_ids"].shape[1]], batch["input_ids"])
        totals = model.compression.report().totals()
    assert (totals["visual_tokens"], totals["visual_kept"]) == (196, 49)


def test_a_padded_batch_of_chats(demo, rows):
    model, processor = demo
    batch = processor.apply_chat_template(
        [chat(row) for row in rows],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    assert not batch["attention_mask"].all()
    with model.compressed(STACK):
        out = model.generate(**batch, **NEW)[:, batch["input_ids"].shape[1] :]
        assert processor.batch_decode(out, skip_special_tokens=True) == by_hand(model, processor, rows)


def test_images_need_no_torchvision(demo, rows):
    """The processor's arithmetic is that of PIL and numpy."""
    _, processor = demo
    assert type(processor.image_processor).__name__.endswith("Pil")
    image = rows[0]["image"].resize((160, 120))
    pixels = processor(images=image, text=prompt("?"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 112, 112)
    grey = processor(images=Image.new("RGB", (112, 112), (128, 64, 32)), text=prompt("?"), return_tensors="pt")
    settings = processor.image_processor
    expected = (np.array([128, 64, 32]) / 255 - settings.image_mean) / settings.image_std
    np.testing.assert_allclose(grey["pixel_values"][0, :, 50, 50].numpy(), expected, atol=1e-5)
