"""Cache layers with the whole contract of transformers' own."""

from hf_compress.stores.body import Body
from hf_compress.stores.caches import adopt, held_layers, layout_of, ours
from hf_compress.stores.dense import HeldLayer
from hf_compress.stores.packed import Packed
from hf_compress.stores.ragged import Ragged

__all__ = ["Body", "HeldLayer", "Packed", "Ragged", "adopt", "held_layers", "layout_of", "ours"]
