"""Token compression for Hugging Face models: one call on the model you already have.

import hf_compress                                  # every PreTrainedModel now has .compress()
model.compress("fastervlm", ratio=0.89)
model.generate(**inputs)
print(model.compression.report())
model.decompress()
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hf_compress import calibrate
from hf_compress.api import compress, compressed, decompress
from hf_compress.config import CompressionConfig
from hf_compress.loading import attach
from hf_compress.patches.registry import architectures
from hf_compress.registry import methods, register

__version__ = "0.1.0"
__all__ = [
    "CompressionConfig",
    "architectures",
    "calibrate",
    "compress",
    "compressed",
    "decompress",
    "load_demo",
    "methods",
    "register",
]


def load_demo(name: str = "llava", **kwargs: Any) -> tuple[Any, Any]:
    """A small trained model that ships with the package: (model, processor). See `hf_compress.demo.load_demo`."""
    from hf_compress.demo import load_demo as load

    return load(name, **kwargs)


PreTrainedModel.compress = compress
PreTrainedModel.decompress = decompress
PreTrainedModel.compressed = compressed
attach()
PreTrainedModel.compression = None  # set on the instance while it is compressed
