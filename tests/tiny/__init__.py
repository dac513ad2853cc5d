"""Tiny, randomly initialised models and ragged batches for them: no hub, no tokenizer, no processor.

    model = build("llava")
    batch = inputs("llava", model)                      # two rows, left padded, three images
    model.generate(**batch, **GREEDY)
    model.generate(**single(batch, 0, "llava"), **GREEDY)  # row 0 alone: the same new tokens

The shapes are those of real checkpoints in small: grouped-query attention, a CLIP tower with [CLS], a
windowed Qwen2.5 tower with full-attention blocks, M-RoPE, a sliding window shorter than the prompts.
`ARCHITECTURES` are a few of each kind; `ALL_ARCHITECTURES` are all, `FAMILIES` says which belong together.
"""
# ruff: noqa: F401  (what the tests import from here)

from tests.tiny.batches import (
    GREEDY,
    PATCHED,
    PER_ROW,
    TOKEN_KEYS,
    Batch,
    batch,
    both,
    edges,
    encoder_inputs,
    image_tokens,
    inputs,
    mixed,
    pad,
    single,
    text_only,
    token_types,
    video,
    video_tokens,
)
from tests.tiny.models import (
    ALL_ARCHITECTURES,
    ALL_DECODER_ONLY,
    ALL_VISION,
    ARCHITECTURES,
    DECODER_ONLY,
    FAMILIES,
    FURTHER_DECODER_ONLY,
    HYBRIDS,
    VIDEO,
    VISION,
    build,
)
from tests.tiny.text import (
    BOS,
    EOS,
    IMG,
    PAD,
    SLIDING_WINDOW,
    TEXT,
    VID,
    VISION_END,
    VISION_START,
)
from tests.tiny.vision import (
    FRAMES,
    GEMMA3_WINDOW,
    LLAVA_SIDE,
    LLAVA_TOKENS,
    PATCH,
    POOLED_TOKENS,
    QWEN_MERGE,
    TOWER,
)
