"""Writes a trained model as a Hugging Face folder: fp16 weights, configuration, tokenizer, processor."""

import torch
from model import build_model
from vocabulary import ASSISTANT, BOS, EOS, IMAGE, PAD, USER, build_processor, encode

from hf_compress.demo.dataset import grey_image, prompt


def export(weights, folder):
    """Writes the checkpoint.

    Args:
        weights: fp32 tensors by parameter name of `build_model()`; all of them.
        folder: directory, made if absent.
    """
    model = build_model()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = set(missing) & dict(model.named_parameters()).keys()  # tied weights and buffers need no entry
    if missing or unexpected:
        raise ValueError(f"weights: missing {sorted(missing)}, unexpected {unexpected}")
    for name, value in (("bos", BOS), ("eos", EOS), ("pad", PAD)):
        setattr(model.generation_config, f"{name}_token_id", value)
    model.generation_config.max_new_tokens = 8
    processor = build_processor()
    _check_prompt(processor)
    model.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)


def _check_prompt(processor):
    """The processor must give the ids that training used."""
    question = "what digit is at the top left ?"
    ids = processor(images=grey_image(), text=prompt(question))["input_ids"][0]
    expected = [BOS, USER, *[IMAGE] * 196, *encode(question), ASSISTANT]
    if list(ids) != expected:
        raise AssertionError(f"the processor gives {ids}, training used {expected}")
