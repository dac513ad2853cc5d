"""Pictures of what a method kept."""

from hf_compress.show.overlay import compare, overlay
from hf_compress.show.strip import strip

__all__ = ["compare", "overlay", "strip"]
