"""Configs of tiny decoder-only models, and what all models share: token ids, widths, depths."""

from collections.abc import Callable

import transformers as T

PAD, BOS, EOS = 0, 1, 2
IMG, VID, VISION_START, VISION_END = 90, 91, 92, 93
VOCAB = 100
SLIDING_WINDOW = 9  # of models that slide: shorter than every prompt of batches.py

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
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1)
ALTERNATE = ["sliding_attention", "full_attention"] * 2
GEMMA = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=SLIDING_WINDOW)
GRANITE = dict(attention_multiplier=0.3, embedding_multiplier=0.8, residual_multiplier=0.9, logits_scaling=2.0)
SLIDE = dict(sliding_window=SLIDING_WINDOW, layer_types=ALTERNATE)
MIXTURE = dict(num_local_experts=4, num_experts_per_tok=2)
SHARED = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)

MAIN: dict[str, Callable[[], T.PreTrainedConfig]] = {
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
    # sliding in the upper half of its layers: those below see everything
    "qwen2_mixed": lambda: T.Qwen2Config(
        **TEXT, use_sliding_window=True, sliding_window=SLIDING_WINDOW, max_window_layers=2
    ),
}
FURTHER: dict[str, Callable[[], T.PreTrainedConfig]] = {
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
