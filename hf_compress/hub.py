"""Files of a folder, or of a repository of the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLACE = ("subfolder", "revision", "token", "cache_dir", "local_files_only")  # arguments that say where a file lies


def find(folder: Any, name: str, arguments: Mapping[str, Any]) -> Path | None:
    """The file of that name, fetched where the folder is a repository; None: there is none.

    Args:
        arguments: of whoever loads from there, `PLACE` among them.
    """
    from transformers.utils.hub import cached_file

    if folder is None:
        return None
    found = cached_file(
        os.fspath(folder),
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **{key: arguments[key] for key in PLACE if arguments.get(key) is not None},
    )
    return None if found is None else Path(found)
