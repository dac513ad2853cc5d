"""Toy methods: registered for the length of a test, so that what ranges over all methods does not meet them."""

from __future__ import annotations

import contextlib

import pytest

from hf_compress import registry


@contextlib.contextmanager
def registered(*classes, stage="vision", needs=("visual",)):
    """Methods under the names of their classes in lower case; yields the names."""
    registry.methods()  # the real ones first, which register themselves once only
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_METHODS", dict(registry._METHODS))
        for cls in classes:
            registry.register(cls.__name__.lower(), stage=stage, paper="control", needs=needs)(cls)
        yield [cls.__name__.lower() for cls in classes]
