"""A small real vision-language model and the scenes it answers questions about; both work without a network."""

from pathlib import Path

# name -> folder beside this file, in Hugging Face format
MODELS = {"llava": "llava"}


def load_demo(name="llava", dtype="float32", **kwargs):
    """Loads a demonstration model that ships with this package.

    Args:
        name: a key of MODELS. "llava" is a `LlavaForConditionalGeneration` of 3.7 M parameters with 196 visual
            tokens per image, trained on the scenes of `hf_compress.demo.dataset`.
        dtype: dtype of the weights, a name or a `torch.dtype`. The file holds fp16.
        **kwargs: passed on to `from_pretrained` of the model, such as `attn_implementation="eager"`.

    Returns:
        (model, processor): the model is in eval mode, on the CPU.

    Raises:
        ValueError: no such name.
    """
    if name not in MODELS:
        raise ValueError(f"name={name!r} is not a demonstration model; there are: {', '.join(sorted(MODELS))}")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = Path(__file__).parent / MODELS[name]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True, **kwargs)
    # "pil": scenes need no resizing, and torchvision is not required
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")


__all__ = ["MODELS", "load_demo"]
