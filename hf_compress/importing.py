"""What `import hf_compress` gives to transformers and PEFT, once they are imported: until then neither is, nor torch.

Every model gets `compress`, `decompress`, `compressed` and `compression`, and loading and saving know of compressions.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from typing import Any

from hf_compress import loading_peft
from hf_compress.loading import knowing, plain, restoring, saving, uploading


class Later:
    """A function of `hf_compress.api` as a method of a class, imported when it is first looked up."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, model: Any, owner: type) -> Any:
        function = getattr(import_module("hf_compress.api"), self.name)
        return function if model is None else function.__get__(model, owner)


def _models(module: Any) -> None:
    cls = module.PreTrainedModel
    for name in ("compress", "decompress", "compressed"):
        setattr(cls, name, Later(name))
    cls.compression = None  # set on the instance while it is compressed
    _wrap(cls, "from_pretrained", restoring)
    _wrap(cls, "save_pretrained", saving)
    _wrap(cls, "post_init", knowing)
    _wrap(cls, "_upload_modified_files", uploading)
    _wrap(next(c for c in cls.__mro__ if "load_adapter" in vars(c)), "load_adapter", loading_peft.adding)


def _configs(module: Any) -> None:
    _wrap(module.AutoConfig, "from_pretrained", plain)


def _adapters(module: Any) -> None:
    _wrap(module.PeftModel, "from_pretrained", loading_peft.restoring)
    _wrap(module.PeftModel, "load_adapter", loading_peft.adding)
    _wrap(module.PeftModel, "save_pretrained", loading_peft.saving)


def _wrap(cls: type, name: str, wrap: Any) -> None:
    found = next(vars(c)[name] for c in cls.__mro__ if name in vars(c))
    method = getattr(found, "__func__", found)
    if method.__globals__ is not wrap.__globals__:  # once per process
        setattr(cls, name, wrap(method))


HOSTS = {
    "transformers.modeling_utils": _models,
    "transformers.models.auto.configuration_auto": _configs,
    "peft.peft_model": _adapters,
}


class AfterImport(MetaPathFinder):
    """Extends the modules of `HOSTS` as soon as they have been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec that the other finders give, its loader followed by the extension."""
        if name not in HOSTS:
            return None
        found = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next((s for s in found if s is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                HOSTS[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def attach() -> None:
    """Extend what has been imported of them, and what will be."""
    for name, extend in HOSTS.items():
        if name in sys.modules:
            extend(sys.modules[name])
    if not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport())
