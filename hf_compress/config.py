"""What was asked for, as plain data: JSON out, JSON in, no code."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
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

    def summary(self) -> str:
        """A line that identifies it: `fastervlm(ratio=0.89)`."""
        ratio = f"{self.ratio:.6g}" if isinstance(self.ratio, float) else str(self.ratio)
        size = [f"ratio={ratio}"] if self.ratio is not None else []
        size += [f"keep={self.keep}"] if self.keep is not None else []
        return f"{self.method}({', '.join([*size, *(f'{k}={v!r}' for k, v in sorted(self.knobs.items()))])})"


@dataclass
class CompressionConfig:
    """All methods of one compression, in stage order.

    Raises:
        ValueError: `methods` is no list of `MethodConfig`, or `version` is later than this package knows.
    """

    methods: list[MethodConfig]
    version: int = VERSION

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
        return asdict(self)

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
        )
        if unknown:
            names = sorted(map(str, unknown))
            warnings.warn(f"compression config: unknown keys {names} are ignored", stacklevel=2)
        return config

    @classmethod
    def from_json(cls, text: str) -> CompressionConfig:
        """The inverse of `to_json`; raises ValueError as `from_dict`, and where the text is not JSON."""
        return cls.from_dict(json.loads(text))
