"""Configs of tiny vision-language models: the shapes of real checkpoints in small."""

from collections.abc import Callable

import transformers as T

from tests.tiny.text import ALTERNATE, EXPERTS, IMG, PAD, SLIDING_WINDOW, TEXT, VID, VISION_END, VISION_START, VOCAB

PATCH = 4  # pixels per side, in all towers
LLAVA_SIDE = 24  # pixels per side
LLAVA_TOKENS = (LLAVA_SIDE // PATCH) ** 2  # 36 per image; the tower also carries a [CLS]
POOLED_TOKENS = LLAVA_TOKENS // 4  # 2 x 2 patches become one token: InternVL, Idefics3, Gemma 3, Cohere
ANYRES_PINPOINTS = [[24, 48], [48, 24], [48, 48]]  # pixels (h, w) to which images are resized before they are tiled
ANYRES_TOKENS = {(40, 30): 168, (20, 48): 114, (48, 48): 192}  # by original size: base view, tiles, newlines
ANYRES_TILES = 5  # pixel values are padded to the base view and four tiles
FRAMES = 3  # per video, where the architecture takes frames
QWEN_MERGE = 2  # 2 x 2 patches become one token
QWEN_GRIDS = ([1, 8, 8], [1, 4, 12], [1, 8, 4])  # patches (t, h, w) of three images: 16, 12 and 8 tokens
QWEN_VIDEO_GRIDS = ([2, 4, 8], [3, 4, 4], [2, 4, 4])  # of three videos: 16, 12 and 8 tokens
QWEN_WINDOW = 16  # pixels per side: 4 x 4 patches, so the first image has four windows
GEMMA3_WINDOW = 16  # of language models behind images that slide in some layers
PIXTRAL_SIZES = [[24, 24], [16, 32], [8, 24]]  # pixels (h, w) of three images: 9, 8 and 3 tokens of 2 x 2 patches
MLLAMA_TILES = 4

TOWER = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=LLAVA_SIDE,
    patch_size=PATCH,
)


def _clip() -> T.CLIPVisionConfig:
    # features come from the third of four layers (vision_feature_layer=-2)
    return T.CLIPVisionConfig(**TOWER | dict(num_hidden_layers=4), projection_dim=16)


def _llava() -> T.LlavaConfig:
    text = T.LlamaConfig(**TEXT)
    return T.LlavaConfig(vision_config=_clip(), text_config=text, image_token_id=IMG, image_seq_length=LLAVA_TOKENS)


def _llava_window() -> T.LlavaConfig:
    config = _llava()
    config.text_config = T.MistralConfig(**TEXT, sliding_window=SLIDING_WINDOW)
    return config


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


QWEN2_5_TOWER = dict(depth=4, fullatt_block_indexes=[1, 3], window_size=QWEN_WINDOW)
QWEN2_5_TOWER |= dict(hidden_size=16, intermediate_size=32, out_hidden_size=TEXT["hidden_size"])


def _qwen2_5_vl() -> T.Qwen2_5_VLConfig:
    return _qwen(T.Qwen2_5_VLConfig, QWEN2_5_TOWER, [1, 1, 2])


# The embeddings of 6 x 6 places are interpolated to the grid of the image; two decoder layers add tower features.
QWEN3_TOWER = dict(depth=4, hidden_size=16, intermediate_size=32, out_hidden_size=TEXT["hidden_size"])
QWEN3_TOWER |= dict(num_position_embeddings=36, deepstack_visual_indexes=[0, 1])


def _qwen3_vl() -> T.Qwen3VLConfig:
    return _qwen(T.Qwen3VLConfig, QWEN3_TOWER, [2, 1, 1], head_dim=8)


def _qwen3_vl_moe() -> T.Qwen3VLMoeConfig:
    return _qwen(T.Qwen3VLMoeConfig, QWEN3_TOWER, [2, 1, 1], head_dim=8, **EXPERTS)


HYBRID = ["linear_attention", "full_attention"] * 2
STATE = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)


def _qwen3_5(config: type[T.PreTrainedConfig], **text: object) -> T.PreTrainedConfig:
    tower = {key: value for key, value in QWEN3_TOWER.items() if key != "deepstack_visual_indexes"}
    text |= dict(head_dim=8, partial_rotary_factor=1.0, layer_types=HYBRID)
    return _qwen(config, tower, [2, 1, 1], **STATE, **text)


LFM2_SHAPES = [[4, 6], [6, 6], [2, 8]]  # patches (h, w) of three images: 6, 9 and 4 tokens


def _lfm2_vl() -> T.Lfm2VlConfig:
    tower = dict(num_patches=36, patch_size=PATCH, vision_use_head=False, model_type="siglip2_vision_model")
    text = dict(TEXT, model_type="lfm2", layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False)
    common = dict(image_token_id=IMG, projector_hidden_size=32, tie_word_embeddings=False)
    return T.Lfm2VlConfig(vision_config=TOWER | tower, text_config=text, **common)


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


GEMMA4_SHAPES = [[6, 4], [6, 6], [8, 2]]  # patches (w, h) of three images: 6, 9 and 4 tokens of 2 x 2 patches
GEMMA4_TOWER = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, head_dim=8)
GEMMA4_TOWER |= dict(num_key_value_heads=2, patch_size=PATCH, pooling_kernel_size=2, position_embedding_size=16)


def _gemma4() -> T.Gemma4Config:
    text = dict(TEXT, head_dim=8, global_head_dim=8, sliding_window=GEMMA3_WINDOW, layer_types=ALTERNATE)
    text |= dict(vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=16, num_kv_shared_layers=2)
    ids = dict(image_token_id=IMG, video_token_id=VID, audio_token_id=94, boi_token_id=95, eoi_token_id=96)
    return T.Gemma4Config(text_config=text, vision_config=GEMMA4_TOWER, tie_word_embeddings=False, **ids)


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


def _siglip() -> T.SiglipVisionConfig:
    return T.SiglipVisionConfig(**TOWER, vision_use_head=False)


def _cohere() -> T.Cohere2Config:
    return T.Cohere2Config(**TEXT, layer_types=ALTERNATE, sliding_window=GEMMA3_WINDOW, head_dim=8)


def _aya_vision() -> T.AyaVisionConfig:
    common = dict(image_token_index=IMG, tie_word_embeddings=False)
    return T.AyaVisionConfig(vision_config=_siglip(), text_config=_cohere(), **common)


def _cohere2_vision() -> T.Cohere2VisionConfig:
    common = dict(image_token_id=IMG, tie_word_embeddings=False)
    return T.Cohere2VisionConfig(vision_config=_siglip(), text_config=_cohere(), **common)


def _pixtral() -> T.PixtralVisionConfig:
    return T.PixtralVisionConfig(**TOWER | dict(image_size=32, head_dim=8))


def _mistral3() -> T.Mistral3Config:
    common = dict(image_token_index=IMG, tie_word_embeddings=False)
    text = T.MistralConfig(**TEXT, sliding_window=None)
    return T.Mistral3Config(vision_config=_pixtral(), text_config=text, **common)


def _lighton_ocr() -> T.LightOnOcrConfig:
    common = dict(image_token_id=IMG, tie_word_embeddings=False)
    text = T.Qwen3Config(**TEXT, head_dim=8).to_dict()
    return T.LightOnOcrConfig(vision_config=_pixtral().to_dict(), text_config=text, **common)


GLM_TOWER = dict(depth=3, hidden_size=16, intermediate_size=32, image_size=LLAVA_SIDE, out_hidden_size=32)
GLM_MOE = dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16)
GLM_MOE |= dict(first_k_dense_replace=1)


def _glm(config: type[T.PreTrainedConfig], **text: object) -> T.PreTrainedConfig:
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4, partial_rotary_factor=1.0)
    patches = dict(patch_size=PATCH, spatial_merge_size=QWEN_MERGE, temporal_patch_size=2, num_heads=2)
    text = dict(TEXT, rope_parameters=rope, **text)
    return config(vision_config=patches | GLM_TOWER, text_config=text, image_token_id=IMG, video_token_id=VID)


def _omni() -> T.Qwen2_5OmniThinkerConfig:
    audio = dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, output_dim=32)
    patches = dict(patch_size=PATCH, spatial_merge_size=QWEN_MERGE, temporal_patch_size=2, num_heads=2)
    return T.Qwen2_5OmniThinkerConfig(
        audio_config=audio,
        vision_config=patches | QWEN2_5_TOWER,
        text_config=dict(TEXT, rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)),
        image_token_index=IMG,
        video_token_index=VID,
        audio_token_index=94,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        audio_start_token_id=95,
        audio_end_token_id=96,
    )


MODELS: dict[str, Callable[[], T.PreTrainedConfig]] = {
    "llava": _llava,
    "qwen2_5_vl": _qwen2_5_vl,
    "llava_next": _llava_next,
    "llava_next_video": _llava_next_video,
    "llava_onevision": _llava_onevision,
    "video_llava": _video_llava,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen3_5": lambda: _qwen3_5(T.Qwen3_5Config),
    "qwen3_5_moe": lambda: _qwen3_5(T.Qwen3_5MoeConfig, **EXPERTS, shared_expert_intermediate_size=16),
    "lfm2_vl": _lfm2_vl,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "paligemma": _paligemma,
    "llava_window": _llava_window,
    "aya_vision": _aya_vision,
    "cohere2_vision": _cohere2_vision,
    "mistral3": _mistral3,
    "lighton_ocr": _lighton_ocr,
    "glm4v": lambda: _glm(T.Glm4vConfig),
    "glm4v_moe": lambda: _glm(T.Glm4vMoeConfig, **GLM_MOE),
    "glm46v": lambda: _glm(T.Glm46VConfig),
    "glm_ocr": lambda: _glm(T.GlmOcrConfig),
    "qwen2_5_omni_thinker": _omni,
    "mllama": _mllama,
}
