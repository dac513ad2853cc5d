"""What is asked: questions with answers, about images or texts, from the built-in data, local files or a hub."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from hf_compress import pictures
from hf_compress.evaluate import cells
from hf_compress.evaluate.files import FILES, Table, read_files, read_folder, read_hub, read_table

# Names that columns go by, the first one found counts.
COLUMNS = {
    "image": ("image", "images", "picture"),
    "video": ("video", "frames"),
    "context": ("context", "passage", "document"),
    "question": ("question", "query"),
    "answers": ("answers", "answer", "label"),
    "type": ("type", "question_type", "kind", "category"),
    "group": ("image_id", "video_id", "context_id", "group"),
}
SHOWN = ("image", "video", "context")  # the roles of what is asked about; the first one found counts
# Question types of the scenes -> what they ask for; a type that is not listed stands for itself.
SCENES = {
    "digit_at": "reading a digit",
    "list": "reading all digits",
    "shape_at": "shape",
    "color_at": "colour",
    "color_of": "colour",
    "what_at": "object",
    "where": "place",
    "count": "counting",
    "exist": "presence",
    "extreme": "comparison",
}
# built in; asked without a limit
QUESTIONS = {"demo:scenes": 400, "demo:scenes:mixed": 400, "demo:recall": 260, "demo:facts": 260, "demo:clips": 400}
ON_ERROR = ("raise", "skip")


@dataclass
class Task:
    """Questions with their references, one row each.

    Attributes:
        name: for tables and records.
        questions: one per row.
        answers: per row, all references that count as right.
        types: per row, what kind of question it is; "" where the data does not say.
        groups: per row, the image, video or text it is about: drawn together in a bootstrap.
        video, image, context: the columns that hold what is asked about; exactly one of them is set.
        fingerprint: changes with the rows, the content of images and texts included.
        skipped: per row that was left out, where it stands and why.
        places: per row, where it stands: file and number.
        about: row -> what it asks about.
    """

    name: str
    questions: list[str]
    answers: list[list[str]]
    types: list[str]
    groups: list[str]
    video: str | None
    image: str | None
    context: str | None
    fingerprint: str
    skipped: list[str]
    places: list[str]
    about: Callable[[int], Any]

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def modality(self) -> str:
        """What is asked about: "video", "image" or "text"."""
        return "video" if self.video else "image" if self.image else "text"

    def shown(self, rows: Sequence[int]) -> list[Any]:
        """What these rows ask about: a text, an image (PIL, RGB, as a person sees it), a list of several images, or the
        `Frames` of a video."""
        return [self.about(row) for row in rows]


def load_task(
    data: Any, limit: int | None = None, split: str = "test", name: str | None = None, on_error: str = "raise"
) -> Task:
    """Questions from a name, a path, or a table in memory.

    Everything that is asked or compared is text as it stands in the file. Relative paths of images start where the file
    lies that names them. Every row is looked at before anything is asked.

    Args:
        data: "demo:scenes" (112 x 112 pixels), "demo:scenes:mixed" (the same, every scene at a resolution of its own),
            "demo:recall", "demo:facts" (in running text), "demo:clips" (videos of 16 frames); a parquet, jsonl, json or
            csv file; a folder (images with metadata.jsonl, data files, or what `save_to_disk` wrote); NAME or
            NAME:CONFIG on a hub; a
            `datasets.Dataset`, a `pandas.DataFrame` or a `pyarrow.Table`. Columns: image (or several in a list), video
            or frames (a list of them) or context, question, answer or answers; optional type, and image_id, video_id or
            context_id.
        limit: the first so many rows; None: all of them (of built-in data: 400 about scenes or clips, 260 facts).
        split: of data that has several.
        name: for tables; by default what `data` says.
        on_error: what becomes of a row with an empty cell or an image that is absent or damaged. "raise": an error
            names its file, row and column; "skip": it is left out, with a warning that says so.

    Raises:
        ValueError: a column is missing, there is no such data, a row is bad, or nothing is left.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}; choose 1 or more")
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error={on_error!r} is not one of {', '.join(ON_ERROR)}")
    title = name or (str(data) if isinstance(data, (str, Path)) else getattr(data, "builder_name", None) or "data")
    table = _load(str(data), limit, split) if isinstance(data, (str, Path)) else read_table(data)
    if limit is not None:
        table = table.first(limit)
    if not len(table):
        raise ValueError(f"data={title!r} has no rows")
    return _task(title, table, on_error)


def _load(name: str, limit: int | None, split: str) -> Table:
    from datasets.exceptions import DatasetsError

    if name in QUESTIONS:
        return read_table(_built_in(name, limit or QUESTIONS[name], split))
    if name.startswith("demo:"):
        raise ValueError(f"data={name!r} is not built in; there are: {', '.join(QUESTIONS)}")
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".")):
        raise ValueError(f"data={name!r}: there is no such file or folder")
    kind = FILES.get(path.suffix.lower())
    if path.is_file() and kind is None:
        raise ValueError(f"data={name!r}: cannot read {path.suffix!r}; pass one of {', '.join(FILES)}, or a folder")
    try:
        if path.is_file():
            return read_files([(name, path)], str(kind))
        return read_folder(path, split) if path.is_dir() else read_hub(name, split)
    except (OSError, RuntimeError, DatasetsError) as error:
        why = "cannot be read" if path.exists() else "is no file or folder here, and not within reach on a hub"
        raise ValueError(
            f"data={name!r} {why} ({error}); pass {', '.join(QUESTIONS)}, a file ({', '.join(FILES)}), a folder, or, "
            "online, the NAME or NAME:CONFIG of a data set on a hub"
        ) from error


def _built_in(name: str, questions: int, split: str) -> Any:
    if name.startswith("demo:scenes"):
        from hf_compress.demo.dataset import load_scenes

        return load_scenes(split, images=math.ceil(questions / 4), questions=4, mixed=name.endswith(":mixed"))
    if name == "demo:clips":
        from hf_compress.demo.clip_dataset import load_clips

        return load_clips(split, clips=math.ceil(questions / 4), questions=4)
    if name == "demo:facts":
        from hf_compress.demo.facts_data import load_facts

        return load_facts(split, contexts=math.ceil(questions / 5))
    from hf_compress.demo.recall_data import load_recall

    return load_recall(split, contexts=math.ceil(questions / 5))


def _columns(name: str, table: Table) -> dict[str, str]:
    """Role -> column.

    Raises:
        ValueError: one is missing.
    """
    found = {role: next((n for n in names if n in table.names), "") for role, names in COLUMNS.items()}
    for role in ("question", "answers"):
        if not found[role]:
            raise ValueError(f"data={name!r} has no column {' or '.join(COLUMNS[role])}; it has {table.names}")
    shown = next((role for role in SHOWN if found[role]), None)
    if shown is None:
        wanted = " or ".join(name for role in SHOWN for name in COLUMNS[role])
        raise ValueError(f"data={name!r} has no column {wanted} to ask about; it has {table.names}")
    found |= {role: "" for role in SHOWN if role != shown}
    return {role: column for role, column in found.items() if column}


class _Check:
    """The cells of a table by role, and the rows where one of them is bad."""

    def __init__(self, name: str, table: Table, on_error: str) -> None:
        self.name, self.table, self.on_error = name, table, on_error
        self.bad: dict[int, str] = {}

    def place(self, row: int) -> str:
        """File and number of a row."""
        file, number = self.table.origin(row)
        return f"{f'file {file!r}' if file else f'data={self.name!r}'}, row {number}"

    def each(self, column: str, found: Sequence[Any], read: Callable[[Any, int], Any]) -> list[Any]:
        """What `read` makes of every cell of a column; None where it cannot.

        Raises:
            ValueError: it cannot, and bad rows are not left out.
        """
        out = []
        for row, cell in enumerate(found):
            try:
                out.append(read(cell, row))
            except ValueError as error:
                out.append(None)
                where = f"{self.place(row)}, column {column!r}"
                if self.on_error == "raise":
                    raise ValueError(
                        f"{where}: {error}. Rows count from 1 without the header; on_error='skip' leaves such rows out"
                    ) from error
                self.bad.setdefault(row, f"{where}: {error}")
        return out


def _task(name: str, table: Table, on_error: str) -> Task:
    roles = _columns(name, table)
    check = _Check(name, table, on_error)

    def texts(role: str, read: Callable[[Any], Any]) -> list[Any]:
        return check.each(roles[role], table.column(roles[role]), lambda cell, row: read(cell))

    questions, answers = texts("question", cells.text), texts("answers", cells.references)
    kinds = texts("type", _kind) if "type" in roles else [""] * len(table)
    if name.startswith("demo:scenes"):
        kinds = [SCENES.get(kind, kind) for kind in kinds]
    named = texts("group", cells.text) if "group" in roles else None
    about: Callable[[int], Any]
    column = roles.get("video") or roles.get("image")
    if column:
        found = table.pictures(column)
        about = partial(_video if "video" in roles else _picture, found, table)
        digests = check.each(column, found, partial(_verified, table, set()))
    else:
        contexts = texts("context", cells.text)
        about = contexts.__getitem__
        digests = [context and _digest(context.encode()) for context in contexts]
    rows = [row for row in range(len(table)) if row not in check.bad]
    if not rows:
        raise ValueError(f"data={name!r} has no row that can be asked; the first: {check.bad[0]}")
    if check.bad:
        first = "; ".join([check.bad[row] for row in sorted(check.bad)][:3])
        warnings.warn(f"data={name!r}: {len(check.bad)} of {len(table)} rows are left out: {first}", stacklevel=3)
    parts = (questions, answers, kinds, named or digests, digests)
    questions, answers, kinds, groups, digests = ([part[row] for row in rows] for part in parts)
    return Task(
        name,
        questions,
        answers,
        kinds,
        groups,
        video=roles.get("video"),
        image=roles.get("image"),
        context=roles.get("context"),
        fingerprint=_digest(repr((questions, answers, kinds, groups, digests)).encode()),
        skipped=[check.bad[row] for row in sorted(check.bad)],
        places=[check.place(row) for row in rows],
        about=lambda row: about(rows[row]),
    )


def _kind(cell: Any) -> str:
    """Questions need not be of any kind."""
    try:
        return cells.text(cell)
    except ValueError:
        return ""


def _contents(table: Table, cell: Any, row: int) -> list[bytes]:
    """The encoded images of a row.

    Raises:
        ValueError: there are none, or one cannot be read.
    """
    file, _ = table.origin(row)
    folder = None if file is None else file.rpartition("/")[0] if "://" in file else str(PurePath(file).parent)
    several = list(cell) if isinstance(cell, (list, tuple)) else [cell]
    if not several:
        raise ValueError("the list of images is empty")
    return [pictures.content(one, folder) for one in several]


def _verified(table: Table, seen: set[str], cell: Any, row: int) -> str:
    """A digest of the images of a row, each of which has been decoded once."""
    parts = []
    for raw in _contents(table, cell, row):
        parts.append(_digest(raw))
        if parts[-1] not in seen:
            pictures.decode(raw)
            seen.add(parts[-1])
    return parts[0] if len(parts) == 1 else _digest(" ".join(parts).encode())


def _picture(found: Sequence[Any], table: Table, row: int) -> Any:
    images = [pictures.decode(raw) for raw in _contents(table, found[row], row)]
    return images[0] if len(images) == 1 else images


def _video(found: Sequence[Any], table: Table, row: int) -> pictures.Frames:
    return pictures.Frames(pictures.decode(raw) for raw in _contents(table, found[row], row))


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]
