"""Answers on disk, one line each: a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list


class Lines:
    """A JSONL file of records, each with a "run" and an "row" that identify it (one record per run without a row).

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
            self._add(record)

    def _read(self) -> list[dict[str, Any]]:
        """
        Raises:
            ValueError: a line other than the last one cannot be read.
        """
        if not self.path.exists():
            return []
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        out = []
        for number, line in enumerate(whole.decode().splitlines(), 1):
            try:
                out.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{self.path}, line {number} is damaged ({error}); delete the line and go on"
                ) from error
        return out

    def _add(self, record: dict[str, Any]) -> bool:
        rows = self.found.setdefault(record["run"], {})
        new = record.get("row", 0) not in rows
        if new:
            rows[record.get("row", 0)] = record
        return new

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Take in what is not there yet, and write it in one piece."""
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records if self._add(r))
        if text and self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)

    def lacking(self, run: str, rows: Iterable[int]) -> list[int]:
        """Which of the rows have no record of this run."""
        have = self.found.get(run, {})
        return [row for row in rows if row not in have]


def open_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or make sure that its answers were given under the same settings.

    Raises:
        ValueError: they were not, or `out` is not a folder of a sweep.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file; name a folder")
    path = out / "settings.json"
    if not path.exists():
        if (out / "answers.jsonl").exists():
            raise ValueError(f"out={str(out)!r} holds answers but no settings.json; name another folder")
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
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
        """Go on with a folder or begin it; all processes have the same answers, the first one writes.

        Raises:
            ValueError: it holds answers given under other settings.
        """
        if state.is_main_process:
            open_folder(folder, settings)
        state.wait_for_everyone()
        files = (Lines(folder / f"{name}.jsonl", state.is_main_process) for name in ("answers", "times", "refused"))
        records = cls(*files)
        if state.num_processes > 1:
            box = [records.answers.found]
            broadcast_object_list(box)
            records.answers.found = box[0]
        return records

    @property
    def refused(self) -> dict[str, str]:
        """Run -> why it was refused."""
        return {run: rows[0]["reason"] for run, rows in self.reasons.found.items()}
