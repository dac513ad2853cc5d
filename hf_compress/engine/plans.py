"""How many rows go through each decoder layer, from the budget of the decoder stage."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from hf_compress.config import Schedule
from hf_compress.engine.stage import Budgeted

Plans = dict[tuple[int, int], dict[int, int | None]]  # {(rows that may go, images): {layer: rows that stay}}


def plan(stage: Budgeted, layers: int, tokens: int, images: int, first: int) -> dict[int, int | None]:
    """{layer: rows kept} of a sample with so many rows that may go, which are so many images.

    Args:
        first: the layer before which rows may be dropped at the earliest.

    Raises:
        ValueError: the budget cannot be reached, or rows would be dropped where they may not.
    """
    if stage.schedule is not None:
        found = _scheduled(stage.schedule, tokens, images, stage.method.returns)
    else:
        found = _planned(stage, layers, tokens, images)
    _check_counts(stage, found, tokens)
    if early := [layer for layer in found if layer < first and not stage.method.returns]:  # rows that wait miss nothing
        raise ValueError(
            f"method={stage.name!r} drops before layer {min(early)}; the model allows it from layer {first} on"
        )
    if wrong := sorted(set(found) - (able := set(stage.method.boundaries(layers)))):
        told = f"method={stage.name!r}" if stage.schedule is None else f"schedule={stage.schedule}: {stage.name!r}"
        raise ValueError(
            f"{told} drops before layers {wrong}, which are none of its boundaries; with these knobs it may drop "
            f"before {sorted(able)}"
        )
    return found


def _check_counts(stage: Budgeted, found: Mapping[int, int | None], tokens: int) -> None:
    """Raises ValueError where a plan is none: rows that are not there, or that come back without having waited."""
    left = tokens
    for layer, n in sorted(found.items()):
        if n is None:
            continue
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= left:
            raise ValueError(
                f"method={stage.name!r} plans {n!r} rows in layer {layer} of {left} that may go; it must be an integer "
                f"from 0 to {left}"
            )
        left = tokens if stage.method.returns else n


def _removed(stage: Budgeted, tokens: int, images: int) -> Fraction:
    """The share of a sample's rows that is to go: the ratio, or from layer-averaged tokens per image."""
    return max(Fraction(0), 1 - Fraction((stage.keep or 0) * images, tokens)) if stage.ratio is None else stage.ratio


def budget_of(stage: Budgeted, layers: int, tokens: int, images: int) -> int:
    """Rows, of those of a sample that may go, that go through all layers together."""
    if stage.schedule is not None:
        return sum(min(tokens, level * images) for level in stage.schedule.levels)
    if stage.open or not tokens:
        return layers * tokens
    return round(layers * tokens * (1 - _removed(stage, tokens, images)))


def _planned(stage: Budgeted, layers: int, tokens: int, images: int) -> dict[int, int | None]:
    if stage.open:  # it decides before every layer where it may
        return dict.fromkeys(stage.method.boundaries(layers))
    try:
        return stage.method.plan(layers, tokens, _removed(stage, tokens, images))
    except ValueError as error:
        if stage.keep is None:
            raise
        raise ValueError(f"keep={stage.keep} of {tokens // images} tokens: {error}") from error


def _scheduled(schedule: Schedule, tokens: int, images: int, returns: bool) -> dict[int, int | None]:
    counts = [min(tokens, level * images) for level in schedule.levels]
    before = [tokens] * len(counts) if returns else [tokens, *counts]
    return {layer: n for layer, (n, had) in enumerate(zip(counts, before)) if n != had}


def plans_of(
    stage: Budgeted, layers: int, tokens: list[int], images: list[int], first: int, plans: Plans
) -> dict[int, list[int] | None]:
    """{layer: rows kept per sample, or None}, of the layers before which any sample loses some.

    Args:
        tokens: rows that may go with which each sample enters the language model; images: how many images they are.
        first: the layer before which rows may be dropped at the earliest.
        plans: plans made before, added to; they depend on nothing but the counts.
    """
    samples = list(zip(tokens, images))
    for n, pictures in samples:
        if n and (n, pictures) not in plans:
            plans[n, pictures] = plan(stage, layers, n, pictures, first)
    left: list[int] | None = tokens
    out: dict[int, list[int] | None] = {}
    for layer in sorted({layer for key in samples if key[0] for layer in plans[key]}):
        found = [plans[key].get(layer, have) if have else 0 for key, have in zip(samples, left or tokens)]
        counts = [n for n in found if n is not None]
        if len(counts) < len(found):
            out[layer] = left = None
        elif counts != left:
            out[layer] = counts
            left = left if stage.method.returns else counts
    return out
