"""Conversations with images to batches with labels, by the chat template of the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_compress.evaluate.prompts import encode_texts, expanded_place, has_offsets, tokenizer_of
from hf_compress.train.packing import Packer

IGNORED = -100


class VisionTextCollator:
    """Examples with `messages` and `images` to a padded batch whose labels are the answers; for `Trainer`.

    `messages` is a conversation as chat templates take it: turns with a role and a content, which is a text, or parts
    {"type": "text", "text": ...} and {"type": "image"}. `images` are those of the parts, in order; where no part is an
    image they come before the text of the first turn. The turns of the role `answers` are learnt, each with what the
    template writes behind it (its end of turn); all else is -100: prompts, images, padding. One call of the processor a
    batch: answers are found by the characters of the rendered conversation.

    Args:
        processor: of a VLM with a chat template and a fast tokenizer; or one without template that takes an answer as
            `suffix` (PaliGemma): conversations are then a prompt and its answer.
        answers: the role that is learnt.
        padding_side: "left", "right", or None: that of the tokenizer.
        pack_for: a model: all conversations of a batch go into one row without padding, in which this model (compressed
            or not) keeps them apart by their position ids. Workers of a data loader that are spawned would copy it.

    Raises:
        ValueError: there is no chat template, the tokenizer is not fast, `padding_side` is another word, or the model
            cannot keep conversations apart. When called: an example is no conversation that begins with a prompt, its
            images are not as many as its parts show, nothing in it is learnt, the template writes the beginning of a
            conversation otherwise than the whole, or the processor pads on the other side.
    """

    def __init__(
        self, processor: Any, *, answers: str = "assistant", padding_side: str | None = None, pack_for: Any = None
    ):
        if padding_side not in (None, "left", "right"):
            raise ValueError(f"padding_side={padding_side!r} must be 'left', 'right' or None")
        tokenizer = tokenizer_of(processor)
        self.template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        if self.template is None and "suffix" not in inspect.signature(processor.__call__).parameters:
            raise ValueError(f"processor={type(processor).__name__} has no chat template; set processor.chat_template")
        has_offsets(processor)
        self.pack = None if pack_for is None else Packer(pack_for)
        self.processor, self.answers = processor, answers
        self.padding_side = padding_side or tokenizer.padding_side

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Inputs of the model as the processor names them, and `labels` (B, L); with `pack_for` of one row."""
        if not examples:
            raise ValueError("examples=[] must be one conversation or more")
        images = [list(example.get("images") or []) for example in examples]
        talks = [self._turns(example, len(shown)) for example, shown in zip(examples, images)]
        batch = self._completed(talks, images) if self.template is None else self._templated(talks, images)
        self._check_side(batch["attention_mask"].bool())
        labels = batch["labels"]
        if empty := (labels == IGNORED).all(1).nonzero()[:, 0].tolist():
            raise ValueError(
                f"examples {empty} of the batch have nothing to learn: no turn of {self.answers!r} has text"
            )
        return batch if self.pack is None else self.pack(batch)

    def _templated(self, talks: list[list[dict[str, Any]]], images: list[list[Any]]) -> dict[str, Any]:
        """By the chat template."""
        texts = [self._text(turns) for turns in talks]
        marked = {} if self.processor is tokenizer_of(self.processor) else {"return_text_replacement_offsets": True}
        batch = encode_texts(
            self.processor, texts, images, padding_side=self.padding_side, return_offsets_mapping=True, **marked
        )
        places = batch.pop("offset_mapping")
        replaced = batch.pop("text_replacement_offsets", None) or [[]] * len(texts)
        ids, real = batch["input_ids"], batch["attention_mask"].bool()
        labels = torch.full_like(ids, IGNORED)
        for row, (turns, text) in enumerate(zip(talks, texts)):
            for start, end in self._spans(turns, text):
                first, last = (expanded_place(place, replaced[row]) for place in (start, end))
                inside = (places[row, :, 1] > first) & (places[row, :, 0] < last) & real[row]
                labels[row] = torch.where(inside, ids[row], labels[row])
        return {**batch, "labels": labels}

    def _completed(self, talks: list[list[dict[str, Any]]], images: list[list[Any]]) -> dict[str, Any]:
        """By a processor that takes prompts with their images in front, and answers as what follows them."""
        for turns in talks:
            if [turn["role"] == self.answers for turn in turns] != [False, True]:
                raise ValueError(
                    f"messages={turns!r}: {type(self.processor).__name__} has no chat template, and takes a prompt and "
                    f"an answer (role {self.answers!r}); give every question its own example"
                )
        asked, said = ([_said(turns[i]) for turns in talks] for i in (0, 1))
        prompts = [self.processor.image_token * len(shown) + text for shown, text in zip(images, asked)]
        batch = encode_texts(self.processor, prompts, images, padding_side=self.padding_side, suffix=said)
        learnt = (batch["token_type_ids"] == 1) & batch["attention_mask"].bool()
        return {**batch, "labels": batch["input_ids"].masked_fill(~learnt, IGNORED)}

    def _turns(self, example: Mapping[str, Any], images: int) -> list[dict[str, Any]]:
        """The turns of an example, their contents as parts where the processor shows images."""
        turns = example.get("messages")
        if not isinstance(turns, Sequence) or not turns or not all({"role", "content"} <= set(t) for t in turns):
            raise ValueError(f"messages={turns!r} must be a list of turns, each with a role and a content")
        if turns[0]["role"] == self.answers:
            raise ValueError(f"messages={turns!r} begin with an answer ({self.answers!r}); put the prompt before it")
        if self.processor is tokenizer_of(self.processor):
            return [dict(turn) for turn in turns]
        out = [dict(turn, content=_parts(turn["content"])) for turn in turns]
        if not (shown := sum(part["type"] == "image" for turn in out for part in turn["content"])) and images:
            first = next((turn for turn in out if turn["role"] not in ("system", self.answers)), out[0])
            first["content"] = [*({"type": "image"} for _ in range(images)), *first["content"]]
        elif shown != images:
            raise ValueError(f"images: an example has {images}, and its messages show {shown}; give one per part")
        return out

    def _text(self, turns: list[dict[str, Any]], answering: bool = False) -> str:
        options = {"chat_template": self.template, "tokenize": False, "add_generation_prompt": answering}
        return str(self.processor.apply_chat_template(turns, **options))

    def _spans(self, turns: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
        """Characters of the learnt turns in the rendered conversation."""
        spans = []
        for i in (i for i, turn in enumerate(turns) if turn["role"] == self.answers):
            before, until = self._text(turns[:i], answering=True), self._text(turns[: i + 1])
            if not text.startswith(before) or not text.startswith(until):
                raise ValueError(
                    f"the chat template writes {before[-40:]!r} before the answer of turn {i}, and not so in the whole "
                    "conversation, so that answers cannot be told from prompts; set processor.chat_template to one "
                    f"that only appends, and answers= to the role that it answers as (now {self.answers!r})"
                )
            spans.append((len(before), len(until)))
        return spans

    def _check_side(self, real: torch.Tensor) -> None:
        edge = real[:, -1 if self.padding_side == "left" else 0]
        if not bool(edge.all()):
            raise ValueError(
                f"padding_side={self.padding_side!r}: {type(self.processor).__name__} has padded on the other side; "
                "set processor.tokenizer.padding_side"
            )


def _said(turn: Mapping[str, Any]) -> str:
    """The text of a turn."""
    return "".join(part["text"] for part in turn["content"] if part["type"] == "text")


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content]
