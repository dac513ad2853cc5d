"""The model, an ordinary `LlamaForCausalLM`; its tokenizer; and the forward pass that training uses."""

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
PAD, BOS, EOS, UNK = range(len(SPECIAL))


def vocabulary(words):
    """word -> number, the special ones first."""
    return {word: number for number, word in enumerate((*SPECIAL, *words))}


def build_model(words):
    """A freshly initialised model of 0.6 to 0.7 M parameters for so many words."""
    config = LlamaConfig(
        vocab_size=len(vocabulary(words)),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight)  # the usual 0.02 is soon drowned: see README.md
    return model


def build_tokenizer(words):
    """A tokenizer of whole words, of these; batches are padded on the left."""
    whole = Tokenizer(models.WordLevel(vocabulary(words), unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in SPECIAL])
    whole.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=whole,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=1024,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def use_training_attention(model):
    """Switches the model to `causal_attention`."""
    AttentionInterface.register("causal", causal_attention)
    model.config._attn_implementation = "causal"


def causal_attention(module, query, key, value, attention_mask=None, scaling=1.0, **kwargs):
    """Causal attention written out; trains faster than SDPA in bf16 on a CPU.

    Args:
        query: (batch, heads, tokens, dim).
        key, value: (batch, key heads, tokens, dim).

    Returns:
        (batch, tokens, heads, dim) and None.
    """
    batch, heads, tokens, dim = query.shape
    groups = key.shape[1]
    query = (query * scaling).reshape(batch, groups, -1, dim)  # the query heads of a key head one after the other
    scores = (query @ key.transpose(-1, -2)).view(batch, groups, -1, tokens, tokens)
    future = torch.full((tokens, tokens), -1e4, dtype=query.dtype).triu(1)
    weights = torch.softmax(scores + future, -1).view(batch, groups, -1, tokens)
    return (weights @ value).view(batch, heads, tokens, dim).transpose(1, 2), None


def states(model, tokens, positions):
    """Last hidden states (batch, length, width) of int64 (batch, length) tokens at these positions."""
    llama = model.model
    hidden = llama.embed_tokens(tokens)
    rotary = llama.rotary_emb(hidden, positions)
    for layer in llama.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    return llama.norm(hidden)
