"""Pictures of results: accuracy against cost, and heat maps of the difference to random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_compress.evaluate.plan import BARE
from hf_compress.evaluate.rows import Board, Row
from hf_compress.evaluate.tables import GROUPS, heading, mark, ranked

# Methods with a colour, a marker and a name in a panel: the most accurate. Told apart in print and by the colour-blind.
NAMED = dict(zip(("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#7a5c00", "#6a3d9a"), "osD^vP*X"))
STYLES = {  # of the controls: line, and hollow marker where there is one point only
    **{"random": ("--", "o"), "kvrandom": ("--", "o"), "uniform": ("-", "s"), "downsample": (":", "^")},
    **{"streaming": ("-.", "D"), "strided": ("-.", "D"), "frames": (":", "v")},
}
ABREAST = 3  # panels beside each other in the overview
WIDE = 40  # points of difference where the colours end


def pareto(results: Sequence[Board], path: Path) -> Path:
    """Accuracy against what is kept, and against time where it was measured; one line of panels per group of methods.

    Controls are black, the most accurate methods coloured and named, with their 95 % intervals; the others grey.
    """
    panels = [(one, group, rows) for one in results for group in GROUPS if (rows := _members(one, group))]
    timed = any(r.prefill is not None for one in results for r in one.rows)
    columns = 3 if timed else 1
    figure, axes = _figure(len(panels), columns, 4.6 * columns + 1.8, 4.2 * len(panels))
    for line, (one, group, rows) in zip(axes, panels):
        kept: tuple[str, Callable[[Row], Any]] = ("KV bytes kept, %", lambda r: _times100(r.kv_share))
        if group == "vision":
            kept = ("visual tokens per question, mean over layers", lambda r: r.visual)
        costs = [kept, ("prefill time / uncompressed", lambda r: r.prefill)]
        costs.append(("decode time / uncompressed", lambda r: r.decode))
        for axis, (name, cost) in zip(line, costs):
            if not any(cost(r) is not None for r in rows):  # not timed
                axis.set_visible(False)
                continue
            _curves(axis, rows, cost)
            axis.axhline(100 * one.rows[0].accuracy[0], color="black", linewidth=0.8)  # type: ignore[index]
            axis.set_xlabel(name)
        line[0].set_ylabel(f"{one.metric.replace('_', ' ')}, %")
        line[0].set_title(f"{one.title}\n{heading(one, group)}", fontsize=10, loc="left")
        handles, labels = line[0].get_legend_handles_labels()
        place = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5), "handlelength": 3}
        line[-1].legend(handles[::-1], labels[::-1], fontsize=8, frameon=False, **place)
    figure.savefig(path, dpi=110)
    return path


def _members(one: Board, group: str) -> list[Row]:
    return [r for r in one.rows if r.method != BARE and r.group == group and r.accuracy is not None]


def _curves(axis: Any, rows: list[Row], cost: Callable[[Row], Any]) -> None:
    names = ranked(rows)
    controls = [n for n in names if any(r.control for r in rows if r.method == n)]
    best = dict(zip([n for n in names if n not in controls], NAMED.items()))
    for name in names[::-1]:
        shown = [
            (cost(r), *(100 * x for x in r.accuracy or ())) for r in rows if r.method == name and cost(r) is not None
        ]
        points = sorted((x, mean) for x, mean, _, _ in shown)
        style: dict[str, Any] = {"color": "0.8", "linewidth": 0.8, "markersize": 2, "zorder": 1, "marker": "o"}
        if name in controls:
            line, shape = STYLES[name.split("+")[0]]
            style |= {"color": "black", "linestyle": line, "marker": shape, "markerfacecolor": "white"}
            style |= {"linewidth": 1.6, "markersize": 5, "zorder": 3, "label": name}
        if name in best:
            colour, shape = best[name]
            style |= {"color": colour, "marker": shape, "linewidth": 1.6, "markersize": 5, "zorder": 2, "label": name}
        if points:
            axis.plot(*zip(*points), **style)
        if name in best or name in controls:  # their 95 % intervals
            for x, _, low, high in shown:
                axis.vlines(x, low, high, color=style["color"], linewidth=3, alpha=0.18, zorder=style["zorder"])
    if len(best) + len(controls) < len(names):
        axis.plot([], [], color="0.8", linewidth=0.8, label=f"{len(names) - len(best) - len(controls)} others")
    axis.plot([], [], color="black", linewidth=3, alpha=0.18, label="95 % interval")
    axis.locator_params(axis="x", nbins=5)  # more of them run into each other where the range is narrow
    axis.grid(alpha=0.3)


def overview(results: Sequence[Board], path: Path) -> Path:
    """Heat map per sweep and group: methods by ratios, coloured by the difference to random, accuracy written in."""
    panels = [(one, group, rows) for one in results for group in GROUPS if (rows := _members(one, group))]
    lines = [panels[i : i + ABREAST] for i in range(0, len(panels), ABREAST)]
    heights = [max(len(ranked(rows)) for _, _, rows in line) for line in lines]
    width = max(len({r.ratio for r in rows}) for _, _, rows in panels)
    abreast = min(ABREAST, len(panels))
    size = 1 + (1.5 + 0.75 * width) * abreast, sum(1.4 + 0.24 * height for height in heights)
    figure, axes = _figure(len(lines), abreast, *size, height_ratios=[4 + height for height in heights])
    for axis in axes.flat:
        axis.set_visible(False)
    image = None
    for (one, group, rows), axis in zip(panels, axes.flat):
        ratios = sorted({r.ratio for r in rows if r.ratio is not None})
        cells = {(r.method, r.ratio): r for r in rows}
        names = ranked(rows)
        grid = [[_over(cells.get((n, ratio))) for ratio in ratios] for n in names]
        notes = [[_label(cells.get((n, ratio))) for ratio in ratios] for n in names]
        axis.set_visible(True)
        height = heights[panels.index((one, group, rows)) // ABREAST]
        image = _heat(axis, grid, notes, names, [f"{r:.4g}" for r in ratios], height)
        axis.xaxis.tick_top()  # panels of few methods end high up
        axis.set_title(f"{one.title}\n{heading(one, group)}", fontsize=8, loc="left")
    bar = figure.colorbar(image, ax=axes, shrink=0.4, extend="both")
    bar.set_label("accuracy minus random, points", fontsize=9)
    figure.suptitle(
        "Accuracy, % (✓ beats all controls, ✓✓ after correction; r, R, u, d, s, t, f: does not beat that control)",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    return path


def by_type(one: Board, path: Path) -> Path:
    """Heat map per ratio: methods by question types, coloured by the difference to random, accuracy written in."""
    rows = [r for r in one.rows if r.method != BARE and r.types]
    ratios = sorted({r.ratio for r in rows if r.ratio is not None})
    names = [name for group in GROUPS for name in ranked(r for r in rows if r.group == group)]
    kinds = list(one.types)
    size = 2 + (0.42 * len(kinds) + 0.3) * len(ratios), 2.4 + 0.24 * len(names)
    figure, axes = _figure(1, len(ratios), *size, sharey=True)
    image = None
    for axis, ratio in zip(axes[0], ratios):
        cells = {r.method: r for r in rows if r.ratio == ratio}
        grid = [[_points(cells.get(n), kind) for kind in kinds] for n in names]
        notes = [[f"{100 * cells[n].types[kind]:.0f}" if n in cells else "–" for kind in kinds] for n in names]
        image = _heat(axis, grid, notes, names, kinds, len(names), size=6)
        axis.set_title(f"ratio {ratio:.4g}", fontsize=9)
    if image is not None:
        figure.colorbar(image, ax=list(axes[0]), shrink=0.4, extend="both").set_label(
            "minus random, points", fontsize=9
        )
    figure.suptitle(f"{one.title}: accuracy per question type, %", fontsize=10)
    figure.savefig(path, dpi=130)
    return path


def _heat(
    axis: Any, grid: list[list[float]], notes: list[list[str]], names: list[str], columns: list[str], height: int,
    size: int = 7,
) -> Any:  # fmt: skip
    image = axis.imshow(grid, cmap="RdBu", vmin=-WIDE, vmax=WIDE, aspect="auto")
    for i, line in enumerate(notes):
        for j, text in enumerate(line):
            dark = abs(grid[i][j]) > 0.7 * WIDE
            weight = "bold" if "✓" in text else "normal"
            axis.text(j, i, text, ha="center", va="center", fontsize=size, weight=weight, color="w" if dark else "k")
    long = max(map(len, columns)) > 6
    axis.set_xticks(range(len(columns)), columns, fontsize=7, rotation=90 if long else 0)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_ylim(height - 0.5, -0.5)  # rows are equally high in all panels
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return image


def _over(row: Row | None) -> float:
    """Points over random; 0 for random itself, not a number where there is nothing to compare."""
    if row is None or row.accuracy is None:
        return float("nan")
    return 100 * row.over["random"][0] if "random" in row.over else 0.0


def _points(row: Row | None, kind: str) -> float:
    return float("nan") if row is None else 100 * row.types_over_random.get(kind, 0.0)


def _label(row: Row | None) -> str:
    if row is None or row.accuracy is None:
        return "–"
    return f"{100 * row.accuracy[0]:.0f} {mark(row)}".rstrip()


def _times100(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _figure(lines: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """A figure that belongs to no window, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(lines, columns, squeeze=False, **options)
