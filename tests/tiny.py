"""Tiny, randomly initialised models and ragged batches for them: no hub, no tokenizer, no processor.

    model = build("llava")
    batch = inputs("llava", model)                      # two rows, left padded, three images
    model.generate(**batch, **GREEDY)
    model.generate(**single(batch, 0, "llava"), **GREEDY)  # row 0 alone: the same new tokens

The shapes are those of real checkpoints in small: grouped-query attention, a CLIP tower with [CLS], a
windowed Qwen2.5 tower with full-attention blocks, M-RoPE, a sliding window shorter than the prompts.
`ARCHITECTURES` are the few that most tests run on; `ALL_ARCHITECTURES` are all, `FAMILIES` says which belong together.
"""

import math
from collections.abc import Callable, Sequence

import torch
import transformers as T

Batch = dict[str, torch.Tensor]
Prompt = Sequence[int]  # token ids; IMG (VID) stands for a whole image (video) and is expanded as a processor does

PAD, BOS, EOS = 0, 1, 2
IMG, VID, VISION_START, VISION_END = 90, 91, 92, 93
VOCAB = 100
PATCH = 4  # pixels per side, in all towers
LLAVA_SIDE = 24  # pixels per side
LLAVA_TOKENS = (LLAVA_SIDE // PATCH) ** 2  # 36 per image; the tower also carries a [CLS]
POOLED_TOKENS = LLAVA_TOKENS // 4  # 2 x 2 patches become one token: InternVL, Idefics3, SmolVLM, Gemma 3
ANYRES_PINPOINTS = [[24, 48], [48, 24], [48, 48]]  # pixels (h, w) to which images are resized before they are tiled
ANYRES_TOKENS = {(40, 30): 168, (20, 48): 114, (48, 48): 192}  # by original size: base view, tiles, newlines
ANYRES_TILES = 5  # pixel values are padded to the base view and four tiles
FRAMES = 3  # per video, where the architecture takes frames
QWEN_MERGE = 2  # 2 x 2 patches become one token
QWEN_GRIDS = ([1, 8, 8], [1, 4, 12], [1, 8, 4])  # patches (t, h, w) of three images: 16, 12 and 8 tokens
QWEN_VIDEO_GRIDS = ([2, 4, 8], [3, 4, 4], [2, 4, 4])  # of three videos: 16, 12 and 8 tokens
QWEN_WINDOW = 16  # pixels per side: 4 x 4 patches, so the first image has four windows
SLIDING_WINDOW = 9  # of decoder-only models that slide: shorter than every prompt below
GEMMA3_WINDOW = 16
MLLAMA_TILES = 4

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
TOWER = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=LLAVA_SIDE,
    patch_size=PATCH,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1)
ALTERNATE = ["sliding_attention", "full_attention"] * 2


def _clip() -> T.CLIPVisionConfig:
    # features come from the third of four layers (vision_feature_layer=-2)
    return T.CLIPVisionConfig(**TOWER | dict(num_hidden_layers=4), projection_dim=16)


def _llava() -> T.LlavaConfig:
    text = T.LlamaConfig(**TEXT)
    return T.LlavaConfig(vision_config=_clip(), text_config=text, image_token_id=IMG, image_seq_length=LLAVA_TOKENS)


def _llava_next() -> T.LlavaNextConfig:
    common = dict(image_token_id=IMG, image_grid_pinpoints=ANYRES_PINPOINTS)
    return T.LlavaNextConfig(vision_config=_clip(), text_config=T.LlamaConfig(**TEXT), **common)


def _llava_next_video() -> T.LlavaNextVideoConfig:
    ids = dict(image_token_id=IMG, video_token_id=VID)
    common = dict(ids, image_grid_pinpoints=ANYRES_PINPOINTS, spatial_pool_stride=2)
    return T.LlavaNextVideoConfig(vision_config=_clip(), text_config=T.LlamaConfig(**TEXT), **common)


def _llava_onevision() -> T.LlavaOnevisionConfig:
    return T.LlavaOnevisionConfig(
        vision_config=T.SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=T.Qwen2Config(**TEXT),
        image_token_id=IMG,
        video_token_id=VID,
        image_grid_pinpoints=ANYRES_PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _video_llava() -> T.VideoLlavaConfig:
    return T.VideoLlavaConfig(
        vision_config=_clip(),
        text_config=T.LlamaConfig(**TEXT),
        image_token_index=IMG,
        video_token_index=VID,
        image_seq_length=LLAVA_TOKENS,
        video_seq_length=FRAMES * (LLAVA_TOKENS + 1),
    )


def _qwen(config: type[T.PreTrainedConfig], tower: dict, section: list[int], **text: object) -> T.PreTrainedConfig:
    rope = dict(rope_type="default", mrope_section=section, rope_theta=1e4)
    patches = dict(patch_size=PATCH, spatial_merge_size=QWEN_MERGE, temporal_patch_size=2, num_heads=2)
    return config(
        vision_config=patches | tower,
        text_config=dict(TEXT, rope_parameters=rope, **text),
        image_token_id=IMG,
        video_token_id=VID,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )


def _qwen2_vl() -> T.Qwen2VLConfig:
    tower = dict(depth=3, embed_dim=16, hidden_size=TEXT["hidden_size"], mlp_ratio=2)
    return _qwen(T.Qwen2VLConfig, tower, [1, 1, 2])


def _qwen2_5_vl() -> T.Qwen2_5_VLConfig:
    tower = dict(depth=4, fullatt_block_indexes=[1, 3], window_size=QWEN_WINDOW)
    tower |= dict(hidden_size=16, intermediate_size=32, out_hidden_size=TEXT["hidden_size"])
    return _qwen(T.Qwen2_5_VLConfig, tower, [1, 1, 2])


# The embeddings of 6 x 6 places are interpolated to the grid of the image; two decoder layers add tower features.
QWEN3_TOWER = dict(depth=4, hidden_size=16, intermediate_size=32, out_hidden_size=TEXT["hidden_size"])
QWEN3_TOWER |= dict(num_position_embeddings=36, deepstack_visual_indexes=[0, 1])


def _qwen3_vl() -> T.Qwen3VLConfig:
    return _qwen(T.Qwen3VLConfig, QWEN3_TOWER, [2, 1, 1], head_dim=8)


def _qwen3_vl_moe() -> T.Qwen3VLMoeConfig:
    return _qwen(T.Qwen3VLMoeConfig, QWEN3_TOWER, [2, 1, 1], head_dim=8, **EXPERTS)


def _internvl() -> T.InternVLConfig:
    return T.InternVLConfig(
        vision_config=TOWER | dict(image_size=[LLAVA_SIDE] * 2, patch_size=[PATCH] * 2),
        text_config=T.Qwen2Config(**TEXT),
        image_token_id=IMG,
        image_seq_length=POOLED_TOKENS,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


def _idefics3() -> T.Idefics3Config:
    common = dict(image_token_id=IMG, scale_factor=2, pad_token_id=PAD)
    return T.Idefics3Config(vision_config=dict(TOWER), text_config=T.LlamaConfig(**TEXT), **common)


def _smolvlm() -> T.SmolVLMConfig:
    common = dict(image_token_id=IMG, scale_factor=2, pad_token_id=PAD)
    return T.SmolVLMConfig(vision_config=dict(TOWER), text_config=T.LlamaConfig(**TEXT), **common)


def _gemma3() -> T.Gemma3Config:
    sliding = dict(sliding_window=GEMMA3_WINDOW, layer_types=ALTERNATE)
    return T.Gemma3Config(
        text_config=dict(TEXT, head_dim=8, query_pre_attn_scalar=8, **sliding),
        vision_config=TOWER | dict(vision_use_head=False),
        image_token_id=IMG,
        boi_token_id=94,
        eoi_token_id=95,
        mm_tokens_per_image=POOLED_TOKENS,
        tie_word_embeddings=False,
    )


def _paligemma() -> T.PaliGemmaConfig:
    tower = dict(model_type="siglip_vision_model", projection_dim=TEXT["hidden_size"], vision_use_head=False)
    return T.PaliGemmaConfig(
        text_config=dict(TEXT, model_type="gemma", head_dim=8),
        vision_config=TOWER | tower,
        projection_dim=TEXT["hidden_size"],
        image_token_id=IMG,
        tie_word_embeddings=False,
    )


def _mllama() -> T.MllamaConfig:
    rope = dict(rope_type="default", rope_theta=1e4)
    tower = dict(hidden_size=16, intermediate_size=32, attention_heads=2, image_size=LLAVA_SIDE, patch_size=PATCH)
    tower |= dict(num_hidden_layers=2, num_global_layers=1, intermediate_layers_indices=[0], vision_output_dim=32)
    tiles = dict(max_num_tiles=MLLAMA_TILES, supported_aspect_ratios=[[1, 1], [1, 2], [2, 1], [2, 2]])
    text = dict(TEXT, cross_attention_layers=[1, 3], rope_parameters=rope)
    return T.MllamaConfig(text_config=text, vision_config=tower | tiles, image_token_index=IMG)


_VISION: dict[str, Callable[[], T.PreTrainedConfig]] = {
    "llava": _llava,
    "qwen2_5_vl": _qwen2_5_vl,
    "llava_next": _llava_next,
    "llava_next_video": _llava_next_video,
    "llava_onevision": _llava_onevision,
    "video_llava": _video_llava,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "mllama": _mllama,
}
GEMMA = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=SLIDING_WINDOW)
GRANITE = dict(attention_multiplier=0.3, embedding_multiplier=0.8, residual_multiplier=0.9, logits_scaling=2.0)
_DECODER_ONLY: dict[str, Callable[[], T.PreTrainedConfig]] = {
    "llama": lambda: T.LlamaConfig(**TEXT),
    "mistral": lambda: T.MistralConfig(**TEXT, sliding_window=None),
    "mistral_window": lambda: T.MistralConfig(**TEXT, sliding_window=SLIDING_WINDOW),
    "qwen2": lambda: T.Qwen2Config(**TEXT),
    "qwen3": lambda: T.Qwen3Config(**TEXT, head_dim=8),
    "qwen3_moe": lambda: T.Qwen3MoeConfig(**TEXT, head_dim=8, **EXPERTS),
    "gemma2": lambda: T.Gemma2Config(**TEXT, **GEMMA),
    "gemma3_text": lambda: T.Gemma3TextConfig(**TEXT, **GEMMA, layer_types=ALTERNATE),
    "phi3": lambda: T.Phi3Config(**TEXT),
    "granite": lambda: T.GraniteConfig(**TEXT, **GRANITE),
    "olmo2": lambda: T.Olmo2Config(**TEXT),
}
SLIDE = dict(sliding_window=SLIDING_WINDOW, layer_types=ALTERNATE)
MIXTURE = dict(num_local_experts=4, num_experts_per_tok=2)
SHARED = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
_FURTHER: dict[str, Callable[[], T.PreTrainedConfig]] = {
    "apertus": lambda: T.ApertusConfig(**TEXT),
    "arcee": lambda: T.ArceeConfig(**TEXT),
    "cohere": lambda: T.CohereConfig(**TEXT, logit_scale=1.0),
    "cohere2": lambda: T.Cohere2Config(**TEXT, **SLIDE, logit_scale=1.0),
    "ernie4_5": lambda: T.Ernie4_5Config(**TEXT),
    "exaone4": lambda: T.Exaone4Config(**TEXT, **SLIDE),
    "gemma": lambda: T.GemmaConfig(**TEXT, head_dim=8),
    "glm": lambda: T.GlmConfig(**TEXT, head_dim=8),
    "glm4": lambda: T.Glm4Config(**TEXT, head_dim=8),
    "granitemoe": lambda: T.GraniteMoeConfig(**TEXT, **MIXTURE, **GRANITE),
    "helium": lambda: T.HeliumConfig(**TEXT, head_dim=8),
    "hunyuan_v1_dense": lambda: T.HunYuanDenseV1Config(**TEXT, head_dim=8),
    "ministral": lambda: T.MinistralConfig(**TEXT, **SLIDE, head_dim=8),
    "mixtral": lambda: T.MixtralConfig(**TEXT, **MIXTURE),
    "nemotron": lambda: T.NemotronConfig(**TEXT),
    "olmo": lambda: T.OlmoConfig(**TEXT),
    "olmo3": lambda: T.Olmo3Config(**TEXT, **SLIDE),
    "olmoe": lambda: T.OlmoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2),
    "phi": lambda: T.PhiConfig(**TEXT),
    "qwen2_moe": lambda: T.Qwen2MoeConfig(**TEXT, **SHARED, decoder_sparse_step=1),
    "seed_oss": lambda: T.SeedOssConfig(**TEXT, head_dim=8),
    "smollm3": lambda: T.SmolLM3Config(**TEXT),
    "stablelm": lambda: T.StableLmConfig(**TEXT),
    "starcoder2": lambda: T.Starcoder2Config(**TEXT),
}
VISION = ["llava", "qwen2_5_vl"]
DECODER_ONLY = ["llama", "mistral", "mistral_window", "qwen2", "qwen3"]
ARCHITECTURES = VISION + DECODER_ONLY
ALL_VISION = list(_VISION)
ALL_DECODER_ONLY = list(_DECODER_ONLY)
ALL_ARCHITECTURES = ALL_VISION + ALL_DECODER_ONLY
FURTHER_DECODER_ONLY = list(_FURTHER)  # text models of the same build, for the adapter tests alone
FAMILIES = {
    "llava": ["llava", "video_llava"],
    "anyres": ["llava_next", "llava_next_video", "llava_onevision"],
    "qwen": ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"],
    "internvl": ["internvl"],
    "idefics3": ["idefics3", "smolvlm"],
    "gemma": ["gemma3", "paligemma"],
    "mllama": ["mllama"],
    "decoder_only": ALL_DECODER_ONLY,
}
VIDEO = [*FAMILIES["qwen"], "llava_next_video", "llava_onevision", "video_llava"]

# Arguments of a batch by what their first dimension counts.
TOKEN_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "cross_attention_mask")
IMAGE_KEYS = ("pixel_values", "pixel_values_images", "image_grid_thw", "image_sizes", "pixel_attention_mask")
IMAGE_KEYS += ("aspect_ratio_ids", "aspect_ratio_mask")
VIDEO_KEYS = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
_PER_ROW = [*FAMILIES["idefics3"], *FAMILIES["mllama"]]  # pixels (rows, images, ...): rows with fewer are filled up


def build(name: str, attn: str = "sdpa") -> T.PreTrainedModel:
    """The model called `name` in float32 and eval mode: the same weights at every call.

    "gemma2" is eager whatever `attn` says, as transformers has no other attention for it.
    """
    config = (_VISION | _DECODER_ONLY | _FURTHER)[name]()
    auto = T.AutoModelForImageTextToText if name in _VISION else T.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation="eager" if name == "gemma2" else attn).eval()
        _sharpen(model)
    # No end token: every row generates as many tokens as asked for.
    model.generation_config.update(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None)
    return model


@torch.no_grad()
def _sharpen(model: T.PreTrainedModel) -> None:
    """Scale the matrices so that attention is peaked and every layer matters.

    At the default scale a random model attends evenly and copies its last token: it gives one greedy output
    for every prompt, and a test of equal outputs would pass whatever a method does to the prompt.
    """
    text = model.config.get_text_config()
    scale = math.sqrt(text.hidden_size) if text.model_type.startswith("gemma") else 1.0  # Gemma multiplies by it
    for key, weight in model.named_parameters():
        if "gate" in key and weight.numel() == 1:
            weight.fill_(1.0)  # made as 0: images would have no effect (Mllama)
        if key.endswith(("q_norm.weight", "k_norm.weight")):
            weight.add_(0.5 * torch.rand_like(weight))  # made as constant: all keys would have one norm
        if weight.ndim < 2:
            continue
        if not weight.any():
            weight.normal_()  # made as 0: projector of Gemma 3, places of InternVL
        if "embed_tokens" in key:
            std = 1.0 / scale
        elif "position_embedding" in key or "pos_embed" in key:
            std = 1.0
        else:
            gain = 2.0 if any(part in key for part in ("q_proj", "k_proj", "qkv", "lm_head")) else 1.5
            inputs = weight.shape[-1] if "experts" in key else weight[0].numel()
            std = gain / math.sqrt(len(weight) if "mm_input_projection" in key else inputs)
        weight.mul_(std / weight.std())


def inputs(name: str, model: T.PreTrainedModel, *, side: str = "left") -> Batch:
    """Ragged batch of two, padded on `side`: two images in the first row, one in the second.

    The sizes of the images differ where the architecture allows it. Decoder-only models get text.
    """
    if name not in _VISION:
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

    Nothing stands outside them, neither BOS nor a vision delimiter. Vision models only.
    """
    _need_vision(name)
    return batch(name, model, [[IMG, 5, 7, 8, 9], [BOS, 11, 13, IMG]], side=side, delimiters=False)


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
        `input_ids` and `attention_mask` [rows, length], on Qwen-VL `mm_token_type_ids` as well, on Gemma
        `token_type_ids`, on Mllama `cross_attention_mask`. With images `pixel_values`: [images, 3, 24, 24], as a rule;
        [images, 5, 3, 24, 24] and `image_sizes` for the AnyRes family; [patches of all images, 96] and
        `image_grid_thw` [images, 3] for Qwen-VL; [rows, images, ...] for Idefics3 and Mllama.
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
    result = _pad(rows, side)
    ids = result["input_ids"]
    if name in FAMILIES["qwen"]:
        result["mm_token_type_ids"] = (ids == IMG).int() + 2 * (ids == VID).int()
    if name == "gemma3":
        result["token_type_ids"] = (ids == IMG).long()
    if name == "paligemma":
        result["token_type_ids"] = torch.zeros_like(ids)
    if name == "mllama" and pixels:  # every token sees all images of its row: blind ones attend to all, padding too
        tiles = pixels["aspect_ratio_mask"] * (pixels["aspect_ratio_ids"] > 0)[..., None]
        result["cross_attention_mask"] = tiles[:, None].repeat(1, ids.shape[1], 1, 1)
    moved = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in (pixels | frames).items()}
    return {key: value.to(model.device) for key, value in (result | moved).items()}


def single(batch: Batch, row: int, name: str) -> Batch:
    """Row `row` of `batch` alone: its tokens without padding and its images and videos, if it has any."""
    held = batch["attention_mask"][row].bool()
    alone = {key: batch[key][row : row + 1, held] for key in TOKEN_KEYS if key in batch}
    counted = ((IMG, IMAGE_KEYS, _image_tokens(name, batch)), (VID, VIDEO_KEYS, _video_tokens(name, batch)))
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
            if name in _PER_ROW:
                alone[key] = batch[key][row : row + 1, : int(mine.sum())]
            elif name in FAMILIES["qwen"] and key.startswith("pixel_values"):
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
    return {key: batch[key] for key in keys if key in batch and key != "second_per_grid_ts"}


def _images(name: str, per_row: Sequence[int]) -> Batch:
    """So many images of noise; the k-th has the k-th of the sizes that the architecture is given, round and round."""
    _need_vision(name)
    count, side = sum(per_row), LLAVA_SIDE
    g = torch.Generator().manual_seed(1)
    if name in FAMILIES["qwen"]:
        return _patches(count, QWEN_GRIDS, g, "pixel_values", "image_grid_thw")
    if name in FAMILIES["anyres"]:
        sizes = torch.tensor([list(ANYRES_TOKENS)[k % len(ANYRES_TOKENS)] for k in range(count)])
        return dict(pixel_values=torch.randn(count, ANYRES_TILES, 3, side, side, generator=g), image_sizes=sizes)
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
    if name not in FAMILIES["qwen"]:
        return dict(pixel_values_videos=torch.randn(count, FRAMES, 3, LLAVA_SIDE, LLAVA_SIDE, generator=g))
    pixels = _patches(count, QWEN_VIDEO_GRIDS, g, "pixel_values_videos", "video_grid_thw")
    return pixels | (dict(second_per_grid_ts=torch.ones(count)) if name == "qwen2_5_vl" else {})


def _patches(count: int, grids: Sequence[list[int]], g: torch.Generator, pixels: str, thw: str) -> Batch:
    grid = torch.tensor([grids[k % len(grids)] for k in range(count)])
    values = 3 * 2 * PATCH * PATCH  # channels x frames per patch x pixels
    return {pixels: torch.randn(int(grid.prod(-1).sum()), values, generator=g), thw: grid}


def _image_tokens(name: str, batch: Batch) -> list[int]:
    """Placeholders per image."""
    if "image_grid_thw" in batch:
        return (batch["image_grid_thw"].prod(-1) // QWEN_MERGE**2).tolist()
    if "image_sizes" in batch:
        return [ANYRES_TOKENS[tuple(size)] for size in batch["image_sizes"].tolist()]
    pixels = batch.get("pixel_values_images" if name == "video_llava" else "pixel_values")
    if pixels is None:
        return []
    if name in _PER_ROW:
        return [1 if name == "mllama" else POOLED_TOKENS] * int(pixels.flatten(2).any(-1).sum())
    return [POOLED_TOKENS if name in ("internvl", "gemma3") else LLAVA_TOKENS] * len(pixels)


def _video_tokens(name: str, batch: Batch) -> list[int]:
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
    before, after = ([VISION_START], [VISION_END]) if name in FAMILIES["qwen"] and delimiters else ([], [])
    return [[*before, *[IMG] * n, *after] for n in _image_tokens(name, batch)]


def _video_spans(name: str, batch: Batch, delimiters: bool) -> list[list[int]]:
    """What stands for each video in the prompt: Qwen3-VL writes a time stamp before every frame."""
    before, after = ([VISION_START], [VISION_END]) if name in FAMILIES["qwen"] and delimiters else ([], [])
    if not name.startswith("qwen3"):
        return [[*before, *[VID] * n, *after] for n in _video_tokens(name, batch)]
    out = []
    for n, frames in zip(_video_tokens(name, batch), batch.get("video_grid_thw", torch.zeros(0, 3))[:, 0].tolist()):
        stamps = range(20, 20 + int(frames))
        out.append([token for t in stamps for token in (t, *before, *[VID] * (n // len(stamps)), *after)])
    return out


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
    if name not in _VISION:
        raise ValueError(f"{name!r} takes no images; {ALL_VISION} do")
