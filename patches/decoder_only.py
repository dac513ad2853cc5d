"""Decoder-only language models with rotary positions: LLaMA, Mistral, Qwen2, Qwen3."""

from hf_compress.patches.base import Architecture


class DecoderOnly(Architecture):
    """Text models: no visual tokens, so only the cache stage can act."""

    model_types = ("llama", "mistral", "qwen2", "qwen3")
    stages = ("cache",)
    gives = frozenset({"columns"})
    modalities = ()
