import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image

import hf_compress
from hf_compress.show import compare, entries, overlay, photos
from hf_compress.show.geometry import views
from hf_compress.show.overlay import DROPPED
from tests.tiny.batches import inputs, token_types
from tests.tiny.models import build
from tests.tiny.text import BOS, IMG, VID
from tests.tiny.vision import ANYRES_PINPOINTS

IMAGE = np.full((28, 42, 3), 200, np.uint8)


def drawn(ax):
    return np.asarray(ax.images[0].get_array())


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_overlay_shows_kept_cells_and_fades_the_others():
    pixels = np.random.default_rng(0).integers(0, 256, (28, 42, 3), np.uint8)
    shown = drawn(overlay(Image.fromarray(pixels), torch.tensor([0, 5]).tolist(), (2, 3), title="two"))
    for i in range(6):
        cell = np.s_[i // 3 * 14 : i // 3 * 14 + 14, i % 3 * 14 : i % 3 * 14 + 14]
        same = np.allclose(shown[cell], pixels[cell] / 255)
        assert same == (i in (0, 5)), i
    assert shown[:14, 14:28].std() < (pixels[:14, 14:28] / 255).std()


def test_overlay_of_a_grid_that_does_not_divide_the_image():
    shown = drawn(overlay(IMAGE, range(35), (5, 7), dim=1))
    assert np.allclose(shown, IMAGE / 255)


def test_cells_that_became_one_token_are_outlined_in_their_mean_colour():
    pixels = np.random.default_rng(0).integers(0, 256, (28, 42, 3), np.uint8) / 255
    ax = overlay(pixels, [1, 5], (2, 3), owners=[1, 1, 1, -1, -1, 5])
    shown, cells = drawn(ax), [np.s_[i // 3 * 14 : i // 3 * 14 + 14, i % 3 * 14 : i % 3 * 14 + 14] for i in range(6)]
    assert np.allclose(shown[:14], pixels[:14].mean((0, 1))) and np.allclose(shown[cells[5]], pixels[cells[5]])
    assert shown[cells[3]].min() > 0.6  # pale
    (lines,) = ax.collections
    edges = {tuple(map(tuple, segment.round(2).tolist())) for segment in lines.get_segments()}
    top = {((x - 0.5, y), (x + 13.5, y)) for x in (0, 14, 28) for y in (-0.5, 13.5)}  # of the three that are one
    assert edges == top | {((x, -0.5), (x, 13.5)) for x in (-0.5, 41.5)}


@pytest.mark.parametrize(
    ("owners", "message"), [([0, 0], r"owners has shape \(2,\)"), ([0] * 5 + [4], "not kept"), ([-2] * 6, "not kept")]
)
def test_overlay_refuses_owners_of_another_image(owners, message):
    with pytest.raises(ValueError, match=message):
        overlay(IMAGE, [0], (2, 3), owners=owners)


def test_what_became_of_every_token():
    """By hand: the cells of a grid that is pooled; selections stand for themselves; a matrix for all has no owners."""
    model, batch = build("llava"), inputs("llava", build("llava"))
    for method, options in (("downsample", {"keep": 4}), ("uniform", {"keep": 9}), ("token_transforming", {"keep": 9})):
        with model.compressed(method, **options):
            model(**batch)
            last = model.compression.last
        for sample_kept, sample_owners in zip(last.visual_kept, last.visual_owners):
            assert len(sample_kept) == len(sample_owners) > 0
            for kept, owners in zip(sample_kept, sample_owners):
                assert len(owners) == 36
                if method == "downsample":
                    cells = [
                        [next(k for k in kept if k // 18 == i // 18 and k % 6 // 3 == i % 6 // 3)] for i in range(36)
                    ]
                    assert owners == [k for (k,) in cells]
                else:
                    assert owners == [i if i in kept else -1 for i in range(36)]


def test_overlay_draws_on_given_axes_and_takes_grey_and_float_images():
    _, ax = plt.subplots()
    assert overlay(np.zeros((8, 8)), [], (2, 2), ax) is ax
    assert drawn(ax).shape == (8, 8, 3) and drawn(ax).min() > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IMAGE, [6], (2, 3)), "outside the 2 x 3 grid"),
        ((IMAGE, [-1], (2, 3)), "indices run from 0 to 5"),
        ((IMAGE, [1, 1], (2, 3)), "twice"),
        ((IMAGE, [[1]], (2, 3)), "visual_kept"),
        ((IMAGE, [], (0, 3)), "grid="),
        ((np.zeros((3, 8, 8)), [], (2, 2)), "permute"),
        ((np.full((8, 8, 3), -1.0), [], (2, 2)), "normalised"),
        ((np.full((8, 8, 3), np.nan), [], (2, 2)), "0..1"),
    ],
)
def test_overlay_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        overlay(*arguments)


def test_overlay_refuses_a_dim_outside():
    with pytest.raises(ValueError, match="dim=2"):
        overlay(IMAGE, [], (2, 3), dim=2)


def test_compare_writes_a_readable_png(tmp_path):
    kept = {"one": [[0], [1, 2]], "two": [[3], [4]]}
    path = compare([IMAGE, IMAGE], kept, (2, 3), ["first", "second"], tmp_path / "p.png", notes={"two": ["yes", "no"]})
    picture = np.asarray(Image.open(path))
    assert path == tmp_path / "p.png" and picture.shape[0] > 300 and picture[..., :3].std() > 10
    assert not plt.get_fignums()  # nothing is left open


@pytest.mark.parametrize("columns", [1, 3])
def test_no_text_of_a_comparison_is_cut(columns, tmp_path):
    """Its border is white on all sides: titles of three lines, and a legend of three entries below narrow pictures."""
    kept = {f"method {i}\nratio 0.5": [[0, 5]] for i in range(columns)}
    owners = {name: [[0, 0, -1, -1, -1, 5]] for name in kept}
    picture = Image.open(compare([IMAGE], kept, (2, 3), ["asked"], tmp_path / "p.png", owners=owners))
    pixels = np.asarray(picture.convert("RGB"))
    assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def test_compare_refuses(tmp_path):
    with pytest.raises(ValueError, match="images"):
        compare([], {"a": []}, (2, 3))
    with pytest.raises(ValueError, match="kept_by_method"):
        compare([IMAGE], {}, (2, 3))
    with pytest.raises(ValueError, match="'a' has 2 entries for 1 images"):
        compare([IMAGE], {"a": [[0], [1]]}, (2, 3))
    with pytest.raises(ValueError, match="notes for"):
        compare([IMAGE], {"a": [[0]]}, (2, 3), notes={"b": ["x"]})
    with pytest.raises(ValueError, match="owners for"):
        compare([IMAGE], {"a": [[0]]}, (2, 3), owners={"b": [[0] * 6]})
    with pytest.raises(FileNotFoundError, match="create it first"):
        compare([IMAGE], {"a": [[0]]}, (2, 3), path=tmp_path / "no" / "p.png")


def test_overlay_where_the_grid_lies():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 60, 3), np.uint8)
    with pytest.raises(ValueError, match=r"compression\.show"):
        overlay(pixels, [0], (2, 2))
    shown = drawn(overlay(pixels, [0], (2, 2), box=(20, 0, 40, 20)))
    assert np.allclose(shown[:10, 20:30], pixels[:10, 20:30] / 255)
    assert shown[:, :20].max() < 0.31 and shown[:, 40:].max() < 0.31 and shown[10:, 20:40].min() > 0.6
    with pytest.raises(ValueError, match="box="):
        overlay(pixels, [0], (2, 2), box=(20, 0, 80, 20))


SIDE = {"height": 24, "width": 24}
CROP = {"size": {"shortest_edge": 24}, "crop_size": SIDE}
QWEN = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
PROCESSORS = {
    "llava": lambda: T.CLIPImageProcessorPil(**CROP),
    "llava_next": lambda: T.LlavaNextImageProcessorPil(**CROP, image_grid_pinpoints=ANYRES_PINPOINTS),
    "llava_onevision": lambda: T.LlavaOnevisionImageProcessorPil(size=SIDE, image_grid_pinpoints=ANYRES_PINPOINTS),
    "qwen2_5_vl": lambda: T.Qwen2VLImageProcessorPil(**QWEN, size={"shortest_edge": 1024, "longest_edge": 3072}),
    "glm4v": lambda: T.Glm4vImageProcessorPil(**QWEN, size={"shortest_edge": 1024, "longest_edge": 6144}),
    "internvl": lambda: T.GotOcr2ImageProcessorPil(size=SIDE, crop_to_patches=True, min_patches=1, max_patches=6),
    "idefics3": lambda: T.Idefics3ImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 24}),
    "gemma3": lambda: T.Gemma3ImageProcessorPil(
        size=SIDE,
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=50,
        pan_and_scan_max_num_crops=3,
        pan_and_scan_min_ratio_to_activate=1.2,
    ),
    "mistral3": lambda: T.PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8}),
}
KEYS = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask", "batch_num_images")


def photo(size, seed):
    """Smooth colours that differ everywhere."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


WIDE, TALL = photo((300, 170), 0), photo((110, 200), 1)


def ask(name, model, processor, photos, method, **options):
    """One prompt that shows the photos; what was kept of them per image, by the report."""
    given = {k: v for k, v in processor(images=photos, return_tensors="pt").items() if k in KEYS}
    with torch.no_grad():
        features = model.base_model.get_image_features(**given).pooler_output
    images = features if isinstance(features, (list, tuple)) or features.ndim == 3 else [features]
    counts = [x.shape[:-1].numel() for x in images]
    ids = torch.tensor([[BOS, 5, *(t for n in counts for t in [*[IMG] * n, 7]), 8]])
    model.compress(method, **options)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), **token_types(name, ids), **given)
    return model.compression.last


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_token_stands_where_the_model_saw_it(name):
    """The colour of the photo below a cell is that of the pixels that went into its token, read by the adapter."""
    model, processor, shown = build(name), PROCESSORS[name](), [WIDE, TALL]
    last = ask(name, model, processor, shown, "uniform", ratio=0.5)
    assert model.compression.show(shown, processor).size[0] > 500
    found = [views(lambda p: processor(images=p, return_tensors="pt"), [one], processor) for one in shown]
    crops = last.visual_crops[0]
    dealt = [[(None, i)] for i in range(len(crops))]
    if len(crops) > len(shown):
        dealt = [[(n, n + len(found[0]) * k) for n in range(len(mine))] for k, mine in enumerate(found)]
    ends = [
        [
            np.asarray(processor(images=[Image.new("RGB", one.size, c)], return_tensors="pt")["pixel_values"])
            for c in ("black", "white")
        ]
        for one in shown
    ]
    for k, (one, mine) in enumerate(zip(shown, found)):
        pixels, low, high = np.asarray(one) / 255, ends[k][0].min(), ends[k][1].max()
        errors = []
        for number, image in dealt[k]:
            for crop in crops[image]:
                view = mine[number or crop.crop]
                base = crop.grid if crop.source is None else crops[image][0].grid
                cell = view.pixels.shape[1] // base[0]
                squares = view.pixels.reshape(3, base[0], cell, base[1], cell).mean((2, 4)).reshape(3, -1)
                squares = squares if crop.source is None else squares[:, crop.source.numpy()]
                boxes = view.cells(*base)
                boxes = boxes if crop.source is None else [boxes[i] for i in crop.source.tolist()]
                for seen, (left, top, right, bottom) in zip(squares.T, boxes):
                    inside = left > -1 and top > -1 and right < one.width + 1 and bottom < one.height + 1
                    piece = pixels[round(max(0, top)) : round(bottom), round(max(0, left)) : round(right)]
                    if inside and piece.size:
                        errors.append(np.abs(piece.mean((0, 1)) - (seen - low) / (high - low)).max())
        assert len(errors) > 8 and np.mean(errors) < 0.05, (len(errors), np.mean(errors))


def test_show_of_a_cropped_photo():
    """Against `overlay` of the part that the processor keeps, cut by hand."""
    model, processor = hf_compress.load_demo("llava")
    image = Image.new("RGB", (300, 100), "grey")
    image.paste("red", (0, 0, 90, 100))  # red lies outside the crop in the middle
    inputs = processor(images=image, text="USER: <image>\nwhat color ? ASSISTANT:", return_tensors="pt")
    with model.compressed("uniform", keep=98):
        model.generate(**inputs, max_new_tokens=1)
        kept = model.compression.last.visual_kept[0][0]
        states = []
        shade = photos.shade
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(photos, "shade", lambda p, s, d, r: states.append(s) or shade(p, s, d, r))
            model.compression.show(image)  # the processor is the one beside the checkpoint
    (state,) = states
    assert (state[:, :100] == photos.UNSEEN).all() and (state[:, 200:] == photos.UNSEEN).all()
    centres = np.round((np.arange(14) + 0.5) * 100 / 14).astype(int)
    cells = state[centres][:, 100 + centres].reshape(-1)
    assert np.flatnonzero(cells == photos.KEPT).tolist() == kept and (cells == DROPPED).sum() == 98


def test_show_after_a_decoder_method_is_what_reaches_the_last_layer():
    model, processor = build("llava"), PROCESSORS["llava"]()
    last = ask("llava", model, processor, [WIDE], "fastv", ratio=0.4, layer=1)
    left = sum(n - last.prompt_tokens[0] + 36 for (n,) in last.layer_tokens[-1:])
    assert int(photos._fates(last, 0)[0].stays.sum()) == left < 36


def test_the_last_run_is_printed_without_its_indices():
    last = ask("llava", build("llava"), PROCESSORS["llava"](), [WIDE], "uniform", ratio=0.5)
    assert "visual_left=[[18]]" in repr(last) and len(repr(last)) < 600


def test_show_has_a_panel_for_every_set_of_tokens():
    model, processor = build("llava"), PROCESSORS["llava"]()
    last, drawn = ask("llava", model, processor, [WIDE], "fastv", ratio=0.4, layer=2), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "_picture", lambda panels, dim, across: drawn.extend(panels))
        model.compression.show(WIDE, processor, layers=True)
    ((_, panels),) = drawn
    left = [n - last.prompt_tokens[0] + 36 for (n,) in last.layer_tokens]
    assert [panel.title for panel in panels] == ["layers 0–1: 36 of 36", f"layers 2–3: {left[2]} of 36"]
    assert left[:2] == [36, 36] and left[2] == left[3] < 36


@pytest.mark.parametrize(("method", "outlined"), [("uniform", 1), ("tome", 0)])
def test_kept_cells_are_outlined_where_no_outline_means_a_merged_token(method, outlined, monkeypatch):
    calls, model = [], build("llava")
    monkeypatch.setattr("matplotlib.axes.Axes.contour", lambda *args, **options: calls.append(args))
    ask("llava", model, PROCESSORS["llava"](), [WIDE], method, ratio=0.5)
    model.compression.show(WIDE, PROCESSORS["llava"]())
    assert len(calls) == outlined


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "llava_next"])
def test_show_refuses_what_the_model_did_not_see(name):
    model, processor = build(name), PROCESSORS[name]()
    model.compress("uniform", ratio=0.5)
    with pytest.raises(ValueError, match="no prompt"):
        model.compression.show(WIDE, processor)
    model.decompress()
    ask(name, model, processor, [WIDE, TALL], "uniform", ratio=0.5)
    for wrong in ([TALL, WIDE], [WIDE, WIDE], [WIDE], [], [WIDE, TALL, TALL]):
        with pytest.raises(ValueError, match="images:"):
            model.compression.show(wrong, processor)
    with pytest.raises(ValueError, match="processor=None"):
        model.compression.show([WIDE, TALL])
    with pytest.raises(ValueError, match="sample=1"):
        model.compression.show([WIDE, TALL], processor, sample=1)
    with pytest.raises(ValueError, match="reads no images"):
        model.compression.show([WIDE, TALL], object())
    model.decompress()
    ask(name, model, processor, [WIDE, TALL], "streaming", ratio=0.5)
    with pytest.raises(ValueError, match="no method of this compression acts on visual tokens"):
        model.compression.show([WIDE, TALL], processor)


@pytest.mark.parametrize(("size", "side"), [((1, 1), "width of 1"), ((8, 8), "width of 8"), ((300, 8), "height of 8")])
def test_a_photo_too_small_to_draw_on_is_told_as_that(size, side):
    model, processor = hf_compress.load_demo("llava")
    image = photo(size, 2)
    model.compress("uniform", ratio=0.5)
    model(**processor(images=image, text="USER: <image>\nwhat color ? ASSISTANT:", return_tensors="pt"))
    with pytest.raises(ValueError, match=rf"images: a photo with a {side} has too few pixels .* enlarge it"):
        model.compression.show(image, processor)


def test_padding_is_not_part_of_the_photo():
    """A processor that pads to a square: the box of its crop reaches beyond the photo on both sides."""
    processor = T.LlavaOnevisionImageProcessorPil(size=SIDE, image_grid_pinpoints=[[48, 48]])
    base, *tiles = views(lambda p: processor(images=p, return_tensors="pt"), [WIDE], processor)
    edges = np.array([t.box for t in tiles])
    assert np.allclose(base.box, (0, 0, 300, 170), atol=3)  # squeezed
    assert np.allclose(edges[:, [0, 2]], [[0, 150], [150, 300]] * 2, atol=6)
    assert edges[:2, 1].max() < -50 and edges[2:, 3].min() > 220


class Frames:
    """What a video processor gives, from an image processor: frames of (C, H, W), or patches that join two of them."""

    model_input_names = ("pixel_values_videos",)

    def __init__(self, image_processor):
        self.images, self.merge_size, self.patch_size, self.temporal_patch_size = image_processor, 2, 4, 2

    def __call__(self, videos, return_tensors, do_sample_frames):
        (frames,) = videos
        given = self.images(images=frames, return_tensors=return_tensors)
        if "image_grid_thw" not in given:
            return {"pixel_values_videos": given["pixel_values"][None]}
        thw, t = given["image_grid_thw"][0], len(frames) // 2
        pictures = given["pixel_values"].view(t, 2, int(thw.prod()), 3, 2, 16)
        return {
            "pixel_values_videos": pictures[:, :, :, :, 0].permute(0, 2, 3, 1, 4).reshape(-1, 96),
            "video_grid_thw": torch.tensor([[t, *thw[1:].tolist()]]),
        }


@pytest.mark.parametrize(("name", "pictures"), [("qwen2_5_vl", 2), ("llava_onevision", 4), ("video_llava", 4)])
def test_show_of_the_frames_of_a_video(name, pictures):
    model, processor = build(name), Frames(PROCESSORS.get(name, PROCESSORS["llava"])())
    if name == "llava_onevision":
        processor.images = PROCESSORS["llava"]()
    frames = [photo((300, 170), seed) for seed in range(4)]
    given = processor(videos=[frames], return_tensors="pt", do_sample_frames=False)
    with torch.no_grad():
        features = model.base_model.get_video_features(**given).pooler_output
    count = sum(x.shape[:-1].numel() for x in features)
    ids = torch.tensor([[BOS, 5, *[VID] * count, 7]])
    model.compress("uniform", ratio=0.5)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), **token_types(name, ids), **given)
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "_picture", lambda panels, dim, across: drawn.extend(panels))
        model.compression.show(frames, processor, video=True)
    assert [one for one, _ in drawn] == frames[:: 4 // pictures]
    kept = sum(int(panel.title.split()[0]) for _, panels in drawn for panel in panels)
    assert kept == model.compression.last.visual_left[0][0] and all(len(panels) == 1 for _, panels in drawn)
    for wrong in (frames[::-1], frames[:2]):
        with pytest.raises(ValueError, match="images:"):
            model.compression.show(wrong, processor, video=True)


def test_the_map_of_the_cache_is_what_the_cache_holds():
    """Per head, against the keys: of a bare run those at the places that are drawn dark."""
    model, batch = build("llava"), inputs("llava", build("llava"), side="left")
    with torch.no_grad():
        whole = model(**batch, use_cache=True).past_key_values
        with model.compressed("snapkv", ratio=0.5, window=4):
            with pytest.raises(ValueError, match="no prompt"):
                model.compression.show_cache()
            cache = model(**batch, use_cache=True).past_key_values
            lines, layers, length, visual = entries.stored(model.compression.context, 1)
            assert model.compression.show_cache(1).size[0] > 1000
            with pytest.raises(ValueError, match="sample=2"):
                model.compression.show_cache(2)
    assert visual.tolist() == (batch["input_ids"][1] == IMG).tolist()
    for line, layer, head in zip(lines, layers, [0, 1] * len(whole.layers)):
        kept = cache.layers[layer].keys[1, head]
        found = whole.layers[layer].keys[1, head][torch.from_numpy(line)]
        assert torch.allclose(kept[-len(found) :], found, atol=1e-5) and 0 < len(found) < length
    assert layers == [layer for layer in range(len(whole.layers)) for _ in range(2)]


def test_long_lines_are_drawn_as_shares():
    one = np.zeros((1, 2500), bool)
    one[0, [0, 1, 1234]] = True
    binned = entries._binned(one)
    assert binned.shape == (1, 1000) and np.isclose((binned * np.diff([*np.arange(1000) * 5 // 2, 2500])).sum(), 3)
