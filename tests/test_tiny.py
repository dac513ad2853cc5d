"""The tiny models are worth testing on: images and prompts matter, rows of a batch do not mix."""

import pytest
import torch

import hf_compress
from tests.tiny import (
    ALL_ARCHITECTURES,
    ALL_VISION,
    ARCHITECTURES,
    DECODER_ONLY,
    GREEDY,
    IMG,
    PATCHED,
    PER_ROW,
    SLIDING_WINDOW,
    VIDEO,
    both,
    build,
    edges,
    encoder_inputs,
    inputs,
    mixed,
    single,
    text_only,
    video,
)
from tests.tiny import batch as make_batch
from tests.tiny.text import FURTHER, MAIN
from tests.tiny.vision import MODELS

BATCHES = [(name, inputs) for name in ALL_ARCHITECTURES]
BATCHES += [(name, text_only) for name in ARCHITECTURES]
BATCHES += [(name, make) for name in ALL_VISION if name != "mllama" for make in (mixed, edges)]
BATCHES += [(name, make) for name in VIDEO for make in (video, both)]
BATCHES = [pytest.param(name, make, id=f"{name}-{make.__name__}") for name, make in BATCHES]


@torch.no_grad()
def logits(model, batch):
    return model(**batch, use_cache=False).logits


@torch.no_grad()
def greedy(model, batch, **kwargs):
    return model.generate(**batch, **GREEDY, **kwargs)[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize("name", ALL_ARCHITECTURES)
def test_build_is_reproducible(name):
    first, again = build(name).state_dict(), build(name).state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("name", [name for name in ALL_ARCHITECTURES if name != "gemma2"])
def test_eager_and_sdpa_agree(name):
    eager, sdpa = build(name, attn="eager"), build(name)
    assert eager.config._attn_implementation == "eager" and sdpa.config._attn_implementation == "sdpa"
    one = single(inputs(name, sdpa), 0, name)
    torch.testing.assert_close(logits(eager, one), logits(sdpa, one), rtol=1e-3, atol=1e-3)


def changes(reference, other):
    """Which rows of two [rows, tokens] outputs differ."""
    return (reference != other).any(1)


@pytest.mark.parametrize("name", ALL_VISION)
def test_every_image_matters(name):
    model = build(name)
    batch = inputs(name, model)
    key = "pixel_values_images" if name == "video_llava" else "pixel_values"
    pixels = batch[key]
    before, output = logits(model, batch), greedy(model, batch)
    flipped = {**batch, key: -pixels}
    moved = (logits(model, flipped) - before)[:, -1].std(1)
    assert (moved > 0.3 * before[:, -1].std()).all()
    assert changes(output, greedy(model, flipped)).all()
    blank = pixels.clone()  # the first image is a small part of what the first row sees
    first = blank[:64] if name in PATCHED else blank[0, 0] if name in PER_ROW else blank[0]
    first *= 1e-3  # Idefics3 takes an image of zeros for padding
    in_reach = name != "llava_window"  # four layers with a window of 9 do not see as far back
    assert changes(output, greedy(model, {**batch, key: blank})).tolist() == [in_reach, False]


@pytest.mark.parametrize("name", VIDEO)
def test_every_video_matters(name):
    model = build(name)
    batch = video(name, model)
    pixels = batch["pixel_values_videos"]
    first = len(pixels) * 16 // 36 if name in PATCHED else 1
    flipped = dict(batch, pixel_values_videos=torch.cat([-pixels[:first], pixels[first:]]))
    assert changes(greedy(model, batch), greedy(model, flipped)).tolist() == [True, False]


@pytest.mark.parametrize("name", ALL_ARCHITECTURES)
def test_every_prompt_token_matters(name):
    """Changing one of the last ten tokens of a prompt changes the greedy output in four of five cases at least."""
    model = build(name)
    batch = text_only(name, model)
    output = greedy(model, batch)
    assert changes(output[:1], output[1:]).all()
    places = range(-10, 0)
    changed = 0
    for place in places:
        other = dict(batch, input_ids=batch["input_ids"].clone())
        other["input_ids"][:, place] = 50
        changed += int(changes(output, greedy(model, other)).sum())
    assert changed >= 0.8 * 2 * len(places)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name, make", BATCHES)
def test_row_alone_equals_row_of_the_batch(name, make, side):
    model = build(name)
    batch = make(name, model, side=side)
    assert (batch["attention_mask"].sum(1) < batch["input_ids"].shape[1]).sum() == 1, "one row is padded"
    together = logits(model, batch)
    for row, held in enumerate(batch["attention_mask"].bool()):
        alone = logits(model, single(batch, row, name))
        torch.testing.assert_close(together[row, held], alone[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name, make", BATCHES)
def test_row_alone_generates_the_same_tokens(name, make, use_cache):
    model = build(name)
    batch = make(name, model)
    together = greedy(model, batch, use_cache=use_cache)
    assert together.shape == (2, GREEDY["max_new_tokens"])
    for row in range(2):
        assert torch.equal(greedy(model, single(batch, row, name), use_cache=use_cache)[0], together[row])


def test_batches_are_what_they_say():
    model = build("llava")

    def images(batch):
        return (batch["input_ids"] == IMG).sum(1).tolist()

    assert images(inputs("llava", model)) == [72, 36]
    assert images(mixed("llava", model)) == [36, 0]
    assert images(text_only("llava", model)) == [0, 0]
    at_edges = edges("llava", model, side="right")
    assert at_edges["input_ids"][0, 0] == IMG and single(at_edges, 1, "llava")["input_ids"][0, -1] == IMG
    assert "pixel_values" not in single(mixed("llava", model), 1, "llava")

    model = build("qwen2_5_vl")
    batch = inputs("qwen2_5_vl", model)
    assert images(batch) == [28, 8]
    assert single(batch, 1, "qwen2_5_vl")["image_grid_thw"].tolist() == [[1, 8, 4]]
    assert single(batch, 1, "qwen2_5_vl")["pixel_values"].shape == (32, 96)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in ALL_VISION if name != "mllama"])
def test_the_encoder_takes_its_part_of_a_batch(name):
    model = build(name)
    batch = inputs(name, model)
    features = model.base_model.get_image_features(**encoder_inputs(batch), return_dict=True).pooler_output
    assert sum(x.flatten(0, -2).shape[0] for x in features) == (batch["input_ids"] == IMG).sum()


@torch.no_grad()
def test_the_sliding_window_is_shorter_than_the_prompts():
    full, window = build("mistral"), build("mistral_window")
    batch = inputs("mistral", full)
    assert (batch["attention_mask"].sum(1) > SLIDING_WINDOW).all()
    one = single(batch, 0, "mistral")
    a, b = logits(full, one), logits(window, one)
    torch.testing.assert_close(a[:, :SLIDING_WINDOW], b[:, :SLIDING_WINDOW], rtol=1e-3, atol=1e-3)
    assert ((a - b)[0, SLIDING_WINDOW:].abs().amax(-1) > 1e-2).all()


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_images_are_refused_without_a_tower(name):
    with pytest.raises(ValueError, match="takes no images"):
        mixed(name, build(name))
    with pytest.raises(ValueError, match="takes no images"):
        make_batch(name, build(name), [[IMG, 5]])


def without_tiny(model_types):
    """What is to be written for those of the types that have no tiny model, one line each."""
    have = {config().model_type for config in (MODELS | MAIN | FURTHER).values()}
    return [
        f"{kind!r} has an adapter and no tiny model: write a function that gives its config in tests/tiny/text.py "
        "(MAIN or FURTHER) or tests/tiny/vision.py (MODELS), its name in FAMILIES of tests/tiny/models.py, and what "
        "its inputs need beyond ids and pixels in tests/tiny/batches.py"
        for kind in sorted(set(model_types) - have)
    ]


def test_every_adapter_has_a_tiny_model():
    assert not without_tiny(hf_compress.architectures())
    (line,) = without_tiny(["llama", "my_model"])
    assert line.startswith("'my_model' has an adapter and no tiny model: write")
