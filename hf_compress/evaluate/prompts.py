"""Prompts in batches, and what a model says to them by plain `model.generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_compress.patches.versions import cache_name, cache_of

PROTOCOLS = ("one-turn", "two-turn")


@dataclass
class Batch:
    """Encoded rows of a task, padded on the left.

    Attributes:
        rows: their numbers in the task.
        inputs: what the model reads first.
        later: (B, n) token ids of the question where it is asked in a second turn, else None.
    """

    rows: list[int]
    inputs: Any
    later: Any = None


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def render(processor: Any, question: str, text: str | None = None) -> str:
    """The prompt as text: by the chat template where there is one, else the text and the question.

    Args:
        text: what is asked about; None: an image.
    """
    if text is not None and not getattr(processor, "chat_template", None):
        return f"{text} {question}"
    if text is not None:
        content: Any = f"{text}\n{question}"
        if processor is not tokenizer_of(processor):
            content = [{"type": "text", "text": content}]
    else:
        content = [{"type": "image"}, {"type": "text", "text": question}]
    turn = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))


def encode(processor: Any, images: Sequence[Any], questions: Sequence[str]) -> Any:
    """One image and one question per row as a padded batch, by the chat template of the processor."""
    return _tokens(processor, [render(processor, question) for question in questions], images)


def _tokens(processor: Any, texts: list[str], images: Sequence[Any] | None = None) -> Any:
    tokenizer = tokenizer_of(processor)
    start = tokenizer.bos_token
    options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
    if start and texts[0].startswith(start):  # the template has written it
        options["add_special_tokens"] = False
    return processor(text=texts, **options) if images is None else processor(images=list(images), text=texts, **options)


def encode_rows(
    processor: Any,
    rows: list[int],
    questions: Sequence[str],
    shown: Sequence[Any],
    protocol: str = "one-turn",
) -> Batch:
    """The rows as one batch.

    Args:
        rows: their numbers.
        questions: one per row.
        shown: images or texts, one per row.
        protocol: "one-turn" asks inside the prompt. "two-turn" splits the same prompt before the question: the model
            reads what is asked about, its cache is compressed, and the question follows in a second turn.
    """
    about_text = isinstance(shown[0], str)
    texts = [render(processor, q, s if about_text else None) for q, s in zip(questions, shown)]
    images = None if about_text else shown
    if protocol == "one-turn":
        return Batch(rows, _tokens(processor, texts, images))
    at = [text.rindex(question) for text, question in zip(texts, questions)]
    first = [text[:i].rstrip() for text, i in zip(texts, at)]
    rest = [text[len(start) :] for text, start in zip(texts, first)]
    later = tokenizer_of(processor)(rest, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return Batch(rows, _tokens(processor, first, images), later)


@torch.inference_mode()
def reply(model: Any, processor: Any, batch: Batch, max_new_tokens: int | None = None) -> list[dict[str, Any]]:
    """Greedy answers to a batch, the model compressed or not.

    Returns:
        per row: "row"; "answer", stripped; "length", its tokens; of the prompt "visual", visual tokens in a decoder
        layer, the mean over layers; "entries" of the KV cache per head, likewise; "bytes" of the cache and
        "full_bytes" of an uncompressed one, a row's share of the batch.
    """
    options: dict[str, Any] = {"do_sample": False}
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    inputs = batch.inputs.to(model.device)
    visual = _visual_tokens(model, inputs)
    options["return_dict_in_generate"] = True
    first = options if batch.later is None else {**options, "max_new_tokens": 1}
    out = model.generate(**inputs, **first)
    cache = cache_of(out)
    counts = _bare_counts(inputs, cache, visual) if model.compression is None else _counts(model, visual)
    if batch.later is not None:
        inputs = _second_turn(inputs, batch.later.to(model.device), cache_name(model), cache)
        out = model.generate(**inputs, **options)
    tokens = out.sequences
    new = tokens[:, inputs["input_ids"].shape[1] :]
    special = torch.tensor(tokenizer_of(processor).all_special_ids, device=new.device)
    lengths = torch.isin(new, special, invert=True).sum(1).tolist()
    said = processor.batch_decode(new, skip_special_tokens=True)
    return [
        {"row": row, "answer": text.strip(), "length": length, **count}
        for row, text, length, count in zip(batch.rows, said, lengths, counts)
    ]


def _second_turn(inputs: Any, question: Any, name: str, cache: Any) -> dict[str, Any]:
    """The first turn, whose tokens the cache stands for (an argument called `name`), and the question after it."""
    out = {"input_ids": torch.cat([inputs["input_ids"], question], 1), name: cache}
    out["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(question)], 1)
    if (types := inputs.get("mm_token_type_ids")) is not None:
        out["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(question)], 1)
    return out


def _visual_tokens(model: Any, inputs: Any) -> list[int]:
    """Per row: placeholders in the prompt."""
    from hf_compress.patches.registry import adapter_for

    adapter, ids = adapter_for(model), inputs["input_ids"]
    placeholders = list(adapter.placeholders(model.config).values()) if "visual" in adapter.gives else []
    return torch.isin(ids, torch.tensor(placeholders, dtype=ids.dtype, device=ids.device)).sum(1).tolist()


def _counts(model: Any, visual: list[int]) -> list[dict[str, float]]:
    """Of the prompt that a compressed model has just read."""
    last = model.compression.last
    if last.cache_tokens is None:
        raise ValueError("the model keeps no KV cache (use_cache=False); generate needs one here")
    layers, rows = len(last.layer_tokens), len(visual)
    size = {"bytes": sum(last.cache_bytes) / rows, "full_bytes": last.full_cache_bytes / rows}
    out = []
    for i in range(rows):
        text = last.prompt_tokens[i] - visual[i]
        held = sum(layer[i] for layer in last.layer_tokens) / layers - text
        entries = sum(layer[i] for layer in last.cache_tokens) / layers
        out.append({"visual": round(held, 3), "entries": round(entries, 3), **size})
    return out


def _bare_counts(inputs: Any, cache: Any, visual: list[int]) -> list[dict[str, float]]:
    """The same of an uncompressed model: all of the prompt, not what was generated after it."""
    length = inputs["input_ids"].shape[1]
    size = 0.0
    for held in (t for layer in cache.layers for t in (layer.keys, layer.values)):
        size += held.numel() * held.element_size() * min(1, length / held.shape[-2]) / len(visual)
    entries = inputs["attention_mask"].sum(1).tolist()
    return [{"visual": v, "entries": n, "bytes": size, "full_bytes": size} for v, n in zip(visual, entries)]
