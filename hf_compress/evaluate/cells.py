"""Cells of tables as text: what stands there, not what a reader makes of it."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd


def plain(value: Any, feature: Any) -> Any:
    """A value of a `datasets` column with what its feature knows: names of classes, and how precise a float is.

    Raises:
        ValueError: there is no such class.
    """
    import datasets

    if value is None:
        return None
    if isinstance(feature, datasets.ClassLabel):
        return feature.int2str(value) if value >= 0 else None  # -1 is what `datasets` writes for no label
    if isinstance(feature, datasets.Value):
        return np.dtype(feature.dtype).type(value) if feature.dtype in ("float16", "float32") else value
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return [plain(item, feature.feature) for item in value]
    if isinstance(feature, dict):
        return {name: plain(value[name], part) for name, part in feature.items()}
    return value


def spellings(value: Any) -> list[str]:
    """How a cell is written, the shortest way first.

    A text is written as it stands. A number that a column of floats holds has no text: a whole one may be written with
    and without its fraction, as may a moment at midnight with and without its time.

    Raises:
        ValueError: the cell is empty, or no single value.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"it holds bytes that are not text ({error})") from error
    if isinstance(value, (list, tuple, Mapping, np.ndarray)):
        raise ValueError(f"it holds {type(value).__name__} where one value is wanted")
    if pd.isna(value) or (isinstance(value, str) and not value.strip()):
        raise ValueError("the cell is empty")
    if isinstance(value, (bool, np.bool_)):
        return ["true" if value else "false"]
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return [str(int(value)), str(value)]
    if isinstance(value, datetime.datetime) and value.time() == datetime.time() and value.tzinfo is None:
        return [str(value.date()), str(value)]
    return [f"{value:f}" if isinstance(value, Decimal) else str(value)]


def text(value: Any) -> str:
    """A cell as it is asked.

    Raises:
        ValueError: as `spellings`.
    """
    return spellings(value)[0]


def references(value: Any) -> list[str]:
    """All that counts as right: one answer, a list, VQA records ({"answer": ...}) or SQuAD ({"text": [...]}).

    Raises:
        ValueError: there is none, or one of them is empty.
    """
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(value, Mapping):
        return references(_said(value))
    if not isinstance(value, (list, tuple)):
        return spellings(value)
    if not len(value):
        raise ValueError("the list of answers is empty")
    return [way for item in value for way in spellings(_said(item) if isinstance(item, Mapping) else item)]


def _said(record: Mapping[str, Any]) -> Any:
    key = next((key for key in ("text", "answer") if key in record), None)
    if key is None:
        raise ValueError(f"it holds a record with {sorted(record)}; 'answer' or 'text' is wanted")
    return record[key]
