"""Answers on disk, one line each: a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_compress.evaluate.processes import on_main
from hf_compress.saving import prepare, read_json, write_json, writing

ANSWERS, TIMES, REFUSED = "answers.jsonl", "times.jsonl", "refused.jsonl"
SETTINGS, LOCK = "settings.json", ".lock"


class Lines:
    """A JSONL file of records, each with a "run" and a "row" that identify it (one record per run without a row).

    Reading repairs a last line that was cut off while it was written. A record that is there twice counts once.

    Args:
        path: the file; made by the first record.
        writes: False keeps records in memory only, as all processes but the first one do.

    Attributes:
        found: run -> row -> record.
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes
        self.found: dict[str, dict[int, dict[str, Any]]] = {}
        for record in self._read() if writes else ():
            self.found.setdefault(record["run"], {}).setdefault(record.get("row", 0), record)

    def _read(self) -> list[dict[str, Any]]:
        """
        Raises:
            ValueError: a line other than the last one cannot be read.
        """
        if not self.path.is_file():
            return []
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            with writing(self.path):
                os.truncate(self.path, len(whole))
        out = []
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):  # text has more kinds of line ends than this one
            try:
                record = json.loads(line)
                if not isinstance(record["run"], str):
                    raise TypeError('"run" is no text')
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{self.path}, line {number} is damaged ({error}); delete the line and go on"
                ) from error
            out.append(record)
        return out

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Take in what is not there yet, and write it in one piece.

        Raises:
            ValueError: it cannot be written; the file is as it was then.
        """
        new: dict[tuple[str, int], dict[str, Any]] = {}
        for record in records:
            key = record["run"], record.get("row", 0)
            if key[1] not in self.found.get(key[0], {}):
                new.setdefault(key, record)
        if new and self.writes:
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in new.values())
            self._write(text.encode("utf-8", "surrogatepass"))  # json.loads reads it so
        for (run, row), record in new.items():
            self.found.setdefault(run, {})[row] = record

    def _write(self, data: bytes) -> None:
        before = self.path.stat().st_size if self.path.is_file() else 0
        with writing(self.path):
            try:
                with self.path.open("ab") as file:
                    file.write(data)
            except OSError:
                if self.path.is_file():
                    os.truncate(self.path, before)
                raise

    def lacking(self, run: str, rows: Iterable[int]) -> list[int]:
        """Which of the rows have no record of this run."""
        have = self.found.get(run, {})
        return [row for row in rows if row not in have]


def _answered(out: Path) -> bool:
    """Whether the folder holds an answer: a whole line."""
    path = out / ANSWERS
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline().endswith(b"\n")


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """The folder, made where it does not exist, with room in it, and held against other runs.

    Where the block fails before anything was answered, nothing of it stays behind.

    Raises:
        ValueError: `out` is a file or cannot be written to, or another run is at work in it.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        prepare(out)
        with _held(out):
            try:
                yield
            except BaseException:
                if not _answered(out):
                    for name in (SETTINGS, LOCK):
                        (out / name).unlink(missing_ok=True)
                raise
    except BaseException:
        for folder in made:  # the innermost first
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


@contextmanager
def _held(out: Path) -> Iterator[None]:
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"out={str(out)!r}: another run is at work in it; wait for its end, or name another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def open_folder(out: Path, settings: dict[str, Any]) -> None:
    """Begin the folder, or make sure that its answers were given under the same settings.

    Without an answer in it the folder is begun anew, whatever a run that failed has left there.

    Raises:
        ValueError: they were not, what they were is lost, or `out` is no folder that can be written to.
    """
    path = out / SETTINGS
    if not _answered(out):
        prepare(out)
        for name in (TIMES, REFUSED):
            (out / name).unlink(missing_ok=True)
        write_json(path, settings)
        return
    if not path.exists():
        raise ValueError(f"out={str(out)!r} holds answers but no {SETTINGS}; name another folder")
    before = read_json(path, "what the answers beside it were given with is lost: name another folder")
    settings = json.loads(json.dumps(settings))
    changed = [k for k in {**before, **settings} if before.get(k) != settings.get(k)]
    if changed:
        what = ", ".join(f"{k}={before.get(k)!r} (now {settings.get(k)!r})" for k in changed)
        raise ValueError(f"out={str(out)!r} holds answers given with {what}; name another folder for another setting")


@dataclass
class Records:
    """What the folder of a sweep holds.

    Attributes:
        answers: one record for every run and question.
        times: one for every run that was timed.
        reasons: one for every run that was refused.
    """

    answers: Lines
    times: Lines
    reasons: Lines

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any], state: Any) -> Records:
        """Go on with a folder or begin it; all processes have the same records, the first one writes.

        Raises:
            ValueError: it holds answers given under other settings.
        """
        on_main(state, lambda: open_folder(folder, settings))
        files = [Lines(folder / name, state.is_main_process) for name in (ANSWERS, TIMES, REFUSED)]
        for file in files:
            file.found = on_main(state, lambda file=file: file.found)  # type: ignore[misc]
        return cls(*files)

    @property
    def refused(self) -> dict[str, str]:
        """Run -> why it was refused."""
        return {run: rows[0]["reason"] for run, rows in self.reasons.found.items()}
