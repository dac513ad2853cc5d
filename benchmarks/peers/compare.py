"""Two selections of entries against each other, and the table of all cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SIDES = ("ours", "theirs")
Kept = Sequence[Sequence[Sequence[int]]]  # layer, KV head, entries


def agreement(ours: Kept, theirs: Kept) -> dict[str, Any]:
    """How far two selections agree, over layers and KV heads.

    Returns:
        "equal": share of heads with the same entries; "jaccard": mean over heads of the entries in both over those in
        either; "worst": the lowest of a head; "differing": the most entries of ours in a head that theirs lacks;
        "ours", "theirs": mean entries per head of every layer.

    Raises:
        ValueError: the selections differ in layers or heads.
    """
    if [len(layer) for layer in ours] != [len(layer) for layer in theirs]:
        raise ValueError(f"{[len(x) for x in ours]} heads per layer against {[len(x) for x in theirs]}")
    pairs = [(set(a), set(b)) for x, y in zip(ours, theirs) for a, b in zip(x, y)]
    overlaps = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]
    return {
        "equal": sum(a == b for a, b in pairs) / len(pairs),
        "jaccard": sum(overlaps) / len(overlaps),
        "worst": min(overlaps),
        "differing": max(len(a - b) for a, b in pairs),
        "ours": [sum(map(len, layer)) / len(layer) for layer in ours],
        "theirs": [sum(map(len, layer)) / len(layer) for layer in theirs],
    }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The agreements on several prompts as one: means, the worst of the worst, entries of the first."""
    mean = {key: sum(f[key] for f in found) / len(found) for key in ("equal", "jaccard")}
    worst = {"worst": min(f["worst"] for f in found), "differing": max(f["differing"] for f in found)}
    return mean | worst | {key: found[0][key] for key in ("ours", "theirs")}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, one line per case and ratio.

    Args:
        rows: "case", "ratio", the keys of `summary`, "bytes" as {"ours": share, "theirs": share} of the full cache,
            and "prefill" and "step" as {"ours": ratio, "theirs": ratio} over bare ones, each a `Ratio` as a dict.
    """
    titles = ("method", "ratio", "same heads", "Jaccard", "worst head", "differing")
    titles += ("bytes, ours", "kvpress", "prefill, ours", "kvpress", "step, ours", "kvpress")
    lines = [titles, ("---",) * len(titles)]
    for row in rows:
        shown = (
            row["case"],
            f"{row['ratio']:g}",
            f"{row['equal']:.1%}",
            f"{row['jaccard']:.4f}",
            f"{row['worst']:.4f}",
        )
        size, times = row["bytes"], [row[what][side]["pairs"] for what in ("prefill", "step") for side in SIDES]
        shown += (str(row["differing"]), f"{size['ours']:.1%}", f"{size['theirs']:.1%}")
        lines.append((*shown, *(f"{t['median']:.3f} ({t['low']:.3f}-{t['high']:.3f})" for t in times)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
