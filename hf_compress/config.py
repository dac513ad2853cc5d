"""What was asked for, as plain data: JSON out, JSON in, no code."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy

VERSION = 1


def plain(value: Any) -> Any:
    """Numbers, arrays and tensors of numpy and torch as Python's own; fractions as numbers, paths as text.

    A number of few bits is what it is written as: float32(0.89) is 0.89.
    """
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, range)) or bool(getattr(value, "ndim", False)):
        items = [plain(one) for one in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Fraction):
        return float(value)
    if not hasattr(value, "ndim"):
        return value
    number, kind = value.item(), str(value.dtype).rpartition(".")[2]
    short = {"float16": numpy.float16, "float32": numpy.float32, "bfloat16": numpy.float32}.get(kind)
    return number if short is None else float(str(short(number)))


UNITS = {"rows": "decoder", "entries": "cache"}  # and the stage whose methods take them


@dataclass(frozen=True)
class Schedule:
    """A budget layer by layer, as a search finds it.

    Attributes:
        levels: one integer per decoder layer. Of "rows" those that go through the layer, of every image (of a method
            that removes other rows: of every sample), where there are so many. Of "entries" those that every head of
            the layer keeps of a prompt, where it is so long; 0 of layers with a sliding window, which are bounded
            already.
        unit: "rows" or "entries".

    Raises:
        ValueError: `levels` are no integers of at least 0, or `unit` is none of those.
    """

    levels: tuple[int, ...]
    unit: str

    def __post_init__(self) -> None:
        levels = plain(self.levels)
        if not isinstance(levels, (list, tuple)) or not levels:
            raise ValueError(f"levels={self.levels!r} of a schedule must be one integer per decoder layer")
        for level in levels:
            if isinstance(level, bool) or not isinstance(level, int) or level < 0:
                raise ValueError(f"levels={levels} of a schedule: {level!r} must be an integer of at least 0")
        if self.unit not in UNITS:
            raise ValueError(f"unit={self.unit!r} of a schedule must be one of {tuple(UNITS)}")
        object.__setattr__(self, "levels", tuple(levels))

    @property
    def stage(self) -> str:
        """Whose methods take it."""
        return UNITS[self.unit]

    def __str__(self) -> str:
        return f"{self.unit}={list(self.levels)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"levels": list(self.levels), "unit": self.unit}

    @classmethod
    def of(cls, value: Schedule | Mapping[str, Any] | str | os.PathLike[str]) -> Schedule:
        """A schedule as it is, from its `to_dict`, or from a JSON file that holds that.

        Raises:
            ValueError: it is something else, or the file is not there or is damaged.
        """
        if isinstance(value, Schedule):
            return value
        if isinstance(value, (str, os.PathLike)):
            path = os.fspath(value)
            try:
                value = json.loads(Path(path).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ValueError(f"schedule={path!r} must be a JSON file of a schedule: {error}") from error
        if not isinstance(value, Mapping) or set(value) != {"levels", "unit"}:
            raise ValueError(
                f"schedule={value!r} must be a Schedule, a dict of its levels and unit, or a JSON file of one"
            )
        return cls(value["levels"], value["unit"])


@dataclass
class MethodConfig:
    """One method with its budget and its own knobs.

    Raises:
        ValueError: an attribute is of the wrong type, or is nothing that JSON can hold.
    """

    method: str
    ratio: float | str | None = None
    keep: int | None = None
    knobs: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise ValueError(f"method={self.method!r} must be the name of a method")
        self.ratio, self.keep, knobs = plain(self.ratio), plain(self.keep), plain(self.knobs)
        if not isinstance(knobs, dict) or not all(isinstance(name, str) for name in knobs):
            raise ValueError(f"method={self.method!r}: knobs={self.knobs!r} must be a dict of arguments by name")
        for name, value in knobs.items():
            try:
                knobs[name] = json.loads(json.dumps(value))  # as it comes back from a file: lists, no tuples
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}={value!r} of method={self.method!r} is not plain data: {error}") from error
        self.knobs = knobs
        self.schedule = None if self.schedule is None else Schedule.of(self.schedule)

    def summary(self) -> str:
        """A line that identifies it: `fastervlm(ratio=0.89)`."""
        ratio = f"{self.ratio:.6g}" if isinstance(self.ratio, float) else str(self.ratio)
        size = [f"ratio={ratio}"] if self.ratio is not None else []
        size += [f"keep={self.keep}"] if self.keep is not None else []
        size += [str(self.schedule)] if self.schedule is not None else []
        return f"{self.method}({', '.join([*size, *(f'{k}={v!r}' for k, v in sorted(self.knobs.items()))])})"


@dataclass
class CompressionConfig:
    """All methods of one compression, in stage order, and how it is trained.

    Attributes:
        trainable, distill: as of `compress`; a `Distill` as its two numbers by name.

    Raises:
        ValueError: `methods` is no list of `MethodConfig`, or `version` is later than this package knows.
    """

    methods: list[MethodConfig]
    version: int = VERSION
    trainable: str | None = None
    distill: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.methods, (list, tuple)) or not all(isinstance(m, MethodConfig) for m in self.methods):
            raise ValueError(f"methods={self.methods!r} must be a list of MethodConfig")
        self.methods, version = list(self.methods), self.version
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ValueError(f"version={version!r} of a compression config must be an integer of at least 1")
        if version > VERSION:
            raise ValueError(
                f"version={version}: the compression config was written by a later hf-compress; this one reads "
                f"versions up to {VERSION}. Upgrade hf-compress, or load the model bare with compression_config=False"
            )

    def summary(self) -> str:
        """All methods on one line."""
        return " + ".join(m.summary() for m in self.methods)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        entries = [{**asdict(m), "schedule": m.schedule and m.schedule.to_dict()} for m in self.methods]
        for entry in entries:
            if entry["schedule"] is None:
                del entry["schedule"]
        trained = {"trainable": self.trainable, "distill": self.distill}
        return {"methods": entries, "version": self.version, **{k: v for k, v in trained.items() if v is not None}}

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CompressionConfig:
        """The inverse of `to_dict`; unknown keys are ignored with a warning.

        Raises:
            ValueError: `methods` is missing or malformed, or the version is later than this package knows.
        """
        entries = data.get("methods") if isinstance(data, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) and "method" in e for e in entries):
            raise ValueError(
                f"methods={entries!r} must be a list of objects with a key 'method' in the compression config {data!r}"
            )
        known = {f.name for f in fields(MethodConfig)}
        unknown = {k for e in entries for k in e} - known | set(data) - {f.name for f in fields(cls)}
        config = cls(
            [MethodConfig(**{k: v for k, v in e.items() if k in known}) for e in entries],
            data.get("version", VERSION),
            data.get("trainable"),
            data.get("distill"),
        )
        if unknown:
            names = sorted(map(str, unknown))
            warnings.warn(f"compression config: unknown keys {names} are ignored", stacklevel=2)
        return config

    @classmethod
    def from_json(cls, text: str) -> CompressionConfig:
        """The inverse of `to_json`; raises ValueError as `from_dict`, and where the text is not JSON."""
        return cls.from_dict(json.loads(text))
