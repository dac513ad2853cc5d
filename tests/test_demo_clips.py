"""The rendered clips: what they show, what is asked about them, and how they reach a model."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from hf_compress.demo import load_demo
from hf_compress.demo.clip_dataset import grey_clip, load_clips
from hf_compress.demo.clips import DIRECTIONS, MOMENTS, MOST, QUESTION_TYPES, SIDE, ClipRenderer, ask
from hf_compress.demo.scenes import GRID, PLACES
from hf_compress.evaluate.prompts import encode
from hf_compress.pictures import Frames


@pytest.fixture(scope="module")
def clips():
    renderer = ClipRenderer("test")
    return [renderer[index] for index in range(12)]


def middle(clip, number, moment):
    """Center of the painted pixels of an object, (x, y), or None."""
    y, x = (clip.owner[moment] == number + 1).nonzero()
    return (x.mean(), y.mean()) if len(x) else None


def test_the_script_is_what_is_painted(clips):
    """Who is seen when and where, read from the owners of the pixels."""
    for clip in clips:
        assert clip.pixels.shape == (MOMENTS, SIDE, SIDE, 3) and clip.pixels.dtype == np.uint8
        assert [o.role for o in clip.objects] == ["moves", "still", "new", "new", "new"]
        assert len({o.name for o in clip.objects}) == 5
        for number, o in enumerate(clip.objects):
            seen = [middle(clip, number, moment) for moment in range(MOMENTS)]
            shown = [moment for moment, at in enumerate(seen) if at is not None]
            assert shown == list(range(o.first, o.last + 1))
            for at, cell in zip((seen[o.first], seen[o.last]), o.cells):
                wanted = (cell % GRID + 0.5, cell // GRID + 0.5)
                assert all(abs(a - b * SIDE / GRID) < 6 for a, b in zip(at, wanted))
        way = np.subtract(middle(clip, 0, MOMENTS - 1), middle(clip, 0, 0)) / (SIDE / GRID)
        down, right = DIRECTIONS[clip.objects[0].direction]
        assert (np.sign(np.round(way)) == (right, down)).all() and np.abs(way).max() > 0.7
        new = clip.objects[2:]
        assert new[0].first < new[1].first < new[2].first and sum(o.first == o.last for o in new) == 1


def test_what_does_not_move_keeps_its_pixels(clips):
    """Only noise changes the background."""
    for clip in clips:
        free = (clip.owner == 0).all(0)
        free &= ~np.pad(~free, 2)[:-4, 2:-2] & ~np.pad(~free, 2)[4:, 2:-2] & ~np.pad(~free, 2)[2:-2, :-4]
        free &= ~np.pad(~free, 2)[2:-2, 4:]
        change = clip.pixels[1:].astype(int) - clip.pixels[:-1]
        assert np.abs(change[:, free]).mean() < 4 < np.abs(change).max()
    assert (clips[0].frames[0::2] == clips[0].frames[1::2]).all() and len(clips[0].frames) == 2 * MOMENTS


def test_answers_follow_from_the_script(clips):
    for clip in clips:
        moves, still, *new = clip.objects
        (gone,) = (o for o in new if o.first == o.last)
        right = {
            "what moves ?": str(moves),
            "what color is the object that moves ?": moves.color,
            "what never changes ?": str(still),
            "what appears first ?": str(new[0]),
            "what appears last ?": str(new[2]),
            f"what appears after the {new[0].name} ?": str(new[1]),
            f"what appears after the {new[1]} ?": str(new[2]),
            "what vanishes ?": str(gone),
            "which digits appear ?": " ".join(o.name for o in new),
            f"where is the {moves.name} at the end ?": PLACES[moves.cells[1]],
            "where does it move ?": moves.direction,
            **{f"where does the {o.name} appear ?": PLACES[o.cells[0]] for o in new},
        }
        said = {}
        for seed in range(4):
            said |= {q: a for _, q, a in ask(clip.objects, MOST, ClipRenderer("test", seed).rng("questions", 0))}
        assert len(said.keys() & right.keys()) > 8
        assert all(said[question] == right[question] for question in said.keys() & right.keys())


def test_guessing_without_looking_is_poor():
    """The best answer to every question, known from other clips, is right in less than 15 %."""
    found = {kind: Counter() for kind in QUESTION_TYPES}
    renderer = ClipRenderer("test")
    for index in range(150):
        for kind, _, answer in ask(renderer[index].objects, 4, renderer.rng("questions", index)):
            found[kind][answer] += 1
    assert all(found.values())
    assert sum(max(c.values()) for c in found.values()) / 600 < 0.15


def test_clips_depend_on_nothing_but_their_number():
    first, again = load_clips("test", clips=3, questions=2), load_clips("test", clips=2, questions=2)
    for a, b in zip(first, again):
        assert a == b
    other = load_clips("test", clips=1, questions=2, seed=1)
    assert np.abs(np.asarray(other[0]["video"][0], int) - np.asarray(first[0]["video"][0], int)).mean() > 1
    assert first["video_id"] == [0, 0, 1, 1, 2, 2] and len(first[0]["video"]) == 2 * MOMENTS
    assert first[0]["video"][0].size == (SIDE, SIDE) and set(first["type"]) <= set(QUESTION_TYPES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split='dev'"),
        ({"clips": 0}, "clips=0; choose 1"),
        ({"questions": 17}, "questions=17; choose 1 to 16"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        load_clips(**options)


def test_frames_reach_the_model_two_by_two(clip_processor, clips):
    """The pixels of the patches, by hand; different frames of a pair stay apart."""
    frames = [Image.fromarray(pixels) for pixels in clips[0].pixels[:3]]
    inputs = encode(clip_processor, [Frames(frames)], ["what moves ?"])
    assert inputs["video_grid_thw"].tolist() == [[2, 16, 16]] and inputs["second_per_grid_ts"].tolist() == [1.0]
    assert int((inputs["input_ids"] == clip_processor.video_token_id).sum()) == 2 * 64
    mean, std = (torch.tensor(getattr(clip_processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    pixels = (torch.from_numpy(clips[0].pixels[[0, 1, 2, 2]]).float() / 255 - mean) / std  # the last one counts twice
    rows = pixels.view(2, 2, 8, 2, 4, 8, 2, 4, 3).permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(2 * 256, -1)
    torch.testing.assert_close(inputs["pixel_values_videos"], rows, atol=1e-5, rtol=1e-5)


def test_clips_in_a_batch_are_those_alone(clip_processor, clips):
    shown = [Frames(map(Image.fromarray, clip.frames)) for clip in clips[:2]]
    both = encode(clip_processor, shown, ["what moves ?", "where does it move ?"])
    alone = [encode(clip_processor, [s], [q]) for s, q in zip(shown, ["what moves ?", "where does it move ?"])]
    assert torch.equal(both["pixel_values_videos"], torch.cat([one["pixel_values_videos"] for one in alone]))
    assert both["attention_mask"].sum(1).tolist() == [one["input_ids"].shape[1] for one in alone]
    assert len(grey_clip()) == 2 * MOMENTS and grey_clip()[0].size == (SIDE, SIDE)


def test_frames_of_different_sizes_are_refused(clip_processor):
    with pytest.raises(ValueError, match="frames of one have 2 sizes"):
        clip_processor.video_processor([[Image.new("RGB", (64, 64)), Image.new("RGB", (96, 64))]])


def test_what_was_kept_is_shown_on_the_frames(clip_processor, clips):
    """`compression.show` finds the frames through the processor."""
    model, _ = load_demo("qwen")
    frames = [Image.fromarray(pixels) for pixels in clips[0].frames]
    with model.compressed("evs", ratio=0.75), torch.inference_mode():
        model(**encode(clip_processor, [Frames(frames)], ["what moves ?"]))
        shown = model.compression.show(frames, clip_processor, video=True)
        kept = model.compression.last.visual_kept[0][0]
    assert len(kept) == 128 and shown.size[0] > 2 * shown.size[1]  # moments stand in a row
