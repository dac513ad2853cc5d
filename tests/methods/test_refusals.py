"""Models without keys and values per head are refused, and the refusal says why."""

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.invariants.reference import assert_restored, snapshot

LATENT = dict(
    hidden_size=32,
    intermediate_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=99,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    first_k_dense_replace=1,
)


def deepseek(version):
    config, model = {
        2: (DeepseekV2Config, DeepseekV2ForCausalLM),
        3: (DeepseekV3Config, DeepseekV3ForCausalLM),
    }[version]
    return model(config(**LATENT))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("method", ["snapkv", "kivi", "streaming"])
def test_latent_attention(version, method):
    """One vector per token stands for all heads: nothing to rank per head, and the model works on as it was."""
    model = deepseek(version).eval()
    before, ids = snapshot(model), torch.arange(9)[None]
    logits = model(input_ids=ids).logits
    with pytest.raises(ValueError, match=rf"DeepseekV{version}ForCausalLM.*'deepseek_v{version}'.*latent \(MLA\)"):
        model.compress(method, ratio=0.75)
    assert_restored(model, before)
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_encoder_decoder():
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=11)
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration.*'t5'.*encoder-decoder"):
        T5ForConditionalGeneration(config).compress("snapkv", ratio=0.5)
