"""What can be taken back of a compressed cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_compress.stores.dense import HeldLayer


def check_crop(first: HeldLayer, tokens: int) -> None:
    """Raises ValueError unless the newest `tokens` can be taken back from a layer.

    A cache crops its layers one after the other: of the first of them, all the others are looked at too.
    """
    every = [layer for ref in first.siblings if (layer := ref())]
    for layer in every if every and every[0] is first else [first]:
        most, why = _most(layer)
        if layer.layout is not None and most < tokens:
            raise ValueError(
                f"crop({-tokens}): the newest {most} tokens of this compressed cache can be taken back at most "
                f"({why}); start a new cache instead"
            )


def _most(held: HeldLayer) -> tuple[int, str]:
    """How many tokens can be taken back from a layer, and what stands before them."""
    if held.layout is None:
        return 0, "it is empty"
    limits = [(held.layout.newest_rows(), "older ones were chosen from, or stand behind removed ones")]
    if held.body is not None:
        limits.append((min(held.keys.shape[2], held.values.shape[2]), "older ones are packed"))
    if held.dropped and held.window is not None:
        limits.append((max(0, len(held.layout) - held.window + 1), f"its window of {held.window} has let go of others"))
    return min(limits)
