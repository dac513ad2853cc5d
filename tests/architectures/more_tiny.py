"""More tiny models, of families that share the adapters of `tests/tiny.py`'s: build, inputs and single as there."""

from types import SimpleNamespace

import torch
import transformers as T

from tests import tiny
from tests.tiny import BOS, IMG, PAD, PATCH, TEXT, VID, VISION_END, VISION_START

SIDE = tiny.LLAVA_SIDE
SIGLIP = dict(tiny.TOWER, image_size=SIDE, patch_size=PATCH, num_hidden_layers=3)
MROPE = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)
DELIMITERS = dict(image_token_id=IMG, video_token_id=VID)
PIXTRAL_SIZES = [[24, 24], [16, 32], [8, 24]]  # pixels (h, w): 9, 8 and 3 tokens of 2 x 2 patches


def _siglip():
    return T.SiglipVisionConfig(**SIGLIP, vision_use_head=False)


def _cohere():
    text = dict(TEXT, layer_types=tiny.ALTERNATE, sliding_window=64, head_dim=8)
    return T.Cohere2Config(**text)


def _pixtral():
    return T.PixtralVisionConfig(**dict(tiny.TOWER, image_size=32, patch_size=PATCH, num_hidden_layers=3, head_dim=8))


def _glm(config, text, **more):
    tower = dict(
        depth=3,
        hidden_size=16,
        num_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        out_hidden_size=TEXT["hidden_size"],
        intermediate_size=32,
        spatial_merge_size=2,
        temporal_patch_size=2,
    )
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4, partial_rotary_factor=1.0)
    return config(vision_config=tower, text_config=dict(TEXT, rope_parameters=rope, **text), **DELIMITERS, **more)


def _omni():
    audio = dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, output_dim=32)
    tower = dict(
        depth=4,
        fullatt_block_indexes=[1, 3],
        window_size=tiny.QWEN_WINDOW,
        patch_size=PATCH,
        spatial_merge_size=2,
        temporal_patch_size=2,
        hidden_size=16,
        intermediate_size=32,
        num_heads=2,
        out_hidden_size=TEXT["hidden_size"],
    )
    return T.Qwen2_5OmniThinkerConfig(
        audio_config=audio,
        vision_config=tower,
        text_config=dict(TEXT, rope_parameters=MROPE),
        image_token_index=IMG,
        video_token_index=VID,
        audio_token_index=94,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        audio_start_token_id=95,
        audio_end_token_id=96,
    )


def _lighton():
    return T.LightOnOcrConfig(
        vision_config=_pixtral().to_dict(), text_config=T.Qwen3Config(**TEXT, head_dim=8).to_dict(), image_token_id=IMG
    )


MOE = dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1, n_shared_experts=1
)
CONFIGS = {
    "aya_vision": (
        "AyaVision",
        lambda: T.AyaVisionConfig(vision_config=_siglip(), text_config=_cohere(), image_token_index=IMG),
    ),
    "cohere2_vision": (
        "Cohere2Vision",
        lambda: T.Cohere2VisionConfig(vision_config=_siglip(), text_config=_cohere(), image_token_id=IMG),
    ),
    "mistral3": (
        "Mistral3",
        lambda: T.Mistral3Config(
            vision_config=_pixtral(), text_config=T.MistralConfig(**TEXT, sliding_window=None), image_token_index=IMG
        ),
    ),
    "lighton_ocr": ("LightOnOcr", _lighton),
    "glm4v": ("Glm4v", lambda: _glm(T.Glm4vConfig, {})),
    "glm4v_moe": ("Glm4vMoe", lambda: _glm(T.Glm4vMoeConfig, MOE)),
    "glm46v": ("Glm46V", lambda: _glm(T.Glm46VConfig, {})),
    "glm_ocr": ("GlmOcr", lambda: _glm(T.GlmOcrConfig, {})),
    "qwen2_5_omni_thinker": ("Qwen2_5OmniThinker", _omni),
}
NAMES = list(CONFIGS)
GRID = ["glm4v", "glm4v_moe", "glm46v", "glm_ocr", "qwen2_5_omni_thinker"]  # images of QWEN_GRIDS, as rows of patches
SIZED = ["mistral3", "lighton_ocr"]


def build(name):
    """As `tests.tiny.build`."""
    prefix, config = CONFIGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cls = getattr(T, f"{prefix}ForConditionalGeneration")
        model = cls._from_config(config(), attn_implementation="sdpa").eval()
        tiny._sharpen(model)
    model.generation_config.update(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None)
    return model


def inputs(name):
    """Ragged batch of two, padded at the left: two images in the first row, one in the second."""
    g = torch.Generator().manual_seed(1)
    if name in GRID:
        batch = tiny.inputs("qwen2_5_vl", SimpleNamespace(dtype=torch.float32, device="cpu"))
        return {k: v for k, v in batch.items() if k != "mm_token_type_ids" or "omni" not in name}
    tokens = [h * w // 64 for h, w in PIXTRAL_SIZES] if name in SIZED else [tiny.POOLED_TOKENS] * 3
    rows = [[BOS, 5, *[IMG] * tokens[0], 7, *[IMG] * tokens[1], 8, 9], [BOS, 11, *[IMG] * tokens[2], 13]]
    batch = tiny._pad(rows, "left")
    if name in SIZED:
        sizes = torch.tensor(PIXTRAL_SIZES)
        pixels = torch.zeros(3, 3, 32, 32)
        for image, (h, w) in zip(pixels, PIXTRAL_SIZES):
            image[:, :h, :w] = torch.randn(3, h, w, generator=g)
        return dict(batch, pixel_values=pixels, image_sizes=sizes)
    return dict(batch, pixel_values=torch.randn(3, 3, SIDE, SIDE, generator=g))


def single(batch, row, name):
    """One row without its padding, with its images."""
    if name in GRID:
        return tiny.single(batch, row, "qwen2_5_vl")
    held, mine = batch["attention_mask"][row].bool(), slice(0, 2) if row == 0 else slice(2, 3)
    alone = {key: batch[key][row : row + 1, held] for key in ("input_ids", "attention_mask")}
    return alone | {key: batch[key][mine] for key in ("pixel_values", "image_sizes") if key in batch}
