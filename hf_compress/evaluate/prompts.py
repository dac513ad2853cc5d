"""Prompts in batches, and what a model says to them by plain `model.generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_compress.patches.versions import cache_name, cache_of
from hf_compress.pictures import Frames

PROTOCOLS = ("one-turn", "two-turn")
ANSWER = "-+- answer -+-"  # stands for one where a template is asked what it writes behind it


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


def render(processor: Any, question: str, about: Any) -> str:
    """The prompt as text: by the chat template of the model, applied once.

    Where neither the processor nor its tokenizer has one (base models): the marks of the images, or the text, and the
    question.

    Args:
        about: a text, an image, a list of images, or the `Frames` of a video.

    Raises:
        ValueError: the template leaves images or the video out, or there is neither a template nor a mark.
    """
    tokenizer = tokenizer_of(processor)
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    kind = kind_of(about)
    shown, mark = pictures_of(about), str(getattr(processor, f"{kind}_token", None) or "")
    if template is None:
        if shown and not mark:
            raise ValueError(f"processor={type(processor).__name__} has no chat template; set processor.chat_template")
        return mark * len(shown) + question if shown else f"{about} {question}"
    content: Any = question if shown else f"{about}\n{question}"
    if processor is not tokenizer:
        content = [*({"type": kind} for _ in shown), {"type": "text", "text": content}]
    turn = [{"role": "user", "content": content}]
    found = processor.apply_chat_template(turn, chat_template=template, add_generation_prompt=True, tokenize=False)
    if mark and found.count(mark) != len(shown) + question.count(mark):
        raise ValueError(
            f"the chat template of {type(processor).__name__} writes {found.count(mark)} marks {mark!r} for "
            f"{len(shown)} {kind}s; give it one that shows content of type {kind!r}"
        )
    return str(found)


def render_turn(processor: Any, question: str) -> str:
    """What the chat template writes between an answer and the one to a further question; without one: the question.

    Raises:
        ValueError: the template takes no second question.
    """
    tokenizer = tokenizer_of(processor)
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if template is None:
        return f" {question}"
    parts = [("user", "first"), ("assistant", ANSWER), ("user", question)]
    several = processor is not tokenizer
    turns = [{"role": r, "content": [{"type": "text", "text": text}] if several else text} for r, text in parts]
    found = str(
        processor.apply_chat_template(turns, chat_template=template, add_generation_prompt=True, tokenize=False)
    )
    if found.count(ANSWER) != 1 or question not in found:
        raise ValueError(f"the chat template of {type(processor).__name__} takes no second question; ask anew")
    return found.partition(ANSWER)[2]


def kind_of(about: Any) -> str:
    """ "video" of `Frames`, else "image"."""
    return "video" if isinstance(about, Frames) else "image"


def pictures_of(about: Any) -> list[Any]:
    """The images of a row, or its one video; none where it asks about a text."""
    several = isinstance(about, (list, tuple)) and not isinstance(about, Frames)
    return [] if isinstance(about, str) else list(about) if several else [about]


def encode(processor: Any, shown: Sequence[Any], questions: Sequence[str]) -> Any:
    """One question per row, as a padded batch, by the chat template: about images, videos, or texts, alike in all."""
    return encode_texts(processor, [render(processor, q, about) for q, about in zip(questions, shown)], shown)


def encode_texts(processor: Any, texts: list[str], shown: Sequence[Any], **options: Any) -> Any:
    """Rendered prompts with what each of them shows, as a padded batch."""
    tokenizer = tokenizer_of(processor)
    options |= {"padding": True, "return_tensors": "pt"}
    templated = processor is tokenizer and getattr(tokenizer, "chat_template", None)
    if templated or (tokenizer.bos_token and texts[0].startswith(tokenizer.bos_token)):  # the template has written it
        options["add_special_tokens"] = False
    pictures = [pictures_of(about) for about in shown]
    if not any(pictures):
        return processor(text=texts, **options)
    if kind_of(shown[0]) == "video":
        options["videos"] = [list(frames) for (frames,) in pictures]
    else:
        options["images"] = pictures
    found = processor(text=texts, **options)
    found.pop("labels", None)  # for training; some processors always add them
    return found


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
        shown: per row a text, an image, a list of images, or the `Frames` of a video.
        protocol: "one-turn" asks inside the prompt. "two-turn" cuts the tokens of the same prompt before the question:
            the model reads what is asked about, its cache is compressed, and the question follows in a second turn.

    Raises:
        ValueError: two turns, and the questions take unequal numbers of tokens, nothing stands before them, or the
            tokenizer does not say where its tokens stand.
    """
    if protocol == "one-turn":
        return Batch(rows, encode(processor, shown, questions))
    texts = [render(processor, q, about) for q, about in zip(questions, shown)]
    starts = [_start(processor, *row) for row in zip(texts, questions, shown)]
    marked = {} if processor is tokenizer_of(processor) else {"return_text_replacement_offsets": True}
    inputs = encode_texts(processor, texts, shown, return_offsets_mapping=has_offsets(processor), **marked)
    spans = inputs.pop("offset_mapping").tolist()
    marks = inputs.pop("text_replacement_offsets", None) or [[]] * len(rows)
    ids = inputs["input_ids"]
    later = {
        _tokens_after(expanded_place(start, expanded), span) for start, expanded, span in zip(starts, marks, spans)
    }
    if len(later) > 1:
        raise ValueError(f"the questions of rows {rows} take {sorted(later)} tokens; ask equally long ones together")
    size = later.pop()
    first = type(inputs)({k: v[:, :-size] if v.shape == ids.shape else v for k, v in inputs.items()})
    if not first["attention_mask"].any(1).all():
        raise ValueError(f"in rows {rows} nothing stands before the question; choose protocol='one-turn'")
    return Batch(rows, first, ids[:, -size:])


def expanded_place(place: int, expanded: Sequence[Mapping[str, Any]]) -> int:
    """Where a character of a rendered prompt stands once the processor has replaced the marks of images."""
    before = [m for m in expanded if m["span"][1] <= place]
    return place + sum(m["new_span"][1] - m["new_span"][0] - m["span"][1] + m["span"][0] for m in before)


def question_tokens(processor: Any, questions: Sequence[str], shown: Sequence[Any]) -> list[int]:
    """Per row, how many tokens the second turn feeds: the question and what the template writes after it.

    Raises:
        ValueError: as `encode_rows`.
    """
    texts = [render(processor, q, about) for q, about in zip(questions, shown)]
    found = tokenizer_of(processor)(texts, add_special_tokens=False, return_offsets_mapping=has_offsets(processor))
    starts = (_start(processor, *row) for row in zip(texts, questions, shown))
    return [_tokens_after(start, spans) for start, spans in zip(starts, found["offset_mapping"])]


def has_offsets(processor: Any) -> bool:
    """True.

    Raises:
        ValueError: the tokenizer does not say where its tokens stand.
    """
    tokenizer = tokenizer_of(processor)
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer={type(tokenizer).__name__} does not say where its tokens stand (is_fast=False), so that no "
            "prompt can be cut before its question (choose protocol='one-turn'), and no answer be told from it"
        )
    return True


def _start(processor: Any, text: str, question: str, about: Any) -> int:
    """Where the question starts in the prompt: from there on another one would read differently."""
    bare = question.lstrip()
    other = render(processor, ("1" if bare.startswith("0") else "0") + bare[1:], about)
    start = next((i for i, (a, b) in enumerate(zip(text, other)) if a != b), None)
    if start is None:
        raise ValueError(f"the chat template does not show the question {question!r}")
    kind = kind_of(about)
    mark = getattr(processor, f"{kind}_token", None)
    if pictures_of(about) and mark and mark in text[start:]:
        raise ValueError(f"the chat template shows the {kind} after the question; choose protocol='one-turn'")
    return start


def _tokens_after(start: int, spans: Sequence[Sequence[int]]) -> int:
    """How many tokens there are from the first one on that holds a character at `start` or later."""
    return len(spans) - next(i for i, (_, end) in enumerate(spans) if end > start)


@torch.inference_mode()
def reply(model: Any, processor: Any, batch: Batch, max_new_tokens: int | None = None) -> list[dict[str, Any]]:
    """Greedy answers to a batch, the model compressed or not.

    Returns:
        per row: "row"; "answer", stripped; "length", its tokens; "cut", whether it was stopped by its length; of the
        prompt "visual", visual tokens in a decoder
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
        inputs = further_turn(inputs, batch.later.to(model.device), cache_name(model), cache)
        out = model.generate(**inputs, **options)
    tokens = out.sequences
    new = tokens[:, inputs["input_ids"].shape[1] :]
    special = torch.tensor(tokenizer_of(processor).all_special_ids, device=new.device)
    lengths = torch.isin(new, special, invert=True).sum(1).tolist()
    ends = torch.tensor(model.generation_config.eos_token_id or [], device=new.device)
    cut = torch.isin(new, ends).any(1).logical_not().tolist()
    said = processor.batch_decode(new, skip_special_tokens=True)
    return [
        {"row": row, "answer": text.strip(), "length": length, "cut": stopped, **count}
        for row, text, length, stopped, count in zip(batch.rows, said, lengths, cut, counts)
    ]


def further_turn(inputs: Any, question: Any, name: str, cache: Any) -> dict[str, Any]:
    """The turns before, whose tokens the cache stands for (an argument called `name`), and the question after them."""
    ids = inputs["input_ids"]
    kinds = {k: v for k, v in inputs.items() if k != "input_ids" and v.shape == ids.shape}
    out = {k: torch.cat([v, v.new_full(question.shape, k == "attention_mask")], 1) for k, v in kinds.items()}
    return {"input_ids": torch.cat([ids, question], 1), name: cache, **out}


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
    stores = [entries for entries, size in zip(last.cache_tokens, last.cache_bytes) if size]  # others keep a state
    size = {"bytes": sum(last.cache_bytes) / rows, "full_bytes": last.full_cache_bytes / rows}
    out = []
    for i in range(rows):
        text = last.prompt_tokens[i] - visual[i]
        held = sum(layer[i] for layer in last.layer_tokens) / layers - text
        entries = sum(layer[i] for layer in stores) / len(stores)
        out.append({"visual": round(held, 3), "entries": round(entries, 3), **size})
    return out


def _bare_counts(inputs: Any, cache: Any, visual: list[int]) -> list[dict[str, float]]:
    """The same of an uncompressed model: all of the prompt, not what was generated after it."""
    length = inputs["input_ids"].shape[1]
    size = 0.0
    stores = [layer for layer in cache.layers if hasattr(layer, "keys")]  # others keep a state
    for held in (t for layer in stores for t in (layer.keys, layer.values)):
        size += held.numel() * held.element_size() * min(1, length / held.shape[-2]) / len(visual)
    entries = inputs["attention_mask"].sum(1).tolist()
    return [{"visual": v, "entries": n, "bytes": size, "full_bytes": size} for v, n in zip(visual, entries)]
