"""Files that are written whole or not at all, in folders that are known to take them before the work begins."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

ROOM = 1 << 16  # bytes that have to fit into a folder before anything is loaded


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What keeps a file from being written, such as a full disk or a folder that is read only, as one line.

    Raises:
        ValueError: an OSError came up.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"{str(path)!r} cannot be written ({why}); make room there, or name another folder") from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A new file beside `path`, to be written in the block; it takes its place at the end: whole, or not at all.

    A link stays one; what is no file, such as /dev/stdout, is written itself.

    Raises:
        ValueError: it cannot be written.
    """
    real = path.resolve()
    new = real.with_name(f".new-{real.name}")
    with writing(path):
        if real.exists() and not real.is_file():
            yield real
            return
        try:
            yield new
            with new.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(new, real)
        finally:
            with suppress(OSError):  # the one that came up in the block is told
                new.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """JSON, whole or not at all.

    Raises:
        ValueError: it cannot be written.
    """
    with replaced(path) as new:
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a file.

    Args:
        remedy: what to do where there is none.

    Raises:
        ValueError: the file holds something else, or a part of it only.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} is damaged (it holds {type(found).__name__}, no object); {remedy}")
    return found


def prepare(out: Path, name: str = "out") -> None:
    """Make the folder where it does not exist, and write into it, so that what is wrong is told before the work.

    Args:
        name: of the argument that it came from.

    Raises:
        ValueError: it is a file, or there is no room or no right to write.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{name}={str(out)!r} is a file; name a folder")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out) as probe:
            probe.write(bytes(ROOM))
            probe.flush()
            os.fsync(probe.fileno())
