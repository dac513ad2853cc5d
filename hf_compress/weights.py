"""Weights of what methods train: inside the checkpoint of a model, beside the weights of an adapter, or alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_compress import hub
from hf_compress.config import CompressionConfig
from hf_compress.engine.trained import NAME, Compressor
from hf_compress.saving import prepare, read_json, replaced, write_json

FILE, ABOUT = "compressor.safetensors", "compression.json"  # of a folder; never names that a model would be loaded from


@dataclass
class Weights:
    """Weights in `compressor.safetensors` of a folder or repository; see `fill`.

    Attributes:
        place: the folder.
        arguments: of whoever loads from there, `hub.PLACE` among them.
        required: there must be some, if anything is trained.
    """

    place: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    required: bool = True

    remedy: ClassVar[str] = (
        "compress the model first, with weights= of a folder that model.compression.save wrote, or take "
        "compression_config=False to load without"
    )

    def fill(self, compressor: Compressor | None, model: nn.Module) -> None:
        """Load them into new modules, all of them or none.

        Args:
            compressor: the modules, None where the methods train nothing.
            model: whose they will be.

        Raises:
            ValueError: weights are missing, damaged, or of other modules; the message says what would work.
        """
        if compressor is None:
            return
        found = self.read()
        if not found and not self.required:
            return
        wanted = compressor.state_dict()
        wrong = [f"{key} is missing" for key in sorted(wanted.keys() - found.keys())]
        wrong += [f"{key} belongs to no module" for key in sorted(found.keys() - wanted.keys())]
        wrong += [
            f"{key} is {tuple(found[key].shape)}, the module has {tuple(x.shape)}"
            for key, x in wanted.items()
            if key in found and found[key].shape != x.shape
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"{self.named}: {'; '.join(wrong[:3])}{more}; {self.remedy}")
        compressor.load_state_dict(found)

    @property
    def named(self) -> str:
        """For messages."""
        return f"weights of the trained modules in {os.fspath(self.place)!r}"

    def read(self) -> dict[str, Tensor]:
        """{key: tensor}, {} where there are none."""
        file = self.find(FILE)
        return {} if file is None else self.tensors(file)

    def find(self, name: str) -> Path | None:
        """A file of that name, fetched where the place is a repository; None: there is none.

        Raises:
            ValueError: neither folder nor repository of that name can be read.
        """
        try:
            return hub.find(self.place, name, self.arguments)
        except OSError as error:
            raise ValueError(
                f"{self.named}: no such folder, and no such repository ({error}); {self.remedy}"
            ) from error

    def tensors(self, file: Path, prefix: str = "") -> dict[str, Tensor]:
        """The tensors of a file whose keys begin with `prefix`, under what is left of them."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as f:
                return {k.removeprefix(prefix): f.get_tensor(k) for k in f.keys() if k.startswith(prefix)}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.named}: {str(file)!r} is damaged ({error}); {self.remedy}") from error


class Exported(Weights):
    """What `model.compression.save` wrote: they must fit the kind of model and the methods."""

    remedy: ClassVar[str] = (
        "name a folder that model.compression.save wrote for this model and method, or leave weights= out"
    )

    def fill(self, compressor: Compressor | None, model: nn.Module) -> None:
        if not isinstance(self.place, (str, os.PathLike)):
            raise ValueError(f"weights={self.place!r} must be a folder that model.compression.save wrote")
        if compressor is None:
            kind = type(model).__name__
            raise ValueError(f"weights={os.fspath(self.place)!r}: these methods train nothing on {kind}; leave it out")
        if self.find(FILE) is None or (about := self.find(ABOUT)) is None:
            raise ValueError(f"{self.named}: there is no {FILE} with a {ABOUT}; {self.remedy}")
        told = read_json(about, self.remedy)
        own = {"model_type": model.config.model_type, "methods": compressor.methods}
        if other := [f"{name} {told.get(name)!r} (here {own[name]!r})" for name in own if told.get(name) != own[name]]:
            raise ValueError(
                f"{self.named} are of {' and '.join(other)}, trained on {told.get('base')!r}; {self.remedy}"
            )
        super().fill(compressor, model)
        if (base := told.get("base")) and base != (name := model.config._name_or_path):
            warnings.warn(f"{self.named} were trained on {base!r}; this model came from {name!r}", stacklevel=4)


class OfCheckpoint(Weights):
    """Those inside the weights of a model, in one file or in shards, as `save_pretrained` and `Trainer` write them."""

    def read(self) -> dict[str, Tensor]:
        prefix = f"{NAME}."
        if given := self.arguments.get("state_dict"):
            return {k.removeprefix(prefix): x for k, x in given.items() if k.startswith(prefix)}
        variant = f".{v}" if (v := self.arguments.get("variant")) else ""
        if (whole := self.find(f"model{variant}.safetensors")) is not None:
            return self.tensors(whole, prefix)
        if (index := self.find(f"model.safetensors.index{variant}.json")) is None:
            return {}
        shards = read_json(index, self.remedy).get("weight_map", {})
        out: dict[str, Tensor] = {}
        for name in sorted({shards[key] for key in shards if key.startswith(prefix)}):
            if (shard := self.find(name)) is None:
                raise ValueError(f"{self.named}: its shard {name!r} is missing; {self.remedy}")
            out |= self.tensors(shard, prefix)
        return out


def export(model: nn.Module, config: CompressionConfig, folder: str | os.PathLike[str]) -> None:
    """Write the trained modules of a compressed model, and a file that says whose they are; each whole or not at all.

    Raises:
        ValueError: there are none, or the folder cannot be written.
    """
    out, tensors = Path(folder), trained(model)
    if not tensors:
        raise ValueError(f"{config.summary()} trains nothing that could be saved; save_pretrained saves the model")
    prepare(out, "folder")
    write(tensors, out / FILE)
    about = {
        "base": model.config._name_or_path,
        "model_type": model.config.model_type,
        "methods": getattr(model, NAME).methods,
        "compression": config.to_dict(),
        "shapes": {key: list(x.shape) for key, x in tensors.items()},
    }
    write_json(out / ABOUT, about)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What is trained of a compressed model, {} if nothing; in place of what PEFT wraps, what it trains."""
    compressor = getattr(model, NAME, None)
    if compressor is None:
        return {}
    if hasattr(compressor, "modules_to_save"):
        compressor = compressor.modules_to_save[compressor.active_adapters[0]]
    return {key: x.detach().cpu().contiguous().clone() for key, x in compressor.state_dict().items()}


def write(tensors: dict[str, Tensor], file: Path) -> None:
    """Tensors as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    with replaced(file) as new:
        save_file(tensors, new, metadata={"format": "pt"})
