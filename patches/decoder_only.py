"""Decoder-only language models: rotary (or no) positions, keys and values per token, full and sliding layers."""

from hf_compress.patches.base import Architecture


class DecoderOnly(Architecture):
    """Text models: no visual tokens, so only the cache stage can act, on the layers that see everything."""

    model_types = (
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "granite",
        "granitemoe",
        "helium",
        "hunyuan_v1_dense",
        "llama",
        "ministral",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
    )
    stages = ("prompt", "decoder", "cache")
    gives = frozenset({"columns"})
    modalities = ()
