"""What a method sees and what it answers. Methods know these types and `tensors/`, nothing else.

Every signal is lazy: what a method does not ask for is not computed. All answers are decided without gradient; the
engine applies them with gradient.
"""

from __future__ import annotations

from hf_compress.signals.answer import Assignment
from hf_compress.signals.entries import CacheView, Order, Reading, Rivals, Slots
from hf_compress.signals.reads import AGAIN, COLUMNS, CONTENT, EVERY, LOOKS, LOSS, QUERIES, QUESTION, Read, Repetition
from hf_compress.signals.rows import DecoderView
from hf_compress.signals.some import SomeTokens
from hf_compress.signals.tokens import Block, Patches, Text, Tokens

__all__ = [
    "AGAIN",
    "COLUMNS",
    "CONTENT",
    "EVERY",
    "LOOKS",
    "LOSS",
    "QUERIES",
    "QUESTION",
    "Assignment",
    "Block",
    "CacheView",
    "DecoderView",
    "Order",
    "Patches",
    "Read",
    "Reading",
    "Repetition",
    "Rivals",
    "Slots",
    "SomeTokens",
    "Text",
    "Tokens",
]
