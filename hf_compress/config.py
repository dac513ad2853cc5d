"""What was asked for, as plain data: JSON out, JSON in, no code."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Any

VERSION = 1


@dataclass
class MethodConfig:
    """One method with its budget and its own knobs."""

    method: str
    ratio: float | None = None
    keep: int | None = None
    knobs: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """A line that identifies it: `fastervlm(ratio=0.89)`."""
        size = [f"ratio={self.ratio:.6g}"] if self.ratio is not None else []
        size += [f"keep={self.keep}"] if self.keep is not None else []
        return f"{self.method}({', '.join([*size, *(f'{k}={v!r}' for k, v in sorted(self.knobs.items()))])})"


@dataclass
class CompressionConfig:
    """All methods of one compression, in stage order."""

    methods: list[MethodConfig]
    version: int = VERSION

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
        """The inverse of `to_dict`; keys of newer versions are ignored with a warning.

        Raises:
            ValueError: `methods` is missing or malformed.
        """
        entries = data.get("methods")
        if not isinstance(entries, list) or not all(isinstance(e, dict) and "method" in e for e in entries):
            raise ValueError(f"methods={entries!r} must be a list of objects with a key 'method'")
        known = {f.name for f in fields(MethodConfig)}
        unknown = sorted({k for e in entries for k in e} - known | set(data) - {f.name for f in fields(cls)})
        if unknown:
            warnings.warn(f"compression config: unknown keys {unknown} are ignored", stacklevel=2)
        return cls([MethodConfig(**{k: v for k, v in e.items() if k in known}) for e in entries])

    @classmethod
    def from_json(cls, text: str) -> CompressionConfig:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))
