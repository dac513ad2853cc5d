"""What a model still knows of the facts in a text: asked in the prompt, or after its cache was compressed."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hf_compress.evaluate.prompts import encode_rows, further_turn, question_tokens, reply
from hf_compress.patches.versions import cache_name, cache_of

LENGTH = 16  # new tokens: "The code of Anna's suitcase is 1234." takes 14


def ask_within(model: Any, tokenizer: Any, context: str, questions: Sequence[str]) -> list[str]:
    """Answers where each question stands in a prompt of its own, behind the context: one turn."""
    batches = (encode_rows(tokenizer, [0], [question], [context]) for question in questions)
    return [reply(model, tokenizer, batch, LENGTH)[0]["answer"] for batch in batches]


@torch.inference_mode()
def ask_later(model: Any, tokenizer: Any, context: str, questions: Sequence[str]) -> list[str]:
    """Answers in a second turn: the context is read once, and each question follows on a copy of the cache it left."""
    found = [""] * len(questions)
    read, cache = torch.empty(0), None
    for rows in _alike(question_tokens(tokenizer, questions, [context] * len(questions))):
        batch = encode_rows(tokenizer, rows, [questions[i] for i in rows], [context] * len(rows), "two-turn")
        inputs = batch.inputs.to(model.device)
        first = inputs["input_ids"][:1]
        if not torch.equal(first, read):
            options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
            read, cache = first, cache_of(model.generate(**{k: v[:1] for k, v in inputs.items()}, **options))
        own = copy.deepcopy(cache)
        own.batch_repeat_interleave(len(rows))
        asked = further_turn(inputs, batch.later.to(model.device), cache_name(model), own)
        said = model.generate(**asked, max_new_tokens=LENGTH, do_sample=False)[:, asked["input_ids"].shape[1] :]
        for i, text in zip(rows, tokenizer.batch_decode(said, skip_special_tokens=True)):
            found[i] = text.strip()
    return found


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of the questions, those of as many tokens together."""
    for length in sorted(set(lengths)):
        yield [i for i, own in enumerate(lengths) if own == length]


def digits_told(answer: str, code: str) -> int:
    """How many digits of the code some number in the answer begins with; all of them: it is right."""
    numbers = re.findall(r"\d+", answer)
    return max((_common(number, code) for number in numbers), default=0)


def _common(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
