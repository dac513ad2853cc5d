"""One self-contained page from a sweep: click a picture, a method, a ratio, and see tokens, answers and costs."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from hf_compress.api import compressed
from hf_compress.evaluate.metrics import score_answers
from hf_compress.evaluate.models import load_model
from hf_compress.evaluate.plan import BARE, Run, labels
from hf_compress.evaluate.prompts import encode_rows, pictures_of
from hf_compress.evaluate.results import Results
from hf_compress.evaluate.rows import Board
from hf_compress.evaluate.store import ANSWERS, SETTINGS, Lines
from hf_compress.evaluate.tables import head_of
from hf_compress.evaluate.tasks import Task, load_task
from hf_compress.pictures import Frames
from hf_compress.saving import prepare, read_json, replaced
from hf_compress.show.photos import Piece, parts, placed

PAGE = Path(__file__).with_name("explorer.html")
MARK = "/*DATA*/"  # where the data stands in it
SIDE = 640  # pixels: larger pictures are made smaller
COLUMNS = (
    "method",
    "ratio",
    "control",
    "accuracy",
    "over",
    "over_full",
    "lost",
    "note",
    "visual",
    "entries",
    "kv_share",
)


@dataclass
class Explorer:
    """What a page shows.

    Attributes:
        board: of the sweep.
        task: its questions.
        answers: run -> row -> record.
        names: run -> its name in the tables; one seed of each.
        grids: lists of boxes of tokens, in pixels of the pictures as they are shown.
    """

    board: Board
    task: Task
    answers: dict[str, dict[int, dict[str, Any]]]
    names: dict[Run, str]
    grids: list[list[list[float]]] = field(default_factory=list)

    def about(self, images: int) -> list[dict[str, Any]]:
        """The first so many pictures or texts, with all questions about each and what was answered."""
        rows: dict[str, list[int]] = {}
        for row, group in enumerate(self.task.groups):
            rows.setdefault(group, []).append(row)
        out = []
        for mine in list(rows.values())[:images]:
            (shown,) = self.task.shown(mine[:1])
            pictures = [_uri(_small(one)) for one in _shown(shown)]
            text = "" if pictures else str(shown)
            asked = [self._asked(row) for row in mine]
            out.append({"pictures": pictures, "text": text, "asked": asked, "views": {}, "why": {}, "row": mine[0]})
        return out

    def _asked(self, row: int) -> dict[str, Any]:
        right = self.task.answers[row]
        said = {name(run, self.names): self.answers[run.key][row]["answer"] for run in self.names}
        scores = score_answers(self.board.metric, list(said.values()), [right] * len(said))
        marked = {key: (text, mark) for (key, text), mark in zip(said.items(), scores)}
        return {"question": self.task.questions[row], "right": list(dict.fromkeys(right)), "said": marked}

    def look(self, model: Any, processor: Any, about: Sequence[dict[str, Any]], progress: bool) -> None:
        """Let every method read the first question about every picture, and note what became of the tokens."""
        runs = [run for run in self.names if {"vision", "decoder"} & set(run.stage.split("+"))]
        for run in tqdm(runs, unit=" runs", disable=None if progress else True):  # None: but on a terminal
            with compressed(model, run.config(), weights=run.weights):
                for one in about:
                    try:
                        one["views"][name(run, self.names)] = self._view(model, processor, one["row"])
                    except ValueError as error:  # a picture whose crops the processor does not tell
                        one["why"][name(run, self.names)] = str(error)

    def _view(self, model: Any, processor: Any, row: int) -> list[dict[str, Any]]:
        """Of every picture of a row, or frame of its video: the grid of its tokens, and where each of them went.

        Kept ones are numbered through the row; -1 is gone.
        """
        (shown,) = self.task.shown([row])
        batch = encode_rows(processor, [row], [self.task.questions[row]], [shown])
        with torch.inference_mode():
            model(**batch.inputs.to(model.device), logits_to_keep=1)
        given = placed(model.compression.context, _shown(shown), processor, video=self.task.modality == "video")
        return [self._tokens(i * len(_shown(shown)) // len(given), *one) for i, one in enumerate(given)]

    def _tokens(self, picture: int, photo: Image.Image, pieces: Sequence[Piece]) -> dict[str, Any]:
        _, members = parts(pieces, photo.size)[-1]
        scale = _small(photo).width / photo.width
        boxes = [[round(scale * edge, 2) for edge in box] for piece in members for box in piece.boxes]
        if boxes not in self.grids:
            self.grids.append(boxes)
        owner = [int(kept) for piece in members for kept in piece.fate.owner]
        kept = sum(int(piece.fate.stays.sum()) for piece in members)
        return {"picture": picture, "grid": self.grids.index(boxes), "owner": owner, "kept": kept}


def explore(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    images: int = 8,
    data: Any = None,
    split: str = "test",
    tokens: bool = True,
    progress: bool = True,
) -> Path:
    """Write the page of a sweep: one HTML file that needs nothing beside it.

    Answers, costs and intervals are read from the folder. Which tokens stay is not in it: every method reads the first
    question about every picture once more, one forward each.

    Args:
        folder: the `out` of `sweep`, whose model was loaded by name.
        out: the page; by default report.html in the folder.
        images: the first so many pictures (or texts), with all questions about them.
        data: the questions, where they are no longer where the sweep found them; split: of these.
        tokens: False: no model is loaded, and no tokens are drawn.
        progress: show a bar, on a terminal.

    Returns:
        the path of the page.

    Raises:
        ValueError: the folder holds no finished sweep, its questions have changed or are not there, the model cannot be
            loaded, or the page cannot be written.
    """
    folder = Path(folder)
    page = folder / "report.html" if out is None else Path(out)
    if images < 1:
        raise ValueError(f"images={images}; choose 1 or more")
    board, settings = Results.read(folder), read_json(folder / SETTINGS, "judge into another folder")
    task = _task(settings, data, split)
    answers = Lines(folder / ANSWERS).found
    runs = [Run.from_key(key) for key, rows in answers.items() if len(rows) == len(task)]
    prepare(page.parent)
    explorer = Explorer(board, task, answers, dict(_first_seeds(runs)))
    about = explorer.about(images)
    if tokens and task.modality != "text":
        model, processor = load_model(settings["model"], dtype=getattr(torch, settings["dtype"]))
        explorer.look(model, processor, about, progress)
    content = {
        "title": board.title,
        "head": head_of(board).replace("**", ""),
        "about": about,
        "grids": explorer.grids,
        "methods": list(dict.fromkeys(named for run, named in explorer.names.items() if run.method != BARE)),
        "ratios": sorted({run.ratio for run in explorer.names if run.ratio is not None}),
        "rows": [_row(row) for row in board.rows],
        "pareto": _file(folder / "pareto.png"),
    }
    text = json.dumps(content, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    with replaced(page) as new:
        new.write_text(PAGE.read_text(encoding="utf-8").replace(MARK, text), encoding="utf-8")
    return page


def name(run: Run, names: dict[Run, str]) -> str:
    """What the page calls an answer: method and ratio."""
    return f"{names[run]}|{json.dumps(run.ratio)}"


def _first_seeds(runs: Sequence[Run]) -> Iterator[tuple[Run, str]]:
    seen = set()
    for run, named in labels(runs).items():
        if (named, run.ratio) not in seen:
            seen.add((named, run.ratio))
            yield run, named


def _task(settings: dict[str, Any], data: Any, split: str) -> Task:
    """The questions of a sweep, and no others."""
    asked = settings["questions"] + settings["skipped"]
    task = load_task(settings["data"] if data is None else data, asked, split, on_error="skip")
    if task.fingerprint != settings["fingerprint"]:
        raise ValueError(
            f"data={settings['data']!r}: these are not the questions of the sweep (they have changed, or stand in "
            "another split); pass data= and split= (--data, --split) that name them"
        )
    return task


def _shown(about: Any) -> list[Image.Image]:
    """The pictures of a row, or the frames of its video."""
    found = pictures_of(about)
    return list(found[0]) if found and isinstance(found[0], Frames) else found


def _row(row: Any) -> dict[str, Any]:
    values = asdict(row)
    return {column: values[column] for column in (*COLUMNS, "prefill", "decode")}


def _small(image: Image.Image) -> Image.Image:
    scale = SIDE / max(image.size)
    if scale >= 1:
        return image
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _file(path: Path) -> str | None:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.is_file() else None
