"""What methods draw follows from what a sample shows and says: not from its batch, nor from the rounding of a tower."""

import pytest
import torch

from hf_compress.methods.vision.random import RandomTokens
from hf_compress.stores import held_layers
from tests import tiny
from tests.invariants.reference import (
    CENTRAL,
    VLMS,
    adapter_of,
    alone,
    bare,
    batch_of,
    fresh,
    greedy,
    logits_of,
    refusal,
    shared,
)
from tests.invariants.test_batch import stacked
from tests.tiny import BOS, IMG, VID

PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos")


def joined(name, samples):
    """Samples in one batch, padded on the left."""
    out = tiny.pad([s["input_ids"][0].tolist() for s in samples])
    out |= tiny.token_types(name, out["input_ids"])
    for key in tiny.encoder_inputs(samples[0]):
        out[key] = stacked(name, [s[key] for s in samples])
    return out


def touched(sample, change):
    """A sample whose pixels went through a function."""
    return {key: change(value.clone()) if key in PIXELS else value for key, value in sample.items()}


def one_value(pixels):
    """Another image, by one number."""
    pixels.view(-1)[0] += 0.5
    return pixels


def drawn(model, batch):
    """Per sample, what stays of the images, and the columns of the entries that stay in every layer and head."""
    layers = [layer.layout for layer in held_layers(greedy(model, batch, max_new_tokens=1).cache)]
    first = batch["attention_mask"].long().argmax(1).tolist()
    entries = [
        [(row[real] - pad).tolist() for x in layers if x.per_head for row, real in zip(x.index[b], x.valid[b])]
        for b, pad in enumerate(first)
    ]
    return model.compression.last.visual_kept, entries


@pytest.mark.parametrize("name", VLMS)
def test_a_draw_belongs_to_the_image(name):
    """The same question about three images, the third of which is the first again, alone and in two orders."""
    model = shared(name)
    first = alone(name, tiny.batch(name, bare(name), [[BOS, 5, IMG, 7, 8, 9]]), 0)
    second = touched(first, one_value)
    for method, part in (("random", 0), ("kvrandom", 1)):
        if refusal(method, name):
            continue
        with model.compressed(method, ratio=0.5):
            one = [drawn(model, s)[part] for s in (first, second)]
            together = drawn(model, joined(name, [first, second, first]))[part]
            turned = drawn(model, joined(name, [second, first]))[part]
        assert [[row] for row in together] == [one[0], one[1], one[0]] and one[0] != one[1], method
        assert [[row] for row in turned] == one[::-1]
        with model.compressed(method, ratio=0.5, seed=1):
            assert drawn(model, first)[part] != one[0]


@pytest.mark.parametrize("name", CENTRAL)
def test_a_draw_does_not_see_the_rounding_of_the_tower(name):
    """Half precision moves features by the batch they are computed in; here every feature moves a little."""
    model, batch = fresh(name), batch_of(name, "equal")
    with model.compressed("kvrandom", ratio=0.5):
        plain = [drawn(model, batch)]
    if name in VLMS:
        with model.compressed("random", ratio=0.5):
            plain.append(drawn(model, batch))
        noise = lambda module, args, out: out * (1 + 1e-3 * torch.randn_like(out))
        adapter_of(name).projector(model).register_forward_hook(noise)
        with model.compressed("random", ratio=0.5):
            assert drawn(model, batch) == plain[1]
    with model.compressed("kvrandom", ratio=0.5):
        assert drawn(model, batch) == plain[0]


CROPPED = ["llava_next", "llava_onevision", "internvl", "idefics3", "video_llava", "qwen2_5_vl"]


@pytest.mark.parametrize(
    ("name", "token"), [(name, IMG) for name in CROPPED] + [(name, VID) for name in CROPPED if name in tiny.VIDEO]
)
def test_crops_of_one_colour_draw_apart(name, token, monkeypatch):
    seen = []
    assign = RandomTokens.assign

    def spy(self, images, keep):
        seen.append(images.content)
        return assign(self, images, keep)

    monkeypatch.setattr(RandomTokens, "assign", spy)
    model = shared(name)
    batch = touched(tiny.batch(name, bare(name), [[BOS, 5, token, 7, token, 8]]), lambda x: x.fill_(0.25))
    with model.compressed("random", ratio=0.5):
        logits_of(model, batch)
    content = torch.cat(seen).tolist()
    assert len(content) >= 2 and len(set(content)) == len(content)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_features_that_come_ready_made(name):
    """No pixels to go by: other features draw apart, and those of another batch, rounded otherwise, draw alike."""
    model, batch = shared(name), alone(name, batch_of(name), 0)
    kept = []
    with torch.no_grad():
        features = bare(name).get_image_features(**tiny.encoder_inputs(batch))
    text = {k: v for k, v in batch.items() if k not in PIXELS}
    whole = features.pooler_output
    for change in (lambda x: x, lambda x: x * (1 + 1e-6 * torch.randn_like(x)), lambda x: -x):
        features.pooler_output = change(whole) if torch.is_tensor(whole) else [change(x) for x in whole]
        with model.compressed("random", ratio=0.5), torch.no_grad():
            model(**text, mm_encoder_outputs={"image": features})
            kept.append(model.compression.last.visual_kept)
    assert kept[0] == kept[1] != kept[2]
    assert kept[0][0][0] != kept[0][0][1]


def test_a_draw_belongs_to_the_text():
    """The third of these prompts is the first again; padding moves nothing."""
    model = shared("llama")
    prompts = [[BOS, 5, 6, 7, 8, 9, 10, 11], [BOS, 5, 6, 7, 8, 9, 10, 12], [BOS, 5, 6, 7, 8, 9, 10, 11], [BOS, 7, 6]]
    batch = tiny.pad([*prompts, [BOS, *range(3, 14)]])
    with model.compressed("kvrandom", ratio=0.5):
        together = drawn(model, batch)[1]
        assert together == [drawn(model, alone("llama", batch, b))[1][0] for b in range(5)]
    assert together[0] == together[2] != together[1]
