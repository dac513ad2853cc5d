"""Ragged batches for the tiny models: no tokenizer, no processor."""

from collections.abc import Sequence

import torch
import transformers as T

from tests.tiny.models import ALL_VISION, FAMILIES, VIDEO
from tests.tiny.text import BOS, IMG, PAD, VID, VISION_END, VISION_START
from tests.tiny.vision import (
    ANYRES_TILES,
    ANYRES_TOKENS,
    FRAMES,
    GEMMA4_SHAPES,
    LFM2_SHAPES,
    LLAVA_SIDE,
    LLAVA_TOKENS,
    MLLAMA_TILES,
    PATCH,
    PIXTRAL_SIZES,
    POOLED_TOKENS,
    QWEN_GRIDS,
    QWEN_MERGE,
    QWEN_VIDEO_GRIDS,
)

Batch = dict[str, torch.Tensor]
Prompt = Sequence[int]  # token ids; IMG (VID) stands for a whole image (video) and is expanded as a processor does

# Without the suppression a model may emit a placeholder. With `use_cache=False` the next step would read it
# as an image that has no pixels, and raise.
GREEDY = dict(max_new_tokens=5, do_sample=False, suppress_tokens=[IMG, VID])

# Arguments of a batch by what their first dimension counts.
TOKEN_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "cross_attention_mask")
IMAGE_KEYS = ("pixel_values", "pixel_values_images", "image_grid_thw", "image_sizes", "pixel_attention_mask")
IMAGE_KEYS += ("spatial_shapes", "image_position_ids", "aspect_ratio_ids", "aspect_ratio_mask")
VIDEO_KEYS = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "video_second_per_grid")

PATCHED = [*FAMILIES["qwen"], *FAMILIES["qwen3_5"]]  # pixels are rows of patches, sizes are grids
PATCHED += [*FAMILIES["glm"], *FAMILIES["omni"]]
PER_ROW = [*FAMILIES["idefics3"], *FAMILIES["mllama"]]  # pixels (rows, images, ...): rows with fewer are filled up
POOLED = ["internvl", "gemma3", *FAMILIES["cohere"]]  # 2 x 2 patches become one token


def inputs(name: str, model: T.PreTrainedModel, *, side: str = "left") -> Batch:
    """Ragged batch of two, padded on `side`: two images in the first row, one in the second.

    The sizes of the images differ where the architecture allows it. Decoder-only models get text.
    """
    if name not in ALL_VISION:
        return text_only(name, model, side=side)
    return batch(name, model, [[BOS, 5, IMG, 7, IMG, 8, 9], [BOS, 11, IMG, 13]], side=side)


def text_only(name: str, model: T.PreTrainedModel, *, side: str = "left") -> Batch:
    """Ragged batch of two without images: 24 and 15 tokens."""
    g = torch.Generator().manual_seed(2)
    prompts = [[BOS, *torch.randint(3, 80, (n,), generator=g).tolist()] for n in (23, 14)]
    return batch(name, model, prompts, side=side)


def mixed(name: str, model: T.PreTrainedModel, *, side: str = "left") -> Batch:
    """Ragged batch of two: an image in the first row, text alone in the second. Vision models only.

    On Mllama the second row depends on the first: a token that may see no image attends evenly to all there are.
    """
    _need_vision(name)
    return batch(name, model, [[BOS, 5, IMG, 7, 8, 9], [BOS, 11, 12, 13, 14, 15, 16]], side=side)


def edges(name: str, model: T.PreTrainedModel, *, side: str = "left") -> Batch:
    """Ragged batch of two: the first prompt starts with its image token, the second ends with it.

    Nothing stands outside them, neither BOS nor a vision delimiter (without which Qwen2.5-Omni cannot count images).
    Vision models only.
    """
    _need_vision(name)
    delimiters = name in FAMILIES["omni"]
    return batch(name, model, [[IMG, 5, 7, 8, 9], [BOS, 11, 13, IMG]], side=side, delimiters=delimiters)


def video(name: str, model: T.PreTrainedModel, *, side: str = "left") -> Batch:
    """Ragged batch of two: two videos in the first row, one in the second. Models in VIDEO only."""
    return batch(name, model, [[BOS, 5, VID, 7, VID, 8, 9], [BOS, 11, VID, 13]], side=side)


def both(name: str, model: T.PreTrainedModel, *, side: str = "left") -> Batch:
    """Ragged batch of two: a video and an image in the first row, an image in the second. Models in VIDEO only."""
    return batch(name, model, [[BOS, 5, VID, 7, IMG, 8, 9], [BOS, 11, IMG, 13]], side=side)


def batch(
    name: str,
    model: T.PreTrainedModel,
    prompts: Sequence[Prompt],
    *,
    side: str = "left",
    delimiters: bool = True,
) -> Batch:
    """Any batch, on the device and in the dtype of `model`. Every IMG in `prompts` becomes a whole image, VID a video.

    Args:
        side: where the padding goes, "left" or "right".
        delimiters: put VISION_START and VISION_END around images where the architecture has them.

    Returns:
        `input_ids` and `attention_mask` [rows, length], on Qwen-VL and GLM-V `mm_token_type_ids` as well, on Gemma
        `token_type_ids`, on Mllama `cross_attention_mask`. With images `pixel_values`: [images, 3, 24, 24], as a rule;
        [images, 5, 3, 24, 24] and `image_sizes` for the AnyRes family; [images, 3, 32, 32], padded, and `image_sizes`
        for Pixtral; [patches of all images, 96] and `image_grid_thw` [images, 3] for Qwen-VL and GLM-V;
        [images, 40, 48], padded, and `spatial_shapes` [images, 2] for LFM2-VL, `image_position_ids` for Gemma 4;
        [rows, images, ...] for Idefics3 and Mllama.
    """
    images, videos = ([[*prompt].count(token) for prompt in prompts] for token in (IMG, VID))
    pixels = _images(name, images) if sum(images) else {}
    frames = _videos(name, sum(videos)) if sum(videos) else {}
    spans = {IMG: iter(_image_spans(name, pixels, delimiters)), VID: iter(_video_spans(name, frames, delimiters))}
    rows = []
    for prompt in prompts:
        row: list[int] = []
        for token in prompt:
            row += next(spans[token]) if token in spans else [token]
        rows.append(row)
    result = pad(rows, side)
    ids = result["input_ids"]
    result |= token_types(name, ids)
    if name == "mllama" and pixels:  # every token sees all images of its row: blind ones attend to all, padding too
        tiles = pixels["aspect_ratio_mask"] * (pixels["aspect_ratio_ids"] > 0)[..., None]
        result["cross_attention_mask"] = tiles[:, None].repeat(1, ids.shape[1], 1, 1)
    moved = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in (pixels | frames).items()}
    return {key: value.to(model.device) for key, value in (result | moved).items()}


def token_types(name: str, ids: torch.Tensor) -> Batch:
    """What an architecture is told about the tokens of a prompt."""
    if name in PATCHED and name not in FAMILIES["omni"]:
        return dict(mm_token_type_ids=(ids == IMG).int() + 2 * (ids == VID).int())
    if name == "gemma3":
        return dict(token_type_ids=(ids == IMG).long())
    return dict(token_type_ids=torch.zeros_like(ids)) if name == "paligemma" else {}


def single(batch: Batch, row: int, name: str) -> Batch:
    """Row `row` of `batch` alone: its tokens without padding and its images and videos, if it has any."""
    held = batch["attention_mask"][row].bool()
    alone = {key: batch[key][row : row + 1, held] for key in TOKEN_KEYS if key in batch}
    counted = ((IMG, IMAGE_KEYS, image_tokens(name, batch)), (VID, VIDEO_KEYS, video_tokens(name, batch)))
    for token, keys, sizes in counted:
        if not (alone["input_ids"] == token).any():
            continue
        # The images of all rows stand in one list: those of this row end within its share of the placeholders.
        counts = (batch["input_ids"] == token).sum(1)
        stop = counts[: row + 1].sum()
        ends = torch.tensor(sizes, device=stop.device).cumsum(0)
        mine = (ends > stop - counts[row]) & (ends <= stop)
        for key in keys:
            if key not in batch:
                continue
            if name in PER_ROW:
                alone[key] = batch[key][row : row + 1, : int(mine.sum())]
            elif name in PATCHED and key.startswith("pixel_values"):
                patches = batch["image_grid_thw" if token == IMG else "video_grid_thw"].prod(-1)
                alone[key] = batch[key][mine.repeat_interleave(patches)]
            else:
                alone[key] = batch[key][mine]
    if "cross_attention_mask" in alone:
        if "pixel_values" in alone:
            alone["cross_attention_mask"] = alone["cross_attention_mask"][:, :, : alone["pixel_values"].shape[1]]
        else:
            del alone["cross_attention_mask"]
    return alone


def encoder_inputs(batch: Batch, modality: str = "image") -> Batch:
    """The part of a batch that `get_image_features` (or `get_video_features`) takes."""
    keys = IMAGE_KEYS if modality == "image" else VIDEO_KEYS
    return {key: batch[key] for key in keys if key in batch and "second_per_grid" not in key}


def _images(name: str, per_row: Sequence[int]) -> Batch:
    """So many images of noise; the k-th has the k-th of the sizes that the architecture is given, round and round."""
    _need_vision(name)
    count, side = sum(per_row), LLAVA_SIDE
    g = torch.Generator().manual_seed(1)
    if name in PATCHED:
        return _patches(count, QWEN_GRIDS, g, "pixel_values", "image_grid_thw")
    if name in FAMILIES["anyres"]:
        sizes = torch.tensor([list(ANYRES_TOKENS)[k % len(ANYRES_TOKENS)] for k in range(count)])
        return dict(pixel_values=torch.randn(count, ANYRES_TILES, 3, side, side, generator=g), image_sizes=sizes)
    if name in FAMILIES["pixtral"]:
        sizes = torch.tensor([PIXTRAL_SIZES[k % len(PIXTRAL_SIZES)] for k in range(count)])
        pixels = torch.zeros(count, 3, 32, 32)
        for image, (h, w) in zip(pixels, sizes.tolist()):
            image[:, :h, :w] = torch.randn(3, h, w, generator=g)
        return dict(pixel_values=pixels, image_sizes=sizes)
    if name in FAMILIES["lfm2"]:  # rows of patches, filled up
        shapes = torch.tensor([LFM2_SHAPES[k % len(LFM2_SHAPES)] for k in range(count)])
        real = torch.arange(40) < shapes.prod(-1)[:, None]
        pixels = torch.randn(count, 40, 3 * PATCH * PATCH, generator=g) * real[..., None]
        return dict(pixel_values=pixels, spatial_shapes=shapes, pixel_attention_mask=real.long())
    if name == "gemma4":  # rows of patches with their places, filled up
        shapes = torch.tensor([GEMMA4_SHAPES[k % len(GEMMA4_SHAPES)] for k in range(count)])
        at = torch.arange(40)
        places = torch.stack([at % shapes[:, :1], at // shapes[:, :1]], -1)
        places[at >= shapes.prod(-1)[:, None]] = -1
        pixels = torch.rand(count, 40, 3 * PATCH * PATCH, generator=g) * (places >= 0).all(-1)[..., None]
        return dict(pixel_values=pixels, image_position_ids=places)
    if name == "mllama":  # the k-th image has one tile, two, one ...
        rows, most = len(per_row), max(per_row)
        pixels = torch.zeros(rows, most, MLLAMA_TILES, 3, side, side)
        ratios, mask = torch.zeros(rows, most, dtype=torch.long), torch.zeros(rows, most, MLLAMA_TILES).long()
        mask[:, :, 0] = 1
        for k, (row, i) in enumerate((row, i) for row, n in enumerate(per_row) for i in range(n)):
            tiles = 1 + k % 2
            pixels[row, i, :tiles] = torch.randn(tiles, 3, side, side, generator=g)
            ratios[row, i], mask[row, i, :tiles] = tiles, 1
        return dict(pixel_values=pixels, aspect_ratio_ids=ratios, aspect_ratio_mask=mask)
    pixels = torch.randn(count, 3, side, side, generator=g)
    if name in FAMILIES["idefics3"]:
        rows = [torch.cat([x, x.new_zeros(max(per_row) - len(x), *x.shape[1:])]) for x in pixels.split(list(per_row))]
        pixels = torch.stack(rows)
        return dict(pixel_values=pixels, pixel_attention_mask=pixels.ne(0).any(2).long())
    return {"pixel_values_images" if name == "video_llava" else "pixel_values": pixels}


def _videos(name: str, count: int) -> Batch:
    """`count` videos of noise."""
    if name not in VIDEO:
        raise ValueError(f"{name!r} takes no videos; {VIDEO} do")
    g = torch.Generator().manual_seed(3)
    if name not in PATCHED:
        return dict(pixel_values_videos=torch.randn(count, FRAMES, 3, LLAVA_SIDE, LLAVA_SIDE, generator=g))
    pixels = _patches(count, QWEN_VIDEO_GRIDS, g, "pixel_values_videos", "video_grid_thw")
    seconds = {"qwen2_5_vl": "second_per_grid_ts", "qwen2_5_omni_thinker": "video_second_per_grid"}
    return pixels | ({seconds[name]: torch.ones(count)} if name in seconds else {})


def _patches(count: int, grids: Sequence[list[int]], g: torch.Generator, pixels: str, thw: str) -> Batch:
    grid = torch.tensor([grids[k % len(grids)] for k in range(count)])
    values = 3 * 2 * PATCH * PATCH  # channels x frames per patch x pixels
    return {pixels: torch.randn(int(grid.prod(-1).sum()), values, generator=g), thw: grid}


def image_tokens(name: str, batch: Batch) -> list[int]:
    """Placeholders per image."""
    if "image_grid_thw" in batch:
        return (batch["image_grid_thw"].prod(-1) // QWEN_MERGE**2).tolist()
    if "image_sizes" in batch and name in FAMILIES["pixtral"]:
        return [h * w // (2 * PATCH) ** 2 for h, w in batch["image_sizes"].tolist()]
    if "image_position_ids" in batch:
        return ((batch["image_position_ids"] >= 0).all(-1).sum(1) // 4).tolist()
    if "spatial_shapes" in batch:
        return (batch["spatial_shapes"].prod(-1) // 4).tolist()
    if "image_sizes" in batch:
        return [ANYRES_TOKENS[tuple(size)] for size in batch["image_sizes"].tolist()]
    pixels = batch.get("pixel_values_images" if name == "video_llava" else "pixel_values")
    if pixels is None:
        return []
    if name in PER_ROW:
        return [1 if name == "mllama" else POOLED_TOKENS] * int(pixels.flatten(2).any(-1).sum())
    return [POOLED_TOKENS if name in POOLED else LLAVA_TOKENS] * len(pixels)


def video_tokens(name: str, batch: Batch) -> list[int]:
    """Placeholders per video."""
    if "video_grid_thw" in batch:
        return (batch["video_grid_thw"].prod(-1) // QWEN_MERGE**2).tolist()
    if "pixel_values_videos" not in batch:
        return []
    count, frames = batch["pixel_values_videos"].shape[:2]
    per_frame = LLAVA_TOKENS + 1 if name == "video_llava" else POOLED_TOKENS
    return [frames * per_frame + int(name == "llava_onevision")] * count  # the last row of a Onevision video: newline


def _image_spans(name: str, batch: Batch, delimiters: bool) -> list[list[int]]:
    """What stands for each image in the prompt."""
    named = name in [*PATCHED, *FAMILIES["cohere"], *FAMILIES["internvl"], *FAMILIES["lfm2"]]
    before, after = ([VISION_START], [VISION_END]) if named and delimiters else ([], [])
    return [[*before, *[IMG] * n, *after] for n in image_tokens(name, batch)]


def _video_spans(name: str, batch: Batch, delimiters: bool) -> list[list[int]]:
    """What stands for each video in the prompt: Qwen3-VL writes a time stamp before every frame."""
    before, after = ([VISION_START], [VISION_END]) if name in PATCHED and delimiters else ([], [])
    if not name.startswith("qwen3"):
        return [[*before, *[VID] * n, *after] for n in video_tokens(name, batch)]
    out = []
    for n, frames in zip(video_tokens(name, batch), batch.get("video_grid_thw", torch.zeros(0, 3))[:, 0].tolist()):
        stamps = range(20, 20 + int(frames))
        out.append([token for t in stamps for token in (t, *before, *[VID] * (n // len(stamps)), *after)])
    return out


def pad(rows: Sequence[Prompt], side: str = "left") -> Batch:
    """`input_ids` and `attention_mask` of ragged rows of token ids."""
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r} is neither 'left' nor 'right'")
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        held = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[i, held] = torch.tensor(row)
        mask[i, held] = 1
    return dict(input_ids=ids, attention_mask=mask)


def _need_vision(name: str) -> None:
    if name not in ALL_VISION:
        raise ValueError(f"{name!r} takes no images; {ALL_VISION} do")
