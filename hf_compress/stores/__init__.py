"""Cache layers: each implements the whole contract of a transformers cache layer, or is not one."""

from hf_compress.stores.dense import HeldLayer, adopt

__all__ = ["HeldLayer", "adopt"]
