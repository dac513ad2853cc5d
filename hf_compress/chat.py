"""A conversation with a compressed model about a picture or a text: tokens and time of every turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import BaseStreamer

from hf_compress.evaluate.prompts import encode_rows, further_turn, render_turn, tokenizer_of
from hf_compress.patches.versions import cache_name, cache_of


@dataclass
class Turn:
    """One question and its answer.

    Attributes:
        answer: without special tokens.
        fed: tokens that this turn has fed, visual ones included.
        visual, kept: visual tokens of them, and those that entered the language model; 0 where no method reads images.
        length: tokens of the answer.
        kv_bytes: of the whole cache after the prompt, None where the model keeps none.
        full_kv_bytes: of one that keeps everything.
        first, total: seconds to the first token, and to the last.
    """

    answer: str
    fed: int
    visual: int
    kept: int
    length: int
    kv_bytes: int | None
    full_kv_bytes: int | None
    first: float
    total: float

    def __str__(self) -> str:
        """What it took, in one line."""
        parts = [f"{self.fed} tokens fed"]
        if self.visual:
            parts.append(f"{self.visual} -> {self.kept} visual")
        if self.kv_bytes is not None and self.full_kv_bytes:
            parts.append(f"cache {self.kv_bytes / 1e6:.2f} MB of {self.full_kv_bytes / 1e6:.2f}")
        return ", ".join([*parts, f"first token {self.first:.2f} s, {self.length} tokens {self.total:.2f} s"])


class Chat:
    """Turns on one cache: what a method has dropped stays dropped, as in any conversation with a compressed model.

    Args:
        model: compressed, or not (then nothing is said of bytes).
        processor: its processor, or the tokenizer of a text model.
        about: what the first turn shows: an image, a list of images, or a text.
        max_new_tokens: of an answer.
    """

    def __init__(self, model: Any, processor: Any, about: Any, max_new_tokens: int = 256):
        self.model, self.processor, self.about, self.most = model, processor, about, max_new_tokens
        self._inputs: Any = None
        self._cache: Any = None

    def ask(self, question: str, say: Callable[[str], None] | None = None) -> Turn:
        """One turn, decoded greedily.

        Args:
            question: of the user.
            say: is given the answer piece by piece, as it comes.

        Raises:
            ValueError: the question is empty, or the chat template takes no further turn.
        """
        if not question.strip():
            raise ValueError("question='' is empty; ask something")
        clock = Clock(tokenizer_of(self.processor), say)
        inputs = self._first(question) if self._inputs is None else self._next(question)
        before = 0 if self._inputs is None else self._inputs["input_ids"].shape[1]
        with torch.inference_mode():
            out = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=self.most, return_dict_in_generate=True, streamer=clock
            )
        prompt = inputs["input_ids"].shape[1]
        new = out.sequences[0, prompt:]
        self._cache = cache_of(out)
        self._inputs = {"input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
        answer = tokenizer_of(self.processor).decode(new, skip_special_tokens=True).strip()
        last = None if self.model.compression is None else self.model.compression.last
        visual, kept = (0, 0) if last is None else (sum(map(sum, last.visual_tokens)), sum(map(sum, last.visual_left)))
        stored = None if last is None or last.cache_bytes is None else sum(last.cache_bytes)
        whole = None if last is None else last.full_cache_bytes
        return Turn(answer, prompt - before, visual, kept, len(new), stored, whole, *clock.seconds())

    def _first(self, question: str) -> Any:
        return encode_rows(self.processor, [0], [question], [self.about]).inputs.to(self.model.device)

    def _next(self, question: str) -> Any:
        """The conversation so far, which the cache stands for, and what the template writes behind its last answer."""
        tokenizer = tokenizer_of(self.processor)
        text = render_turn(self.processor, question)
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        last = int(self._inputs["input_ids"][0, -1])
        if last in ends:  # the model has said itself that its turn is over, and the template says it again
            text = text.removeprefix(tokenizer.decode([last]))
        new = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(self.model.device)
        return further_turn(self._inputs, new, cache_name(self.model), self._cache)


class Clock(BaseStreamer):
    """When tokens come; passes on the text that they make."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None] | None):
        self.tokenizer, self.say = tokenizer, say
        self.start, self.times = time.perf_counter(), [0.0]
        self.ids: list[int] = []
        self.said = ""
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then one token after the other."""
        if self.prompt:
            self.prompt = False
            return
        self.times.append(time.perf_counter() - self.start)
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if self.say is not None and text.startswith(self.said) and not text.endswith("\ufffd"):  # half a character
            self.say(text[len(self.said) :])
            self.said = text

    def end(self) -> None:
        """All tokens have come."""

    def seconds(self) -> tuple[float, float]:
        """To the first token, and to the last."""
        return self.times[min(1, len(self.times) - 1)], self.times[-1]
