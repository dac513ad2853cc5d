"""The page of a run on a real model, and how far the boards of the small models give the same order."""

from __future__ import annotations

import json
from pathlib import Path

from scipy.stats import kendalltau

import hf_compress
from hf_compress.evaluate import Results
from hf_compress.screen import Table

SMALL = Path(__file__).resolve().parents[2] / "benchmarks" / "boards"
BOARDS = {"recall model, one turn": "recall", "recall model, two turns": "recall-two-turn"}


def accuracies(folder: Path, ratio: float) -> dict[str, float]:
    """Percent right per method, at the ratio; of methods without one, as they are; of the bare model as "none"."""
    rows = [row for row in Results.read(folder).rows if row.accuracy is not None and row.ratio in (ratio, None)]
    return {row.method: 100 * row.accuracy[0] for row in rows}


def agreement(one: dict[str, float], other: dict[str, float]) -> tuple[float, float, int]:
    """(Kendall's tau-b, its p-value, how many methods both have judged); the bare model and controls left out."""
    control = {name for name, spec in hf_compress.methods().items() if spec.kind == "control"} | {"none"}
    both = [name for name in one if name in other and name not in control]
    found = kendalltau([one[name] for name in both], [other[name] for name in both])
    return float(found.statistic), float(found.pvalue), len(both)


def write_board(run: Path, page: Path) -> None:
    """Methods by perplexity with their answers; below, how far all columns and the small boards agree."""
    read = json.loads((run / "perplexity.json").read_text(encoding="utf-8"))
    how, likely = read["settings"], {k: v for k, v in read["perplexity"].items() if not isinstance(v, str)}
    refused = {k: v for k, v in read["perplexity"].items() if isinstance(v, str)}
    real = {name: Results.read(run / name) for name in ("one-turn", "two-turn")}
    right = {name: accuracies(run / name, how["ratio"]) for name in real}
    rows = []
    for method, value in sorted(likely.items(), key=lambda one: one[1]):
        cells = [f"{right[name][method]:.0f}" if method in right[name] else "–" for name in right]
        rows.append([method, f"{value:.2f}", *cells])
    settings = real["two-turn"].settings
    table = Table(["method", "perplexity", "facts, one turn, %", "facts, two turns, %"], rows)
    minus = {method: -value for method, value in likely.items()}  # the lower, the better
    views = {"perplexity": minus, "facts, one turn": right["one-turn"], "facts, two turns": right["two-turn"]}
    views |= {title: accuracies(SMALL / folder, how["ratio"]) for title, folder in BOARDS.items()}
    taus = Table(["Kendall's tau", *views], [[title, *_taus(view, views)] for title, view in views.items()])
    lines = [
        f"# {settings['model'].rsplit('/', 1)[-1]}: {how['ratio']:.0%} of the cache removed",
        f"Perplexity of {how['after']} tokens behind a context of {how['tokens']} ({how['texts']} texts); "
        f"{settings['questions']} facts in contexts of as many tokens, asked in the prompt and in a second turn. "
        f"Python {how['python']} (its documentation is the text), torch {how['torch']}, transformers "
        f"{settings['transformers']}, seed {how['seed']}.",
        table.markdown(),
        "How far two columns agree (1: the same order, 0: none), over the methods that both have judged:",
        taus.markdown(),
        *(f"`{method}` is refused: {why}" for method, why in refused.items()),
    ]
    page.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def _taus(view: dict[str, float], views: dict[str, dict[str, float]]) -> list[str]:
    return ["" if view is other else "{0:.2f} (n={2})".format(*agreement(view, other)) for other in views.values()]
