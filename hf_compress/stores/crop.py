"""What can be taken back of a compressed cache."""

from __future__ import annotations

from hf_compress.layout import Layout


def croppable(layout: Layout, unpacked: int | None, window: int | None) -> tuple[int, str]:
    """How many tokens can be taken back from a layer, and what stands before them.

    Args:
        unpacked: newest entries in front of which others are packed; None: none are.
        window: of a sliding layer that has let go of older slots.
    """
    limits = [(layout.newest_rows(), "older ones were chosen from, or stand behind removed ones")]
    if unpacked is not None:
        limits.append((unpacked, "older ones are packed"))
    if window is not None:
        limits.append((max(0, len(layout) - window + 1), f"its window of {window} has let go of others"))
    return min(limits)
