"""One page from the results of several sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_compress.evaluate import figures, tables
from hf_compress.evaluate.results import Results
from hf_compress.evaluate.rows import correct, join, take_times, tell_apart
from hf_compress.saving import prepare, replaced


def leaderboard(folders: Sequence[str | Path], out: str | Path, times: Sequence[str | Path] = ()) -> list[Path]:
    """Join the results of several sweeps into one page with pictures.

    Sweeps of the same model, questions and settings become one table, so that methods can be added to a page without
    judging all the others again; their controls are judged with each of them and have to be the same.

    Args:
        folders: the `out` of sweeps.
        out: the Markdown file; a CSV file and the pictures go beside it, under the same name.
        times: folders whose times are shown in place of none: a cell takes four questions, so sweeps of four can take
            them while nothing else runs. The page says where they come from.

    Returns:
        the files written.

    Raises:
        ValueError: a folder holds no results, or none is given, or the page cannot be written; or sweeps of the same
            settings differ in a row that both have, so that they are not comparable; or times belong to none of them.
    """
    if not folders:
        raise ValueError("folders=[]: name the folders of at least one sweep")
    page = Path(out)
    if page.suffix != ".md":
        raise ValueError(f"out={str(out)!r} must end with .md")
    results = join([Results.read(Path(folder)) for folder in folders])
    take_times(results, [Results.read(Path(folder)) for folder in times])
    tell_apart(results)
    correct(results)
    prepare(page.parent)
    pictures = [figures.overview(results, page.with_suffix(".png"))]
    pictures.append(figures.pareto(results, page.with_name(f"{page.stem}-pareto.png")))
    for number, one in enumerate(results, 1):
        if one.types:
            pictures.append(figures.by_type(one, page.with_name(f"{page.stem}-types-{number}.png")))
    with replaced(page) as new:
        new.write_text(tables.markdown(results, [p.name for p in pictures]), encoding="utf-8")
    table = page.with_suffix(".csv")
    with replaced(table) as new:
        tables.write_csv(results, new)
    return [page, table, *pictures]
