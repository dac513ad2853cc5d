"""Tables as they stand: files, folders, data sets of `datasets` and frames of pandas, before anything is guessed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from hf_compress.evaluate.cells import plain

FILES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
Records = list[dict[str, Any]]


@dataclass
class Table:
    """Rows by column, and where they come from.

    Attributes:
        cells: column -> cells as they stand, where `data` is None.
        data: the `datasets.Dataset` that holds the cells otherwise.
        files: (file, rows of it), in the order of the rows; empty where they are of no file.
    """

    cells: dict[str, list[Any]] = field(default_factory=dict)
    data: Any = None
    files: list[tuple[str, int]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The columns."""
        return list(self.cells) if self.data is None else list(self.data.column_names)

    def __len__(self) -> int:
        return len(next(iter(self.cells.values()), ())) if self.data is None else len(self.data)

    def column(self, name: str) -> list[Any]:
        """Its cells, classes by their names."""
        if self.data is None:
            return self.cells[name]
        feature = self.data.features[name]
        return [plain(value, feature) for value in self.data[name]]

    def pictures(self, name: str) -> Sequence[Any]:
        """Its cells, not decoded: paths, bytes, {"bytes", "path"}, or lists of them."""
        if self.data is None:
            return self.cells[name]
        import datasets

        feature, raw = self.data.features[name], datasets.Image(decode=False)
        if isinstance(feature, datasets.Image):
            return self.data.cast_column(name, raw)[name]  # type: ignore[no-any-return]
        if isinstance(getattr(feature, "feature", None), datasets.Image):
            return self.data.cast_column(name, datasets.List(raw))[name]  # type: ignore[no-any-return]
        return self.data[name]  # type: ignore[no-any-return]

    def origin(self, row: int) -> tuple[str | None, int]:
        """(file, number of the row in it, from 1 and without a header); None: of no file."""
        for file, rows in self.files:
            if row < rows:
                return file, row + 1
            row -= rows
        return None, row + 1

    def first(self, rows: int) -> Table:
        """The first so many rows."""
        data = None if self.data is None else self.data.select(range(min(rows, len(self))))
        return Table({name: column[:rows] for name, column in self.cells.items()}, data, self.files)


def read_table(data: Any) -> Table:
    """What is in memory: a `datasets.Dataset`, a `pandas.DataFrame` or a `pyarrow.Table`.

    Raises:
        ValueError: `data` is something else, or several splits.
    """
    import datasets
    import pandas as pd
    import pyarrow as pa

    if isinstance(data, pd.DataFrame):
        return Table({str(name): data[name].tolist() for name in data.columns})
    if isinstance(data, pa.Table):
        data = datasets.Dataset(data)
    if not isinstance(data, datasets.Dataset):
        raise ValueError(
            f"data={type(data).__name__}: pass a datasets.Dataset (one split), a pandas.DataFrame, a path or a name"
        )
    return Table(data=data.with_format(None))


def read_files(files: Sequence[tuple[str, str | Path]], kind: str) -> Table:
    """Files of one kind as one table.

    Args:
        files: (name, path); relative pictures are beside what the name says.
        kind: "csv", "json" or "parquet".

    Raises:
        ValueError: a file is not what its kind says.
    """
    if kind == "parquet":
        import datasets
        import pyarrow.parquet as pq

        data = datasets.load_dataset("parquet", data_files=[str(path) for _, path in files], split="train")
        return Table(data=data, files=[(name, pq.read_metadata(path).num_rows) for name, path in files])
    parts = [(name, _records(name, Path(path), kind)) for name, path in files]
    columns = dict.fromkeys(key for _, rows in parts for row in rows for key in row)
    cells = {key: [row.get(key) for _, rows in parts for row in rows] for key in columns}
    return Table(cells, files=[(name, len(rows)) for name, rows in parts])


def _records(name: str, path: Path, kind: str) -> Records:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"file {name!r} is not UTF-8 ({error}); save it as UTF-8") from error
    if kind == "csv":
        return _csv(name, text)
    return _lines(name, text) if name.lower().endswith(".jsonl") else _json(name, text)


def _csv(name: str, text: str) -> Records:
    """Every cell is a text; what a short row lacks is None."""
    rows: Records = []
    try:
        for row in csv.DictReader(io.StringIO(text, newline=""), strict=True):
            if None in row:
                raise ValueError(
                    f"file {name!r}, row {len(rows) + 1} has {len(row[None])} cells more than the header; put texts "  # type: ignore[call-overload]
                    "with commas into double quotes"
                )
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"file {name!r}, row {len(rows) + 1} is no CSV ({error})") from error
    return rows


def _json(name: str, text: str) -> Records:
    """A list of records, columns, or a record per line."""
    try:
        found = _parse(text)
    except json.JSONDecodeError:
        return _lines(name, text)
    if isinstance(found, dict) and all(isinstance(column, list) for column in found.values()):
        if len(set(map(len, found.values()))) != 1:
            raise ValueError(f"file {name!r} has columns of unequal length: { {k: len(v) for k, v in found.items()} }")
        return [dict(zip(found, row)) for row in zip(*found.values())]
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"file {name!r} is no table; write a list of records, columns, or one record per line")
    return found


def _lines(name: str, text: str) -> Records:
    rows: Records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"file {name!r}, line {number} is no JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"file {name!r}, line {number} is {type(row).__name__}, not a record {{column: cell}}")
        rows.append(row)
    return rows


def _parse(text: str) -> Any:
    """JSON whose numbers stay the texts that they are; NaN is no value."""
    return json.loads(text, parse_float=str, parse_int=str, parse_constant=lambda name: None)


def read_folder(path: Path, split: str) -> Table:
    """Data files, images with a metadata file, or what `save_to_disk` wrote.

    Raises:
        ValueError: it has several splits and none of that name.
    """
    import datasets

    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        loaded = datasets.load_from_disk(str(path))
        name, data = _pick(loaded, split, str(path)) if isinstance(loaded, dict) else ("", loaded)
        return Table(data=data, files=[(str(path / name / "*.arrow"), len(data))])
    if any(path.rglob("metadata.*")):
        return _built(datasets.load_dataset_builder("imagefolder", data_dir=str(path)), split, str(path))
    return _built(datasets.load_dataset_builder(str(path)), split, str(path))


def read_hub(name: str, split: str) -> Table:
    """NAME or NAME:CONFIG on a hub."""
    import datasets

    hub, _, config = name.partition(":")
    return _built(datasets.load_dataset_builder(hub, config or None), split, name)


def _built(builder: Any, split: str, name: str) -> Table:
    """What a builder of `datasets` would read; by ourselves where it would guess types."""
    import datasets

    files = builder.config.data_files
    if builder.name not in (*FILES.values(), "imagefolder") or not files:
        builder.download_and_prepare()
        return Table(data=_pick(builder.as_dataset(), split, name)[1])
    _, chosen = _pick(files, split, name)
    kind = builder.name
    if kind == "imagefolder":
        chosen = [file for file in chosen if PurePath(file).stem == "metadata"]
        kinds = {FILES.get(PurePath(file).suffix.lower(), "") for file in chosen}
        if len(kinds) != 1 or not all(kinds):
            raise ValueError(
                f"data={name!r} needs metadata.jsonl, .csv or .parquet beside its images, of one kind, and no archives"
            )
        kind = kinds.pop()
    chosen = [str(file) for file in chosen]
    table = read_files(list(zip(chosen, datasets.DownloadManager().download(chosen))), kind)
    return _named(table) if builder.name == "imagefolder" else table


def _named(table: Table) -> Table:
    """A metadata file calls a picture file_name, or COLUMN_file_name."""
    new = {}
    for name in table.names:
        for ending in ("file_names", "file_name"):
            if name.endswith(ending):
                new[name] = name.removesuffix(ending).removesuffix("_") or "image"
                break
    if table.data is not None:
        return Table(data=table.data.rename_columns(new), files=table.files)
    return Table({new.get(name, name): column for name, column in table.cells.items()}, files=table.files)


def _pick(loaded: Mapping[Any, Any], split: str, name: str) -> tuple[str, Any]:
    """The wanted split, or the only one there is."""
    found = split if split in loaded else next(iter(loaded)) if len(loaded) == 1 else None
    if found is None:
        raise ValueError(f"split={split!r} is not in {name!r}; there are: {', '.join(map(str, loaded))}")
    return str(found), loaded[found]
