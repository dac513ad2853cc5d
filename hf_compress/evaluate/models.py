"""Models by name: the ones that ship with the package, a local folder, or a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_compress.evaluate.plan import Knobs

# Papers state layers of 32-layer models; the built-in ones have 6 or 4, so fastv cuts before their second layer.
DEMO_KNOBS: Knobs = {"fastv": {"layer": 1}}


def load_model(name: str, device: Any = None, dtype: Any = None) -> tuple[Any, Any]:
    """(model, processor or tokenizer) in eval mode, padding on the left.

    Args:
        name: "demo:llava", "demo:recall" and so on; a folder; or a name on a hub.
        device: where it goes.
        dtype: of its weights; by default float32 for what ships with the package, else what the checkpoint says.

    Raises:
        ValueError: there is no such model that ships with the package, or no such folder.
    """
    if name.startswith("demo:"):
        from hf_compress.demo import load_demo

        model, processor = load_demo(name.removeprefix("demo:"), dtype=dtype or "float32")
    else:
        model, processor = _checkpoint(name, dtype or "auto")
    getattr(processor, "tokenizer", processor).padding_side = "left"
    return model.to(device) if device is not None else model, processor


def _checkpoint(name: str, dtype: Any) -> tuple[Any, Any]:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if (Path(name).is_absolute() or name.startswith(".")) and not Path(name).is_dir():
        raise ValueError(f"model={name!r}: there is no such folder")
    sees = AutoConfig.from_pretrained(name).model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    kind, reader = (AutoModelForImageTextToText, AutoProcessor) if sees else (AutoModelForCausalLM, AutoTokenizer)
    model = kind.from_pretrained(name, dtype=dtype).eval()
    if getattr(model, "compression", None) is not None:  # a checkpoint that was saved with one
        model.decompress()
    processor = reader.from_pretrained(name)
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, processor
