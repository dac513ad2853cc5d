"""What is run: every method at every ratio, the controls that it has to beat, and the uncompressed model."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_compress import budget, registry
from hf_compress.config import CompressionConfig, MethodConfig

BARE = "none"  # the uncompressed model
RATIOS = (0.5, 0.75, 0.89, 0.94)
# The controls of the vision stage serve for the decoder stage too: its ratio is the mean over layers.
CONTROLS = {
    "vision": {"random": "random", "uniform": "uniform", "downsample": "downsample"},
    "cache": {"random": "kvrandom", "streaming": "streaming"},
    "both": {"random": "random+kvrandom", "uniform": "uniform+streaming", "downsample": "downsample+streaming"},
}
SEEDS = (0, 1000, 2000)
Knobs = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One pass over the questions.

    Attributes:
        method: as it was named: "divprune+snapkv", "fastv:layer=1", or "none".
        ratio: fraction removed, for each part of a composition; None for the uncompressed model.
        seed: of the parts that draw; None where nothing is drawn.
        knobs: JSON of {part: {knob: value}}.
    """

    method: str
    ratio: float | None = None
    seed: int | None = None
    knobs: str = "{}"

    @property
    def key(self) -> str:
        """Identifies it in files."""
        parts = [self.method, *([f"ratio={self.ratio!r}"] if self.ratio is not None else [])]
        parts += [f"seed={self.seed}"] if self.seed is not None else []
        return "|".join([*parts, *([self.knobs] if self.knobs != "{}" else [])])

    @classmethod
    def from_key(cls, key: str) -> Run:
        """The inverse of `key`."""
        method, *rest = key.split("|")
        named = dict(part.split("=") for part in rest if not part.startswith("{"))
        knobs = next((part for part in rest if part.startswith("{")), "{}")
        seed = int(named["seed"]) if "seed" in named else None
        return cls(method, float(named["ratio"]) if "ratio" in named else None, seed, knobs)

    @property
    def stage(self) -> str:
        """Stages of its parts, joined by plus signs; "" for the uncompressed model."""
        return "" if self.method == BARE else "+".join(registry.get(name).stage for name, _ in split(self.method))

    def config(self) -> CompressionConfig:
        """What `model.compress` takes."""
        knobs = json.loads(self.knobs)
        return CompressionConfig(
            [MethodConfig(name, self.ratio, None, knobs.get(name, {})) for name, _ in split(self.method)]
        )


def split(method: str) -> list[tuple[str, dict[str, Any]]]:
    """The parts of a method and their knobs: "fastv:layer=1+snapkv" is fastv with layer=1, and snapkv.

    Raises:
        ValueError: a part is no method, two act in one stage, or a knob is not name=value.
    """
    out = []
    for part in method.split("+"):
        name, *knobs = part.strip().split(":")
        registry.get(name)
        out.append((name, dict(_knob(name, k) for k in knobs)))
    registry.check_stages(registry.get(name) for name, _ in out)
    return out


def parse_knobs(texts: Iterable[str]) -> Knobs:
    """{"fastv": {"layer": 1}} of ["fastv.layer=1"].

    Raises:
        ValueError: a text is not METHOD.NAME=VALUE, or there is no such method or knob.
    """
    out: Knobs = {}
    for text in texts:
        name, dot, rest = text.partition(".")
        if not dot or "=" not in rest:
            raise ValueError(f"knob={text!r}: write METHOD.NAME=VALUE, such as fastv.layer=1")
        registry.get(name)
        out.setdefault(name, {}).update([_knob(name, rest)])
    return out


def _knob(name: str, text: str) -> tuple[str, Any]:
    knob, equals, value = text.partition("=")
    known = registry.get(name).knobs
    if not equals or knob not in known:
        raise ValueError(f"{name}: {text!r} is not one of its arguments as NAME=VALUE; it takes {sorted(known)}")
    try:
        return knob, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return knob, value  # a bare word


def controls_of(method: str) -> dict[str, str]:
    """Control -> the method that stands for it, at the same budget.

    The vision part of a composition gives way to random, uniform or downsample, the cache part to kvrandom or
    streaming; a decoder part beside a vision part stays.
    """
    stages = {registry.get(name).stage: part for (name, _), part in zip(split(method), method.split("+"))}
    visual = bool({"vision", "decoder"} & set(stages))
    found = CONTROLS["both" if visual and "cache" in stages else "vision" if visual else "cache"]
    if {"vision", "decoder"} <= set(stages):
        parts = {control: name.split("+") for control, name in found.items()}
        found = {control: "+".join([p[0], stages["decoder"], *p[1:]]) for control, p in parts.items()}
    return {control: name for control, name in found.items() if name != method}


def plan(methods: Sequence[str], ratios: Sequence[float] = RATIOS, knobs: Mapping[str, Any] | None = None) -> list[Run]:
    """All runs: the uncompressed model, then ratio by ratio the controls and the methods; what draws, by every seed.

    Args:
        methods: names; a plus sign composes, a colon adds knobs.
        ratios: fractions removed.
        knobs: of every use of a method: {"fastv": {"layer": 1}}; knobs in a name go before them.

    Raises:
        ValueError: nothing is asked for, or a name, a ratio or a knob is wrong.
    """
    if not methods or not ratios:
        raise ValueError(f"methods={list(methods)}, ratios={list(ratios)}: name at least one of each")
    for name, values in (knobs or {}).items():
        for knob in values:
            _knob(name, f"{knob}=")
    names = list(dict.fromkeys(m.strip() for m in methods))
    wanted = list(dict.fromkeys(c for m in names for c in (*controls_of(m).values(), m)))
    runs = [Run(BARE)]
    for ratio in sorted({float(budget.check_ratio(r)) for r in ratios}):
        for method in sorted(wanted, key=lambda m: m in names and m not in _controls()):
            runs += _seeded(method, ratio, knobs or {})
    return runs


def _controls() -> set[str]:
    return {name for group in CONTROLS.values() for name in group.values()}


def _seeded(method: str, ratio: float, knobs: Mapping[str, Any]) -> list[Run]:
    parts = {name: {**knobs.get(name, {}), **own} for name, own in split(method)}
    drawn = [n for n in parts if n in ("random", "kvrandom") and "seed" not in parts[n]]
    runs = []
    for seed in SEEDS if drawn else (None,):
        chosen = {n: {**k, "seed": seed} if n in drawn else k for n, k in parts.items()}
        chosen = {n: k for n, k in chosen.items() if k}
        runs.append(Run(method, ratio, seed, json.dumps(chosen, sort_keys=True)))
    return runs
