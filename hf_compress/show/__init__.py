"""Pictures of what a method kept."""

from hf_compress.show.overlay import compare, overlay

__all__ = ["compare", "overlay"]
