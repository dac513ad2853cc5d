"""What made an answer, as plain data: answers of another model, processor, setting or library are never mixed."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device

import hf_compress
from hf_compress import plugin
from hf_compress.bench.timing import record
from hf_compress.calibrate.files import RETRIEVAL, SEMANTIC
from hf_compress.evaluate.prompts import tokenizer_of

SAMPLE = 1 << 16  # elements of a tensor that are looked at, evenly spread, and one of every row at least
LIBRARIES = ("torch", "torchvision", "transformers", "tokenizers", "pillow", "numpy")  # they act on answers
PASSING = ("transformers_version", "_name_or_path", "name_or_path", "_from_model_config")  # where a config comes from


def made_by(model: Any, processor: Any) -> dict[str, Any]:
    """Names and values that are equal if the same questions get the same answers.

    Args:
        model: not compressed.
        processor: of the model, or its tokenizer.

    Returns:
        digests of "weights" (names, shapes, dtypes and a fixed sample of every tensor), "config", "processor" (with its
        tokenizer), "template", and of measurements beside the checkpoint; "generation", what the generation config
        changes; "attention", "device", "plugins" (digests of files with methods) and the versions of the libraries.
    """
    tokenizer = tokenizer_of(processor)
    templates = [getattr(part, "chat_template", None) for part in (processor, tokenizer)]
    generation = model.generation_config.to_diff_dict()
    out = {"weights": fingerprint(model), "config": _digest(model.config.to_dict())}
    out |= {"processor": _digest(_processor(processor))}
    out |= {"template": _digest(templates), "generation": _lasting(generation)}
    out |= {"attention": model.config._attn_implementation, "device": record(model.device)["device"]}
    out |= {"plugins": ",".join(sorted(plugin.FILES.values()))} if plugin.FILES else {}
    return json.loads(json.dumps(out | _measured(model) | versions(), default=str))


def _measured(model: Any) -> dict[str, str]:
    """Of what was measured about the heads and lies beside the checkpoint, where methods look for it."""
    files = (Path(getattr(model, "name_or_path", "")) / name for name in (RETRIEVAL, SEMANTIC))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files if file.is_file()}


def versions() -> dict[str, str]:
    """Of the libraries that act on answers, where they are installed."""
    out = {"hf_compress": hf_compress.__version__}
    for name in LIBRARIES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """Digest of names, shapes, dtypes and `SAMPLE` elements of every parameter and buffer, wherever they are kept.

    It takes about 0.1 s for the built-in models, and 0.01 s per matrix of 4096 x 4096 on one thread of a CPU.

    Adapters that are switched off or changed for another leave the tensors as they are; which ones act counts too.
    Floating-point buffers that no checkpoint holds (rotary frequencies) count in bfloat16: they are computed anew on
    every machine, and the last bit of a power is not the same on all.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        acting = [getattr(module, key, None) for key in ("active_adapters", "disable_adapters")]
        digest.update(repr([name, *(value for value in acting if not callable(value))]).encode())
        with align_module_device(module):  # brings what is offloaded
            computed = module._non_persistent_buffers_set
            for key, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
                digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                rounded = key in computed and tensor.is_floating_point()
                digest.update(_sample(tensor.bfloat16() if rounded else tensor))
    return digest.hexdigest()[:16]


def _sample(tensor: torch.Tensor) -> bytes:
    """The bytes of some of its elements, the first and the last among them, and some of every row."""
    flat = tensor.reshape(-1)
    if len(flat) > SAMPLE:
        count = max(SAMPLE, len(tensor))
        flat = flat[torch.arange(count, device=flat.device) * (len(flat) - 1) // (count - 1)]
    return flat.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _processor(processor: Any) -> Any:
    """All of it that acts on inputs and on answers; how a tokenizer pads and cuts changes while it is used."""
    tokenizer = tokenizer_of(processor)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    words = {key: value for key, value in words.items() if backend is None or key not in ("padding", "truncation")}
    kept = ("special_tokens_map", "model_max_length", "clean_up_tokenization_spaces", "split_special_tokens")
    rest = {key: getattr(tokenizer, key, None) for key in kept}
    own = processor.to_dict() if processor is not tokenizer else {}
    return [type(processor).__name__, type(tokenizer).__name__, own, words, rest]


def _lasting(value: Any) -> Any:
    """Plain data without what says where it comes from."""
    if isinstance(value, dict):
        return {str(key): _lasting(item) for key, item in value.items() if key not in PASSING}
    return [_lasting(item) for item in value] if isinstance(value, (list, tuple)) else value


def _digest(value: Any) -> str:
    text = json.dumps(_lasting(value), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
