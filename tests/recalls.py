"""What is asked of every model that recalls facts, and of its data."""

from pathlib import Path

from transformers import LlamaForCausalLM

from hf_compress import demo
from hf_compress.demo.recall_data import prompt


def check_shipped(name, model, tokenizer):
    """A small LLaMA with grouped queries, ready to be asked in batches."""
    assert type(model) is LlamaForCausalLM and not model.training
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    files = list((Path(demo.__file__).parent / demo.MODELS[name]).iterdir())
    assert sum(file.stat().st_size for file in files) < 2_000_000
    assert tokenizer.padding_side == "left"


def check_length(tokenizer, rows, length):
    """Prompts have so many tokens, all of them known."""
    for row in rows:
        ids = tokenizer(prompt(row["context"], row["question"])).input_ids
        assert len(ids) == length
        assert tokenizer.unk_token_id not in ids + tokenizer(row["answer"]).input_ids


def check_repeatable(load, data, length):
    """The same arguments make the same rows, fewer contexts the first of them, another seed others."""
    fewer = load("test", contexts=2, length=length)
    assert fewer.to_list() == data.select(range(len(fewer))).to_list()
    assert load("test", contexts=2, length=length, seed=1)["context"] != fewer["context"]
