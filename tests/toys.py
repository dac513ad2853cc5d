"""Methods that show one mechanism each, for tests; known to the registry only inside `toy`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from hf_compress import registry


@contextlib.contextmanager
def toy(cls: type, stage: str, needs: Iterable[str] = ()) -> Iterator[str]:
    """The method `cls` under the name "toy" inside the block."""
    before = dict(registry._METHODS) if registry.methods() else {}
    cls.__doc__ = cls.__doc__ or "A toy."
    registry.register("toy", stage=stage, paper="control", needs=needs)(cls)
    try:
        yield "toy"
    finally:
        registry._METHODS.clear()
        registry._METHODS.update(before)
