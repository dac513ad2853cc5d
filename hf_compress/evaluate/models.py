"""Models by name: the ones that ship with the package, a local folder, or a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_compress.config import CompressionConfig, MethodConfig
from hf_compress.demo import MODELS
from hf_compress.evaluate.plan import BARE, Knobs, plan, split

# Papers state layers of 32-layer models; the built-in ones have 6 or 4, so one cut is made before their second layer.
DEMO_KNOBS: Knobs = {name: {"layer": 1} for name in ("fastv", "dart", "holitom_inner", "prunevid_inner")}


def config_of(model: str, method: str, ratio: float) -> CompressionConfig | None:
    """The compression that the options name; None: the bare model.

    Raises:
        ValueError: a name, a knob or the ratio is wrong.
    """
    if method == BARE:
        return None
    runs = plan([method], [ratio], DEMO_KNOBS if model.startswith("demo:") else None)
    run = next(run for run in runs if run.method == method)
    return CompressionConfig([MethodConfig(name, ratio, None, run.changed.get(name, {})) for name, _ in split(method)])


def load_model(name: str, device: Any = None, dtype: Any = None) -> tuple[Any, Any]:
    """(model, processor or tokenizer) in eval mode, padding on the left.

    Args:
        name: "demo:llava", "demo:recall" and so on; a folder; or a name on a hub.
        device: where it goes.
        dtype: of its weights; by default float32 for what ships with the package, else what the checkpoint says.

    Raises:
        ValueError: there is no such model that ships with the package, or what the name says cannot be loaded.
    """
    if name.startswith("demo:"):
        from hf_compress.demo import load_demo

        model, processor = load_demo(name.removeprefix("demo:"), dtype=dtype or "float32")
    else:
        model, processor = _checkpoint(name, dtype or "auto")
    getattr(processor, "tokenizer", processor).padding_side = "left"
    return model.to(device) if device is not None else model, processor


def check_pictures(model: str, processor: Any) -> None:
    """Raises ValueError where a model, loaded by this name with this processor, only reads text."""
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"model={model!r} reads no pictures; name one that does, such as demo:llava")


def check_place(device: Any, dtype: Any) -> None:
    """Raises ValueError where no model can be loaded in a dtype, a name or a `torch.dtype`, onto a device."""
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype={dtype!r} is not a dtype of weights, such as 'float32', 'bfloat16' or 'float16'")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {error}") from error


def _checkpoint(name: str, dtype: Any) -> tuple[Any, Any]:
    if (Path(name).is_absolute() or name.startswith(".")) and not Path(name).is_dir():
        raise ValueError(f"model={name!r}: there is no such folder")
    try:
        model, processor = _read(name, dtype)
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(
            f"model={name!r} cannot be loaded: {str(error).strip()} Pass {', '.join(f'demo:{m}' for m in MODELS)}, a "
            "folder that save_pretrained wrote, or a name on a hub that is in the local cache or within reach"
        ) from error
    if getattr(model, "compression", None) is not None:  # a checkpoint that was saved with one
        model.decompress()
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, processor


def _read(name: str, dtype: Any) -> tuple[Any, Any]:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    from hf_compress.demo.qwen_processor import ImageOnlyProcessor

    architecture = AutoConfig.from_pretrained(name).model_type
    if architecture not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        language_model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
        return language_model, AutoTokenizer.from_pretrained(name)
    # no videos are asked about, so torchvision, which their processor needs, is not required
    reader = ImageOnlyProcessor if architecture == "qwen2_5_vl" else AutoProcessor
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).eval()
    return model, reader.from_pretrained(name)
