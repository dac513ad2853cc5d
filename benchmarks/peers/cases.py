"""What is compared: pairs of the same method at the same knobs, here and in kvpress. Plain data, read by both sides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One method on both sides.

    Args:
        name: for tables.
        method: ours; `knobs`: its arguments besides the ratio.
        press: class of kvpress; `options`: its arguments besides the ratio; `wrapper`: a class around it, and its own.
        attention: implementation that the press needs.
        why: by which rule the two differ at these knobs, where they do.
    """

    name: str
    method: str
    press: str
    knobs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    wrapper: tuple[str, dict[str, Any]] | None = None
    attention: str = "sdpa"
    why: str = ""


SNAP = {"window": 64, "kernel": 5, "pooling": "avg"}
ADA = ("AdaKVPress", {"alpha_safeguard": 0.2})
CASES = (
    Case(
        "knorm",
        "knorm",
        "KnormPress",
        why="ties: where a token occurs twice, its keys have one norm in the first layer; at the border of the budget "
        "the earlier one stays here, either of them there",
    ),
    Case("streaming", "streaming", "StreamingLLMPress", {"sinks": 4}, {"n_sink": 4}),
    Case("snapkv", "snapkv", "SnapKVPress", SNAP, {"window_size": 64, "kernel_size": 5}),
    Case(
        "tova",
        "tova",
        "TOVAPress",
        why="kvpress always keeps the newest entry (not in the paper, as its docstring says); ours ranks it too",
    ),
    Case("keydiff", "keydiff", "KeyDiffPress"),
    Case(
        "expected",
        "expected",
        "ExpectedAttentionPress",
        {"sinks": 4, "future": 512},
        {"n_sink": 4, "n_future_positions": 512},
    ),
    Case(
        "adakv of snapkv",
        "adakv",
        "SnapKVPress",
        {"scorer": "snapkv", "scorer_knobs": SNAP, "floor": 0.2},
        {"window_size": 64, "kernel_size": 5},
        ADA,
    ),
    Case(
        "adakv of expected",
        "adakv",
        "ExpectedAttentionPress",
        {"scorer": "expected", "scorer_knobs": {"sinks": 4, "future": 512, "epsilon": 0.01}, "floor": 0.2},
        {"n_sink": 4, "n_future_positions": 512, "epsilon": 0.01},
        ADA,
    ),
    Case("adakv of keydiff", "adakv", "KeyDiffPress", {"scorer": "keydiff", "floor": 0.2}, {}, ADA),
    Case(
        "pyramidkv",
        "pyramidkv",
        "PyramidKVPress",
        {"window": 64, "kernel": 5, "pooling": "avg"},
        {"window_size": 64, "kernel_size": 5, "beta": 20},
        why="ours is the pyramid of the paper over what the window leaves, with the window on top; kvpress counts the "
        "window into the budget of a layer, and is uniform where the last layer would keep less than the window",
    ),
    Case(
        "h2o / observed attention",
        "h2o",
        "ObservedAttentionPress",
        {"normalize": True},
        attention="eager",
        why="H2O keeps the newest half of its budget whatever its score, ObservedAttentionPress ranks everything",
    ),
)
