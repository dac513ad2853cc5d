"""Running text of the documentation of Python, which every installation carries, with facts between its sentences."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

NAMES = [
    "Anna",
    "Mark",
    "Lucy",
    "Paul",
    "Emma",
    "John",
    "Rosa",
    "Karl",
    "Nina",
    "Hugo",
    "Vera",
    "Ivan",
    "Sara",
    "Noah",
    "Olga",
    "Adam",
    "Ruth",
    "Leon",
    "Mona",
    "Felix",
]
THINGS = ("locker", "bicycle", "garage", "mailbox", "suitcase", "office")
FACT = "The code of {name}'s {thing} is {code}."
QUESTION = "What is the code of {name}'s {thing}? Answer in one sentence."


def passages(tokenizer: Any, tokens: int, seed: int = 0) -> Iterator[str]:
    """Texts of just under so many tokens, no sentence in two of them; their order hangs on `seed`."""
    order = sorted(topics)
    random.Random(seed).shuffle(order)
    held: list[str] = []
    size = 0
    for sentence in (s for topic in order for s in sentences(topics[topic])):
        more = len(tokenizer(" " + sentence, add_special_tokens=False).input_ids)
        if size + more > tokens:
            yield " ".join(held)
            held, size = [], 0
        held.append(sentence)
        size += more


def sentences(text: str) -> list[str]:
    """Of running text: no tables, no examples, no headings."""
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n") if not p.startswith("   ") and ">>>" not in p]
    parts = (s for p in paragraphs for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", p))
    return [s for s in parts if s.endswith(".") and 6 <= len(s.split()) <= 60]


def with_facts(passage: str, facts: int, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """The passage with facts at random places, and (question, answer) of each in the order of their places."""
    parts = re.split(r"(?<=\.)\s+(?=[A-Z])", passage)
    asked = []
    places = sorted(rng.sample(range(1, len(parts)), facts))
    for name, place in reversed(list(zip(rng.sample(NAMES, facts), places))):
        thing, code = rng.choice(THINGS), "".join(rng.choices("123456789", k=4))
        parts.insert(place, FACT.format(name=name, thing=thing, code=code))
        asked.append((QUESTION.format(name=name, thing=thing), code))
    return " ".join(parts), asked[::-1]


Asked = tuple[str, list[tuple[str, str]]]  # a context, and (question, answer) of each of its facts


def asked_contexts(tokenizer: Any, tokens: int, contexts: int, facts: int, seed: int = 0) -> list[Asked]:
    """Contexts of just under `tokens` tokens, each with so many facts, all of which are asked for.

    One fact is the needle in a haystack.
    """
    rng = random.Random(seed)
    room = tokens - facts * len(tokenizer(FACT.format(name="Anna", thing="suitcase", code="1234")).input_ids)
    return [with_facts(passage, facts, rng) for passage, _ in zip(passages(tokenizer, room, seed), range(contexts))]
