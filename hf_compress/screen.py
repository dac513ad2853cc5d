"""Tables that can be read at any width, on any terminal and in a page; no heavy import."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

NARROW = 16  # characters: a column whose cells are longer may be wrapped down to so many
GAP = 2  # between columns; 1 where it is narrow
PLAIN = {"✓": "*", "±": "+-", "–": "-", "—": "-", "→": "->", "×": "x", "…": "...", "≤": "<=", "≥": ">="}


@dataclass
class Table:
    """Cells as text.

    Attributes:
        columns: their names.
        rows: a cell per column.
        title: above it, "" for none.
        left: how many of the first columns are set to the left; the others hold numbers.
        rules: numbers of rows before which a line is drawn.
    """

    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    title: str = ""
    left: int = 1
    rules: Collection[int] = ()

    def markdown(self) -> str:
        """For a page, without the title."""
        rule = ["---"] * self.left + ["--:"] * (len(self.columns) - self.left)
        rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [self.columns, *self.rows]]
        return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])

    def print(self, console: Console | None = None) -> None:
        """For a terminal or a pipe: columns where the width lets them stand beside each other, else a block per row.

        Nothing is cut: cells are wrapped between words, and longer words are folded. *Cells* and **cells** are shown in
        italics and bold where the terminal can.
        """
        from rich.console import Console

        console = console or Console()
        if self.title:
            console.print(self.title, style="bold", markup=False, highlight=False)
        for gap in range(GAP, 0, -1):
            if (widths := self._widths(console.width, gap)) is not None:
                return self._grid(console, widths, gap)
        return self.blocks(console)

    def _cells(self, column: int) -> list[str]:
        return [self.columns[column], *(_text(row[column]).plain for row in self.rows)]

    def _widths(self, room: int, gap: int) -> list[int] | None:
        """Characters per column; None if they are too many for this width."""
        from rich.cells import cell_len

        widths, least = [], []
        for i in range(len(self.columns)):
            cells = self._cells(i)
            widths.append(max(cell_len(line) for cell in cells for line in cell.split("\n")))
            word = max(cell_len(word) for cell in cells for word in cell.split() or [""])
            least.append(max(word, min(widths[i], NARROW)))
        room -= gap * (len(widths) - 1)
        if sum(least) > room:
            return None
        while sum(widths) > room:
            widths[max(range(len(widths)), key=lambda i: (widths[i] > least[i], widths[i]))] -= 1
        return widths

    def _grid(self, console: Console, widths: Sequence[int], gap: int) -> None:
        from rich.box import Box
        from rich.table import Table as Grid
        from rich.text import Text

        lines = Box(
            "    \n    \n -- \n    \n -- \n    \n    \n    \n", ascii=True
        )  # below the head and between sections
        grid = Grid(box=lines, padding=(0, gap - 1, 0, 0), pad_edge=False, show_edge=False)
        for i, (name, width) in enumerate(zip(self.columns, widths)):
            grid.add_column(
                Text(name), width=width, justify="left" if i < self.left else "right", overflow="fold", vertical="top"
            )
        for number, row in enumerate(self.rows):
            if number in self.rules:
                grid.add_section()
            grid.add_row(*map(_text, row))
        console.print(grid)

    def blocks(self, console: Console) -> None:
        """A block per row: the first cell, and below it the others with the names of their columns."""
        from rich.padding import Padding
        from rich.table import Table as Grid
        from rich.text import Text

        for row in self.rows:
            console.print(_text(row[0]), style="bold", overflow="fold")
            block = Grid.grid(padding=(0, GAP, 0, 0), pad_edge=False)
            block.add_column(no_wrap=True)
            block.add_column(overflow="fold")
            for name, cell in list(zip(self.columns, row))[1:]:
                if cell:
                    block.add_row(Text(name.replace("\n", " ")), _text(cell))
            if block.row_count:
                console.print(Padding(block, (0, 0, 0, GAP), expand=False))


def _text(cell: str) -> Any:
    from rich.text import Text

    for mark, style in (("**", "bold"), ("*", "italic")):
        if len(cell) > 2 * len(mark) and cell.startswith(mark) and cell.endswith(mark):
            return Text(cell[len(mark) : -len(mark)], style=style)
    return Text(cell)


class Stages:
    """Progress of work in stages: on a terminal a bar, which goes when all is done; elsewhere a line a stage.

    Args:
        console: where it is shown.
        total: steps of all stages together.
        unit: what the steps are, in the plural.
    """

    def __init__(self, console: Console, total: int, unit: str):
        self.console, self.total, self.unit = console, total, unit
        self.done, self._name = 0, ""
        self._bar: Any = None
        self._start = self._began = time.monotonic()

    def __enter__(self) -> Stages:
        if self.console.is_terminal:
            self._bar = self._rich()
            self._task = self._bar.add_task("", total=self.total)
            self._bar.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._tell()

    def begin(self, name: str) -> None:
        """The stage before has ended, `name` begins."""
        if self._bar is not None:
            self._bar.update(self._task, description=name)
        else:
            self._tell()
        self._name, self._began = name, time.monotonic()

    def advance(self, steps: int) -> None:
        """So many more are done."""
        self.done += steps
        if self._bar is not None:
            self._bar.advance(self._task, steps)

    def _tell(self) -> None:
        """The line of the stage that has ended."""
        if self._name:
            now = time.monotonic()
            line = f"{self._name}: {now - self._began:.0f} s; {self.done} of {self.total} {self.unit}"
            self.console.print(f"{line} in {now - self._start:.0f} s", markup=False, highlight=False)

    def _rich(self) -> Any:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn(), TextColumn(self.unit))
        return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console, transient=True)


def readable() -> None:
    """Let standard output and error show what their encoding lacks as the nearest plain character, or as "?"."""
    codecs.register_error("hf_compress.plain", _replace)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="hf_compress.plain")


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


def one_line(error: Any) -> str:
    """An exception's message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
