"""What is run: every method at every ratio, the controls that it has to beat, and the uncompressed model."""

from __future__ import annotations

import ast
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from hf_compress import budget, registry
from hf_compress.config import CompressionConfig, MethodConfig
from hf_compress.weights import FILE

BARE = "none"  # the uncompressed model
RATIOS = (0.5, 0.75, 0.89, 0.94)
# The controls of the vision stage, by what is asked about, serve for the decoder stage too: its ratio is the mean over
# layers. "time" spreads tokens evenly over the time of a video, "uniform" over the pictures, "frames" drops frames.
VISUAL = {
    "image": {"random": "random", "uniform": "uniform", "downsample": "downsample"},
    "video": {"random": "random", "uniform": "uniform", "time": "strided", "frames": "frames"},
}
CACHE = {"random": "kvrandom", "streaming": "streaming"}
SEEDS = (0, 1000, 2000)
WEIGHTS = "weights"  # beside the knobs of a method that is trained: the folder of what it has learnt
Knobs = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One pass over the questions.

    Attributes:
        method: as it was named: "divprune+snapkv", "fastv:layer=1", or "none".
        ratio: fraction removed, for each part of a composition; None for the uncompressed model.
        seed: of the parts that draw; None where nothing is drawn.
        knobs: JSON of {part: {knob: value}}, with every knob, for defaults change between versions; and `WEIGHTS`.
        files: JSON of {part: {knob: digest}}: what the files hold that knobs name, and the weights.
    """

    method: str
    ratio: float | None = None
    seed: int | None = None
    knobs: str = "{}"
    files: str = "{}"

    @property
    def key(self) -> str:
        """Identifies it in files."""
        parts = [self.method, *([f"ratio={self.ratio!r}"] if self.ratio is not None else [])]
        parts += [f"seed={self.seed}"] if self.seed is not None else []
        return "|".join([*parts, *(text for text in (self.knobs, self.files) if text != "{}")])

    @classmethod
    def from_key(cls, key: str) -> Run:
        """The inverse of `key`."""
        head, brace, rest = key.partition("|{")
        method, *parts = head.split("|")
        named = dict(part.split("=") for part in parts)
        ratio = float(named["ratio"]) if "ratio" in named else None
        seed = int(named["seed"]) if "seed" in named else None
        if not brace:
            return cls(method, ratio, seed)
        texts = "{" + rest
        end = json.JSONDecoder().raw_decode(texts)[1]
        return cls(method, ratio, seed, texts[:end], texts[end + 1 :] or "{}")

    @property
    def setting(self) -> Knobs:
        """{part: {knob: value}}: tells methods of one name apart. Files count by content, drawn seeds do not."""
        files = json.loads(self.files)
        out = {part: {**own, **files.get(part, {})} for part, own in json.loads(self.knobs).items()}
        if self.seed is None:
            return out
        return {part: {k: v for k, v in own.items() if (k, v) != ("seed", self.seed)} for part, own in out.items()}

    @property
    def changed(self) -> Knobs:
        """The knobs that are not the defaults."""
        out: Knobs = {}
        for part, own in json.loads(self.knobs).items():
            usual = _plain(part, registry.get(part).knobs)
            out[part] = {k: v for k, v in own.items() if k not in usual or usual[k] != v}
        return {part: own for part, own in out.items() if own}

    @property
    def stage(self) -> str:
        """Stages of its parts, joined by plus signs; "" for the uncompressed model."""
        return "" if self.method == BARE else "+".join(registry.get(name).stage for name, _ in split(self.method))

    def config(self) -> CompressionConfig:
        """What `model.compress` takes, together with `weights`."""
        knobs = json.loads(self.knobs)
        own = {n: {k: v for k, v in knobs.get(n, {}).items() if k != WEIGHTS} for n, _ in split(self.method)}
        return CompressionConfig([MethodConfig(name, self.ratio, None, knobs) for name, knobs in own.items()])

    @property
    def weights(self) -> str | None:
        """The folder with what its methods have learnt."""
        return next((own[WEIGHTS] for own in json.loads(self.knobs).values() if WEIGHTS in own), None)


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


def parse_weights(texts: Iterable[str]) -> dict[str, str]:
    """{"sts": "folder"} of ["sts=folder"].

    Raises:
        ValueError: a text is not METHOD=FOLDER, or a method is named twice.
    """
    out: dict[str, str] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if not equals or not place or name in out:
            raise ValueError(f"weights={text!r}: write METHOD=FOLDER, such as sts=trained/sts, once per method")
        out[name] = place
    return out


def _knob(name: str, text: str) -> tuple[str, Any]:
    knob, equals, value = text.partition("=")
    spec = registry.get(name)
    known = {*spec.knobs, *([WEIGHTS] if spec.trains else [])}
    if not equals or knob not in known:
        raise ValueError(f"{name}: {text!r} is not one of its arguments as NAME=VALUE; it takes {sorted(known)}")
    try:
        return knob, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return knob, value  # a bare word


def controls_of(method: str, modality: str = "image") -> dict[str, str]:
    """Control -> the method that stands for it, at the same budget.

    The vision part of a composition gives way to random, uniform or downsample, or to those of videos, the cache part
    to kvrandom or streaming; a decoder part beside a vision part stays. A method of the prompt stage alone has none,
    and where nothing is seen neither has one of the decoder stage.

    Args:
        modality: what is asked about: "image", "video" or "text".
    """
    stages = {registry.get(name).stage: part for (name, _), part in zip(split(method), method.split("+"))}
    visual = bool({"vision", "decoder"} & set(stages)) and modality != "text"
    if not visual and "cache" not in stages:
        return {}
    found = VISUAL.get(modality, VISUAL["image"]) if visual else CACHE
    if visual and "cache" in stages:
        found = {control: f"{name}+{CACHE.get(control, 'streaming')}" for control, name in found.items()}
    if {"vision", "decoder"} <= set(stages):
        parts = {control: name.split("+") for control, name in found.items()}
        found = {control: "+".join([p[0], stages["decoder"], *p[1:]]) for control, p in parts.items()}
    return {control: name for control, name in found.items() if name != method}


def plan(
    methods: Sequence[str],
    ratios: Sequence[float] = RATIOS,
    knobs: Mapping[str, Any] | None = None,
    weights: Mapping[str, str | PathLike[str]] | None = None,
    modality: str = "image",
) -> list[Run]:
    """All runs: the uncompressed model, then ratio by ratio the controls and the methods; what draws, by every seed.

    Args:
        methods: names; a plus sign composes, a colon adds knobs.
        ratios: fractions removed.
        knobs: of every use of a method: {"fastv": {"layer": 1}}; knobs in a name go before them.
        weights: of every use of a method that is trained: {"sts": folder}, as `model.compression.save` wrote it.
        modality: what is asked about, see `controls_of`.

    Raises:
        ValueError: nothing is asked for, or a name, a ratio or a knob is wrong, or weights are not there.
    """
    if not methods or not ratios:
        raise ValueError(f"methods={list(methods)}, ratios={list(ratios)}: name at least one of each")
    for name, values in (knobs or {}).items():
        for knob in values:
            _knob(name, f"{knob}=")
    if weights is not None and not isinstance(weights, Mapping):
        raise ValueError(f"weights={weights!r} must be a dict of folders by method, such as {{'sts': 'trained/sts'}}")
    learnt = {name: {WEIGHTS: _folder(name, place)} for name, place in (weights or {}).items()}
    given = {name: {**(knobs or {}).get(name, {}), **learnt.get(name, {})} for name in {*(knobs or {}), *learnt}}
    names = list(dict.fromkeys(m.strip() for m in methods))
    wanted = list(dict.fromkeys(c for m in names for c in (*controls_of(m, modality).values(), m)))
    runs = [Run(BARE)]
    for ratio in sorted({float(budget.check_ratio(r)) for r in ratios}):
        for method in sorted(wanted, key=lambda m: m in names and m not in controls()):
            runs += _seeded(method, ratio, given)
    return runs


def controls() -> set[str]:
    """The methods that are there to be beaten."""
    return {name for group in (*VISUAL.values(), CACHE) for name in group.values()}


def _seeded(method: str, ratio: float, knobs: Mapping[str, Any]) -> list[Run]:
    parts = {name: {**knobs.get(name, {}), **own} for name, own in split(method)}
    drawn = [n for n in parts if n in ("random", "kvrandom") and "seed" not in parts[n]]
    if len(places := {own[WEIGHTS] for own in parts.values() if WEIGHTS in own}) > 1:
        raise ValueError(
            f"weights={sorted(places)}: {method!r} takes one folder, of methods that were trained together"
        )
    read = {n: {k: v for k, v in own.items() if k.endswith("_file") or k == WEIGHTS} for n, own in parts.items()}
    files = {n: {k: _digest(n, k, v) for k, v in own.items()} for n, own in read.items()}
    held = json.dumps({n: own for n, own in files.items() if own}, sort_keys=True)
    runs = []
    for seed in SEEDS if drawn else (None,):
        chosen = {n: {**k, "seed": seed} if n in drawn else k for n, k in parts.items()}
        chosen = {n: _plain(n, {**registry.get(n).knobs, **k}) for n, k in chosen.items()}
        runs.append(Run(method, ratio, seed, json.dumps(chosen, sort_keys=True), held))
    return runs


def _plain(method: str, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a file."""
    return MethodConfig(method, knobs=dict(knobs)).knobs


def _folder(method: str, place: Any) -> str:
    """
    Raises:
        ValueError: the method is none, is not trained, or the place is no folder with weights.
    """
    if not registry.get(method, WEIGHTS).trains:
        able = [spec.name for spec in registry.methods().values() if spec.trains]
        raise ValueError(f"weights of {method!r}: it is not trained; these are: {', '.join(able)}")
    if not isinstance(place, (str, PathLike)) or not (Path(place) / FILE).is_file():
        raise ValueError(f"weights={place!r} of {method!r}: name a folder that model.compression.save wrote")
    return str(place)


def _digest(method: str, knob: str, path: Any) -> str:
    """
    Raises:
        ValueError: there is no such file.
    """
    try:
        return "#" + hashlib.sha256((Path(path) / (FILE if knob == WEIGHTS else "")).read_bytes()).hexdigest()[:8]
    except (OSError, TypeError) as error:
        raise ValueError(f"{method}: {knob}={path!r} cannot be read ({error}); name a file that can") from error


def labels(runs: Iterable[Run]) -> dict[Run, str]:
    """Run -> the name of its row: its method, with the knobs in which parts of one name differ between the runs."""
    runs = list(runs)
    settings: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for part, own in _parts(run).items():
            settings.setdefault(part, []).append(own)
    return {run: "+".join(_label(part, own, settings[part]) for part, own in _parts(run).items()) for run in runs}


def _parts(run: Run) -> dict[str, dict[str, Any]]:
    """As it was named -> its setting, part by part."""
    if run.method == BARE:
        return {BARE: {}}
    written = (part.strip() for part in run.method.split("+"))
    return {part: run.setting.get(name, {}) for part, (name, _) in zip(written, split(run.method))}


def _label(part: str, own: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    differ = {k: str(v) for k, v in own.items() if any(other.get(k) != v for other in others)}
    # names are read by these separators
    short = {k: f"#{zlib.crc32(v.encode()):08x}" if set(v) & set("+:|=") else v for k, v in differ.items()}
    return ":".join([part, *(f"{k}={v}" for k, v in short.items())])
