"""Token compression for Hugging Face models: one call on the model you already have.

import hf_compress                                  # every PreTrainedModel now has .compress()
model.compress("fastervlm", ratio=0.89)
model.generate(**inputs)
print(model.compression.report())
model.decompress()

Importing it loads neither torch nor transformers: what needs them comes when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# The folder of the methods: imported any later, it would take the place of the function of that name.
import hf_compress.methods as _folder  # noqa: F401
from hf_compress.config import CompressionConfig, Schedule
from hf_compress.importing import attach
from hf_compress.registry import methods, register

if TYPE_CHECKING:
    from hf_compress import calibrate
    from hf_compress.api import compress, compressed, decompress
    from hf_compress.patches.registry import architectures

__version__ = "0.1.0"
__all__ = [
    "CompressionConfig",
    "Schedule",
    "architectures",
    "calibrate",
    "compress",
    "compressed",
    "decompress",
    "load_demo",
    "methods",
    "register",
]
_PLACES = {"architectures": "patches.registry", "compress": "api", "compressed": "api", "decompress": "api"}


def __getattr__(name: str) -> Any:
    if name == "calibrate":
        return import_module(f"{__name__}.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_demo(name: str = "llava", **kwargs: Any) -> tuple[Any, Any]:
    """A small trained model that ships with the package: (model, processor). See `hf_compress.demo.load_demo`."""
    from hf_compress.demo import load_demo as load

    return load(name, **kwargs)


attach()
