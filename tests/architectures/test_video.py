"""LLaVA-NeXT-Video, LLaVA-OneVision and Video-LLaVA: frames, pooling, two towers, images and videos in one prompt."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_compress import budget
from hf_compress.tensors.select import spaced_grid
from tests import tiny
from tests.architectures.test_anyres import (
    METHODS,
    SIDE,
    Crop,
    N,
    Spy,
    alive,
    budgets,
    close,
    columns,
    embed,
    greedy,
    image_crops,
    matrix,
    projected,
    scores,
    short_logits,
    top,
    tower_pixels,
    untouched,
)
from tests.tiny import FRAMES, GREEDY, IMG, VID

NAMES = ["llava_next_video", "llava_onevision", "video_llava"]
GRID = {"llava_next_video": (3, 3), "llava_onevision": (3, 3), "video_llava": (SIDE, SIDE)}
KINDS = {"video": tiny.video, "both": tiny.both}
MODALITIES = ("image", "video")


def frame_crops(name, videos):
    """Frames of all videos, and the number of rows of each video."""
    h, w = GRID[name]
    n, cls = h * w, int(name == "video_llava")
    out = []
    for video in range(videos):
        for f in range(FRAMES):
            rows = list(range(f * (n + cls) + cls, (f + 1) * (n + cls)))
            out.append(Crop(video, len(out), list(range(n)), rows, (h, w)))
    return out, [FRAMES * (n + cls) + int(name == "llava_onevision")] * videos


def parts(name, model, sample):
    """Per modality of an unpadded prompt: placeholder, crops, rows per image or video."""
    out = {}
    if (pixels := sample.get("pixel_values", sample.get("pixel_values_images"))) is not None:
        if name == "video_llava":
            crops = [Crop(i, i, list(range(N)), list(range(N)), (SIDE, SIDE)) for i in range(len(pixels))]
            out["image"] = IMG, crops, [N] * len(pixels)
        else:
            out["image"] = IMG, *image_crops(model.config, sample["image_sizes"].tolist())
    if "pixel_values_videos" in sample:
        out["video"] = VID, *frame_crops(name, len(sample["pixel_values_videos"]))
    return out


def stays(name, model, sample, choose):
    """Columns that stay by hand; `choose(modality, crops)` gives token indices per crop."""
    stay = set(range(sample["input_ids"].shape[1]))
    for modality, (token, crops, lengths) in parts(name, model, sample).items():
        stay &= set(columns(sample, token, lengths, crops, choose(modality, crops)))
    return sorted(stay)


def evenly(ratio):
    return lambda _, crops: [spaced_grid(*c.grid, k) for c, k in zip(crops, budgets(crops, ratio))]


def pooled(name, maps):
    """(frames, N) scores as the language model's tokens see them, by the pooling of the model."""
    grid = maps.view(-1, 1, SIDE, SIDE)
    if name == "llava_next_video":
        return F.avg_pool2d(grid, 2).flatten(1)
    if name == "llava_onevision":
        return F.interpolate(grid, (3, 3), mode="bilinear").flatten(1)
    return maps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_ratio_zero_is_the_bare_model_and_decompress_restores(name, kind):
    model = tiny.build(name)
    batch = KINDS[kind](name, model)
    tokens, logits = greedy(model, batch)
    with untouched(model):
        with model.compressed("visionzip", 0.0):
            again = greedy(model, batch)
            assert torch.equal(again[0], tokens) and torch.equal(again[1], logits)
        with model.compressed("visionzip", 0.5):
            assert not torch.equal(greedy(model, batch)[1], logits)
        assert torch.equal(greedy(model, batch)[1], logits)


@pytest.mark.parametrize("ratio", [0.5, 0.8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_uniform_is_the_short_language_model(name, kind, ratio):
    """Exact totals per video, [CLS] and newline rows stay, logits by hand at every step."""
    model, bare = tiny.build(name), tiny.build(name)
    batch = KINDS[kind](name, model)
    with model.compressed("uniform", ratio):
        tokens, logits = greedy(model, batch)
        stayed, counted = alive(model), model.compression.last.visual_tokens
    for row in range(2):
        sample = tiny.single(batch, row, name)
        sizes = []
        for _, crops, _ in parts(name, model, sample).values():
            keep = budgets(crops, ratio)
            for image in sorted({c.image for c in crops}):
                mine = [i for i, c in enumerate(crops) if c.image == image]
                sizes.append(sum(len(crops[i].tokens) for i in mine))
                assert sum(keep[i] for i in mine) == budget.kept(sizes[-1], ratio)
        assert counted[row] == sizes
        expected = stays(name, model, sample, evenly(ratio))
        padding = batch["input_ids"].shape[1] - sample["input_ids"].shape[1]
        assert [c - padding for c in stayed[row]] == expected
        close(logits[row], short_logits(bare, sample, tokens[row], expected))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_methods_keep_exact_counts_alone_and_in_a_batch(name, method, kind):
    model = tiny.build(name)
    batch = KINDS[kind](name, model)
    with model.compressed(method, 0.5, **METHODS[method]):
        _, logits = greedy(model, batch)
        last = model.compression.last
        for row in range(2):
            sample = tiny.single(batch, row, name)
            close(greedy(model, sample)[1][0], logits[row])
            assert model.compression.last.visual_kept[0] == last.visual_kept[row]
            found = parts(name, model, sample).values()
            mine = [(n, [c for c in crops if c.image == i]) for _, crops, rows in found for i, n in enumerate(rows)]
            assert len(mine) == len(last.visual_kept[row])
            for (rows, crops), kept in zip(mine, last.visual_kept[row]):
                tokens = {r for c in crops for r in c.rows}
                assert set(range(rows)) - tokens <= set(kept)
                count, limit = len(set(kept) & tokens), budget.kept(len(tokens), 0.5)
                assert 0 < count <= limit if method == "downsample" else count == limit


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_the_right_tower_reach_the_right_tokens(name):
    """fastervlm against attention maps of the eager towers, pooled by hand; an image and a video in one prompt."""
    model, eager = tiny.build(name), tiny.build(name, attn="eager")
    sample = tiny.single(tiny.both(name, model), 0, name)
    towers = {m: getattr(eager.model, f"{m}_tower" if name == "video_llava" else "vision_tower") for m in MODALITIES}
    with model.compressed("fastervlm", 0.6), torch.no_grad():
        model(**sample)
        (stayed,) = alive(model)

    def choose(modality, crops):
        if modality == "video":
            maps = pooled(name, scores(name, towers[modality], sample["pixel_values_videos"].flatten(0, 1)))
        elif name == "video_llava":
            maps = scores(name, towers[modality], sample["pixel_values_images"])
        else:
            maps = scores(name, towers[modality], tower_pixels(sample, crops))
        return [top(maps[c.crop][c.tokens], k) for c, k in zip(crops, budgets(crops, 0.6))]

    assert stayed == stays(name, model, sample, choose)


@pytest.mark.parametrize("name", NAMES)
def test_merged_vectors(name, monkeypatch):
    """visionzip merges what the projector reads; where frames are pooled behind it, what the language model reads."""
    model, bare = tiny.build(name), tiny.build(name)
    sample = tiny.single(tiny.video(name, model), 0, name)
    ((token, crops, lengths),) = parts(name, model, sample).values()
    places = (sample["input_ids"][0] == token).nonzero()[:, 0]
    with model.compressed("visionzip", 0.5):
        spy = Spy(monkeypatch, model.compression.context.vision_method)
        tokens, logits = greedy(model, sample)
        (stayed,) = alive(model)
    whole, vectors = embed(bare, sample, sample["input_ids"])[0], {}
    read, _ = projected(bare, sample, "video")
    for images, assignment in spy.calls:
        for row, unit in enumerate(images._units):
            crop = crops[unit.crop]
            at = places[torch.tensor(crop.rows) + sum(lengths[: crop.image])]
            W = matrix(assignment, row, len(at))
            if name == "llava_onevision":
                y = W @ whole[at]
            else:
                with torch.no_grad():
                    y = bare.model.multi_modal_projector((W @ read[crop.crop, -len(at) :])[None])[0]
            vectors |= dict(zip(at[assignment.kept[row]].tolist(), y))
    assert len(vectors) == sum(budgets(crops, 0.5))
    close(logits[0], short_logits(bare, sample, tokens[0], stayed, vectors))


@pytest.mark.parametrize("mode", ["max", "conv"])
def test_other_poolings(mode):
    model = tiny.build("llava_next_video")
    config = model.config
    config.spatial_pool_mode = mode
    model.model.vision_resampler = type(model.model.vision_resampler)(config)
    sample = tiny.single(tiny.video("llava_next_video", model), 0, "llava_next_video")
    with model.compressed("visionzip", 0.5), torch.no_grad():
        model(**sample)
        assert [len(k) for k in model.compression.last.visual_kept[0]] == [14, 14]


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_beams(name):
    model = tiny.build(name)
    batch = tiny.both(name, model)
    with model.compressed("visionzip", 0.5):
        close(greedy(model, batch, prefill_chunk_size=16)[1], greedy(model, batch)[1])
        beams = model.generate(**batch, **(GREEDY | dict(num_beams=3)))
        for row in range(2):
            alone = model.generate(**tiny.single(batch, row, name), **(GREEDY | dict(num_beams=3)))
            assert torch.equal(alone[0, -5:], beams[row, -5:])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_from_elsewhere(name):
    """Video-LLaVA's frames are then videos of their own, of which each keeps its exact share."""
    model, bare = tiny.build(name), tiny.build(name)
    batch = tiny.video(name, model)
    rest = {k: v for k, v in batch.items() if k != "pixel_values_videos"}
    encode = lambda: {"video": bare.model.get_video_features(**tiny.encoder_inputs(batch, "video"), return_dict=True)}
    with model.compressed("divprune", 0.5):
        expected = model(**batch).logits
    with model.compressed("divprune", 0.5):
        got, last = model(**rest, mm_encoder_outputs=encode()).logits, model.compression.last
        if name == "video_llava":
            assert last.visual_tokens == [[N] * 2 * FRAMES, [N] * FRAMES]
            assert all(len(k) == 1 + N // 2 for row in last.visual_kept for k in row)
        close(got, expected)
    with model.compressed("fastervlm", 0.5), pytest.raises(ValueError, match=r"(?s)fastervlm.*mm_encoder_outputs"):
        model(**rest, mm_encoder_outputs=encode())


@pytest.mark.parametrize("how", ["forward", "generate"])
@pytest.mark.parametrize("name", NAMES)
def test_videos_that_do_not_fit_the_prompt(name, how):
    model = tiny.build(name)
    batch = tiny.both(name, model)
    run = (lambda b: greedy(model, b)[1]) if how == "generate" else (lambda b: model(**b).logits.detach())
    videos = batch["pixel_values_videos"]
    plain = run(batch)
    with model.compressed("visionzip", 0.5):
        expected = run(batch)
        for wrong in (videos.repeat(2, 1, 1, 1, 1), videos[:, :2]):
            with untouched(model), pytest.raises(ValueError, match="do not match"):
                run(dict(batch, pixel_values_videos=wrong))
        assert torch.equal(run(batch), expected)
    assert torch.equal(run(batch), plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_later_stages_know_the_frames(name, kind):
    """Decoder and cache methods behind videos: a row of the batch as alone."""
    model = tiny.build(name)
    batch = KINDS[kind](name, model)
    with model.compressed(["fastv", "snapkv"], [0.4, 0.4], layer=1, window=4):
        _, logits = greedy(model, batch)
        for row in range(2):
            close(greedy(model, tiny.single(batch, row, name))[1][0], logits[row])
