"""What is asked: questions with answers, about images or texts, from the built-in data, local files or a hub."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Names that columns go by, the first one found counts.
COLUMNS = {
    "image": ("image", "images", "picture"),
    "context": ("context", "passage", "document"),
    "question": ("question", "query"),
    "answers": ("answers", "answer", "label"),
    "type": ("type", "question_type", "kind", "category"),
    "group": ("image_id", "context_id", "group"),
}
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
QUESTIONS = {"demo:scenes": 400, "demo:scenes:mixed": 400, "demo:recall": 260}  # built in; asked without a limit
FILES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


@dataclass
class Task:
    """Questions with their references, one row each.

    Attributes:
        name: for tables and records.
        data: `datasets.Dataset` behind it; images are read from it when they are needed.
        questions: one per row.
        answers: per row, all references that count as right.
        types: per row, what kind of question it is; "" where the data does not say.
        groups: per row, the image or text it is about: drawn together in a bootstrap.
        image, context: the columns that hold what is asked about; exactly one of them is set.
        fingerprint: changes with the rows, the content of images and texts included.
    """

    name: str
    data: Any
    questions: list[str]
    answers: list[list[str]]
    types: list[str]
    groups: list[str]
    image: str | None
    context: str | None
    fingerprint: str = field(default="")

    def __len__(self) -> int:
        return len(self.questions)

    def shown(self, rows: Sequence[int]) -> list[Any]:
        """The images (PIL, RGB) or texts that these rows ask about."""
        column = self.image or self.context
        found = self.data.select(list(rows))[column]
        if self.image is None:
            return list(found)
        return [_single(image).convert("RGB") for image in found]


def _single(image: Any) -> Any:
    """
    Raises:
        ValueError: a list of images that does not hold exactly one.
    """
    if not isinstance(image, list):
        return image
    if len(image) != 1:
        raise ValueError(f"a question shows {len(image)} images; questions about one image each can be asked here")
    return image[0]


def load_task(data: Any, limit: int | None = None, split: str = "test", name: str | None = None) -> Task:
    """Questions from a name, a path, or a dataset.

    Args:
        data: "demo:scenes" (112 x 112 pixels), "demo:scenes:mixed" (the same, every scene at a resolution of its own),
            "demo:recall"; a parquet, jsonl, json or csv file; a folder (images with metadata.jsonl, data files, or what
            `save_to_disk` wrote); NAME or NAME:CONFIG on a hub; or a `datasets.Dataset`. Columns: image or context,
            question, answer or answers; optional type, and image_id or context_id.
        limit: the first so many questions; None: all of them (of built-in data: 400 about scenes, 260 facts).
        split: of data that has several.
        name: for tables; by default what `data` says.

    Raises:
        ValueError: a column is missing, there is no such data, or nothing is left of it.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}; choose 1 or more")
    title = name or (data if isinstance(data, str) else None)
    if isinstance(data, (str, Path)):
        data = _load(str(data), limit, split)
    if not hasattr(data, "column_names") or isinstance(data.column_names, dict):
        raise ValueError(f"data={type(data).__name__}: pass a datasets.Dataset (one split), a path or a name")
    if limit is not None:
        data = data.select(range(min(limit, len(data))))
    if not len(data):
        raise ValueError(f"data={title!r} has no rows")
    return _task(title or f"{data.builder_name or 'data'}", data)


def _load(name: str, limit: int | None, split: str) -> Any:
    from datasets.exceptions import DatasetsError

    if name in QUESTIONS:
        return _built_in(name, limit or QUESTIONS[name], split)
    if name.startswith("demo:"):
        raise ValueError(f"data={name!r} is not built in; there are: {', '.join(QUESTIONS)}")
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".")):
        raise ValueError(f"data={name!r}: there is no such file or folder")
    if path.is_file() and path.suffix not in FILES:
        raise ValueError(f"data={name!r}: cannot read {path.suffix!r}; pass one of {', '.join(FILES)}, or a folder")
    try:
        return _file(path) if path.is_file() else _folder(path, split) if path.is_dir() else _hub(name, split)
    except (OSError, RuntimeError, DatasetsError) as error:
        why = "cannot be read" if path.exists() else "is no file or folder here, and not within reach on a hub"
        raise ValueError(
            f"data={name!r} {why} ({error}); pass {', '.join(QUESTIONS)}, a file ({', '.join(FILES)}), a folder, or, "
            "online, the NAME or NAME:CONFIG of a data set on a hub"
        ) from error


def _file(path: Path) -> Any:
    import datasets

    found = datasets.load_dataset(FILES[path.suffix], data_files=str(path), split="train")
    return _resolve(found, path.parent)


def _folder(path: Path, split: str) -> Any:
    import datasets

    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        loaded = datasets.load_from_disk(str(path))
        return _pick(loaded, split, path) if isinstance(loaded, dict) else loaded
    kind = "imagefolder" if any(path.rglob("metadata.*")) else None
    loaded = datasets.load_dataset(kind, data_dir=str(path)) if kind else datasets.load_dataset(str(path))
    return _pick(loaded, split, path)


def _hub(name: str, split: str) -> Any:
    import datasets

    hub, _, config = name.partition(":")
    return datasets.load_dataset(hub, config or None, split=split)


def _built_in(name: str, questions: int, split: str) -> Any:
    if name.startswith("demo:scenes"):
        from hf_compress.demo.dataset import load_scenes

        return load_scenes(split, images=math.ceil(questions / 4), questions=4, mixed=name.endswith(":mixed"))
    from hf_compress.demo.recall_data import load_recall

    return load_recall(split, contexts=math.ceil(questions / 5))


def _pick(loaded: Any, split: str, path: Path) -> Any:
    """The wanted split, or the only one there is."""
    if split in loaded:
        return loaded[split]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise ValueError(f"split={split!r} is not in {str(path)!r}; there are: {', '.join(loaded)}")


def _resolve(data: Any, folder: Path) -> Any:
    """Paths of images that are relative to the file that names them."""
    column = _column(data, "image")
    if column is None or getattr(data.features[column], "dtype", None) != "string":
        return data
    return data.map(lambda row: {column: str(folder / row[column])})


def _column(data: Any, role: str) -> str | None:
    return next((name for name in COLUMNS[role] if name in data.column_names), None)


def _task(name: str, data: Any) -> Task:
    import datasets

    found = {role: _column(data, role) for role in COLUMNS}
    for role in ("question", "answers"):
        if found[role] is None:
            raise ValueError(f"data={name!r} has no column {' or '.join(COLUMNS[role])}; it has {data.column_names}")
    image, context = found["image"], found["context"]
    if image is None and context is None:
        wanted = " or ".join(COLUMNS["image"] + COLUMNS["context"])
        raise ValueError(f"data={name!r} has no column {wanted} to ask about; it has {data.column_names}")
    column = str(image or context)
    if image is not None and not isinstance(data.features[image], (datasets.Image, datasets.List)):
        data = data.cast_column(image, datasets.Image())
    small = data.select_columns([c for role, c in found.items() if c and role not in ("image", "context")])
    types = small[found["type"]] if found["type"] else [""] * len(data)
    digests = _digests(data, column)
    groups = small[found["group"]] if found["group"] else digests
    return Task(
        name,
        data,
        questions=[str(q) for q in small[found["question"]]],
        answers=[_references(a) for a in small[found["answers"]]],
        types=[SCENES.get(str(kind), str(kind)) for kind in types],
        groups=[str(g) for g in groups],
        image=image,
        context=None if image is not None else context,
        fingerprint=_fingerprint(small, digests),
    )


def _references(value: Any) -> list[str]:
    """One answer, a list of them, of VQA records ({"answer": ...}), or the answers of SQuAD ({"text": [...]})."""
    if isinstance(value, dict):
        value = value["text"] if "text" in value else value["answer"]
    items = value if isinstance(value, (list, tuple)) else [value]
    return [str(item["answer"] if isinstance(item, dict) else item) for item in items]


def _digests(data: Any, column: str) -> list[str]:
    """Equal for rows that show the same image or text, wherever it is stored."""
    out = []
    for batch in data.select_columns([column]).with_format("arrow").iter(batch_size=64):
        out += [hashlib.sha256(_content(value)).hexdigest()[:16] for value in batch[column].to_pylist()]
    return out


def _content(value: Any) -> bytes:
    """What a cell shows, undecoded: of an image the bytes of its file, which may lie beside the data."""
    if isinstance(value, list):
        return b"".join(hashlib.sha256(_content(item)).digest() for item in value)
    if not isinstance(value, dict) or "path" not in value:
        return str(value).encode()
    if value["bytes"] is not None:
        return bytes(value["bytes"])
    from datasets.utils.file_utils import xopen  # also reads inside archives and on a hub

    try:
        with xopen(value["path"], "rb") as file:
            return bytes(file.read())
    except (OSError, TypeError):  # there is nothing to show; who asks about this row is told so
        return str(value["path"]).encode()


def _fingerprint(small: Any, shown: Sequence[str]) -> str:
    digest = hashlib.sha256(repr(list(shown)).encode())
    for row in small:
        digest.update(repr(sorted(row.items())).encode())
    return digest.hexdigest()[:16]
