"""Tiny, randomly initialised models and ragged batches for them: no hub, no tokenizer, no processor.

    model = build("llava")
    batch = inputs("llava", model)                      # two rows, left padded, three images
    model.generate(**batch, **GREEDY)
    model.generate(**single(batch, 0, "llava"), **GREEDY)  # row 0 alone: the same new tokens

The shapes are those of real checkpoints in small: grouped-query attention, a CLIP tower with [CLS], a
windowed Qwen2.5 tower with full-attention blocks, M-RoPE, a sliding window shorter than the prompts.
"""

import math
from collections.abc import Callable, Sequence

import torch
import transformers as T

Batch = dict[str, torch.Tensor]
Prompt = Sequence[int]  # token ids; IMG stands for a whole image and is expanded as a processor does it

PAD, BOS, EOS = 0, 1, 2
IMG, VID, VISION_START, VISION_END = 90, 91, 92, 93
VOCAB = 100
PATCH = 4  # pixels per side, in both towers
LLAVA_SIDE = 24  # pixels per side
LLAVA_TOKENS = (LLAVA_SIDE // PATCH) ** 2  # 36 per image; the tower also carries a [CLS]
QWEN_MERGE = 2  # 2 x 2 patches become one token
QWEN_GRIDS = ([1, 8, 8], [1, 4, 12], [1, 8, 4])  # patches (t, h, w) of three images: 16, 12 and 8 tokens
QWEN_WINDOW = 16  # pixels per side: 4 x 4 patches, so the first image has four windows
SLIDING_WINDOW = 9  # of "mistral_window": shorter than every prompt below

# Without the suppression a model may emit a placeholder. With `use_cache=False` the next step would read it
# as an image that has no pixels, and raise.
GREEDY = dict(max_new_tokens=5, do_sample=False, suppress_tokens=[IMG, VID])

TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
    tie_word_embeddings=False,
)


def _llava() -> T.LlavaConfig:
    tower = T.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,  # features come from the third (vision_feature_layer=-2)
        num_attention_heads=2,
        image_size=LLAVA_SIDE,
        patch_size=PATCH,
        projection_dim=16,
    )
    text = T.LlamaConfig(**TEXT)
    return T.LlavaConfig(vision_config=tower, text_config=text, image_token_id=IMG, image_seq_length=LLAVA_TOKENS)


def _qwen2_5_vl() -> T.Qwen2_5_VLConfig:
    tower = dict(
        depth=4,
        fullatt_block_indexes=[1, 3],
        window_size=QWEN_WINDOW,
        patch_size=PATCH,
        spatial_merge_size=QWEN_MERGE,
        temporal_patch_size=2,
        hidden_size=16,
        intermediate_size=32,
        num_heads=2,
        out_hidden_size=TEXT["hidden_size"],
    )
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)
    return T.Qwen2_5_VLConfig(
        vision_config=tower,
        text_config=dict(TEXT, rope_parameters=rope),
        image_token_id=IMG,
        video_token_id=VID,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )


_VISION: dict[str, Callable[[], T.PreTrainedConfig]] = {"llava": _llava, "qwen2_5_vl": _qwen2_5_vl}
_DECODER_ONLY: dict[str, Callable[[], T.PreTrainedConfig]] = {
    "llama": lambda: T.LlamaConfig(**TEXT),
    "mistral": lambda: T.MistralConfig(**TEXT, sliding_window=None),
    "mistral_window": lambda: T.MistralConfig(**TEXT, sliding_window=SLIDING_WINDOW),
    "qwen2": lambda: T.Qwen2Config(**TEXT),
    "qwen3": lambda: T.Qwen3Config(**TEXT, head_dim=8),
}
VISION = list(_VISION)
DECODER_ONLY = list(_DECODER_ONLY)
ARCHITECTURES = VISION + DECODER_ONLY


def build(name: str, attn: str = "sdpa") -> T.PreTrainedModel:
    """The model called `name` in float32 and eval mode: the same weights at every call."""
    config = (_VISION | _DECODER_ONLY)[name]()
    auto = T.AutoModelForImageTextToText if name in VISION else T.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation=attn).eval()
    # No end token: every row generates as many tokens as asked for.
    model.generation_config.update(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None)
    _sharpen(model)
    return model


@torch.no_grad()
def _sharpen(model: T.PreTrainedModel) -> None:
    """Scale the matrices so that attention is peaked and every layer matters.

    At the default scale a random model attends evenly and copies its last token: it gives one greedy output
    for every prompt, and a test of equal outputs would pass whatever a method does to the prompt.
    """
    for key, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        if "embed_tokens" in key or "position_embedding" in key:
            std = 1.0
        else:
            gain = 2.0 if any(part in key for part in ("q_proj", "k_proj", "qkv", "lm_head")) else 1.5
            std = gain / math.sqrt(weight[0].numel())
        weight.mul_(std / weight.std())


def inputs(name: str, model: T.PreTrainedModel, *, side: str = "left") -> Batch:
    """Ragged batch of two, padded on `side`: two images in the first row, one in the second.

    The sizes of the images differ where the architecture allows it. Decoder-only models get text.
    """
    if name in DECODER_ONLY:
        return text_only(name, model, side=side)
    return batch(name, model, [[BOS, 5, IMG, 7, IMG, 8, 9], [BOS, 11, IMG, 13]], side=side)


def text_only(name: str, model: T.PreTrainedModel, *, side: str = "left") -> Batch:
    """Ragged batch of two without images: 24 and 15 tokens."""
    g = torch.Generator().manual_seed(2)
    prompts = [[BOS, *torch.randint(3, 80, (n,), generator=g).tolist()] for n in (23, 14)]
    return batch(name, model, prompts, side=side)


def mixed(name: str, model: T.PreTrainedModel, *, side: str = "left") -> Batch:
    """Ragged batch of two: an image in the first row, text alone in the second. Vision models only."""
    _need_vision(name)
    return batch(name, model, [[BOS, 5, IMG, 7, 8, 9], [BOS, 11, 12, 13, 14, 15, 16]], side=side)


def edges(name: str, model: T.PreTrainedModel, *, side: str = "left") -> Batch:
    """Ragged batch of two: the first prompt starts with its image token, the second ends with it.

    Nothing stands outside them, neither BOS nor a vision delimiter. Vision models only.
    """
    _need_vision(name)
    return batch(name, model, [[IMG, 5, 7, 8, 9], [BOS, 11, 13, IMG]], side=side, delimiters=False)


def batch(
    name: str,
    model: T.PreTrainedModel,
    prompts: Sequence[Prompt],
    *,
    side: str = "left",
    delimiters: bool = True,
) -> Batch:
    """Any batch, on the device and in the dtype of `model`. Every IMG in `prompts` becomes a whole image.

    Args:
        side: where the padding goes, "left" or "right".
        delimiters: put VISION_START and VISION_END around images where the architecture has them.

    Returns:
        `input_ids` and `attention_mask` [rows, length], for qwen2_5_vl `mm_token_type_ids` as well. With
        images `pixel_values`: [images, 3, 24, 24] for llava; [patches of all images, 96] for qwen2_5_vl,
        which also gets `image_grid_thw` [images, 3].
    """
    count = sum(token == IMG for prompt in prompts for token in prompt)
    pixels = _pixels(name, count) if count else {}
    sizes = iter(_tokens_per_image(pixels)) if count else iter(())
    around = ([VISION_START], [VISION_END]) if name == "qwen2_5_vl" and delimiters else ([], [])
    rows = []
    for prompt in prompts:
        row: list[int] = []
        for token in prompt:
            row += [*around[0], *[IMG] * next(sizes), *around[1]] if token == IMG else [token]
        rows.append(row)
    result = _pad(rows, side)
    if name == "qwen2_5_vl":
        result["mm_token_type_ids"] = (result["input_ids"] == IMG).int()
    if count:
        pixels["pixel_values"] = pixels["pixel_values"].to(model.dtype)
    return {key: value.to(model.device) for key, value in (result | pixels).items()}


def single(batch: Batch, row: int, name: str) -> Batch:
    """Row `row` of `batch` alone: its tokens without padding and its images, if it has any."""
    held = batch["attention_mask"][row].bool()
    token_keys = ("input_ids", "attention_mask", "mm_token_type_ids")
    alone = {key: batch[key][row : row + 1, held] for key in token_keys if key in batch}
    if "pixel_values" not in batch or not (alone["input_ids"] == IMG).any():
        return alone
    # The images of all rows stand in one list: those of this row end within its share of the placeholders.
    counts = (batch["input_ids"] == IMG).sum(1)
    stop = counts[: row + 1].sum()
    ends = torch.tensor(_tokens_per_image(batch), device=stop.device).cumsum(0)
    mine = (ends > stop - counts[row]) & (ends <= stop)
    if name == "qwen2_5_vl":
        patches = batch["image_grid_thw"].prod(-1)
        pixel_values = batch["pixel_values"][mine.repeat_interleave(patches)]
        return alone | dict(pixel_values=pixel_values, image_grid_thw=batch["image_grid_thw"][mine])
    return alone | dict(pixel_values=batch["pixel_values"][mine])


def _pixels(name: str, count: int) -> Batch:
    """`count` images of noise; the k-th has the k-th size of QWEN_GRIDS, round and round."""
    _need_vision(name)
    g = torch.Generator().manual_seed(1)
    if name == "llava":
        return dict(pixel_values=torch.randn(count, 3, LLAVA_SIDE, LLAVA_SIDE, generator=g))
    grid = torch.tensor([QWEN_GRIDS[k % len(QWEN_GRIDS)] for k in range(count)])
    values = 3 * 2 * PATCH * PATCH  # channels x frames per patch x pixels
    return dict(pixel_values=torch.randn(int(grid.prod(-1).sum()), values, generator=g), image_grid_thw=grid)


def _tokens_per_image(pixels: Batch) -> list[int]:
    if "image_grid_thw" in pixels:
        return (pixels["image_grid_thw"].prod(-1) // QWEN_MERGE**2).tolist()
    return [LLAVA_TOKENS] * len(pixels["pixel_values"])


def _pad(rows: Sequence[Prompt], side: str) -> Batch:
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
    if name not in VISION:
        raise ValueError(f"{name!r} takes no images; {VISION} do")
