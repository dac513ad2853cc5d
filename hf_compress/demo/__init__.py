"""Small trained models and the data they answer questions about; all of it works without a network."""

from pathlib import Path

# name -> folder beside this file, in Hugging Face format
MODELS = {"llava": "llava", "qwen": "qwen", "recall": "recall", "facts": "facts", "video": "video"}
TEXT = ("recall", "facts")  # those that read text alone


def load_demo(name="llava", dtype="float32", **kwargs):
    """Loads a demonstration model that ships with this package.

    Args:
        name: a key of MODELS. "llava" is a `LlavaForConditionalGeneration` of 3.7 M parameters with 196 visual
            tokens per image, trained on the scenes of `hf_compress.demo.dataset`. "qwen" is a
            `Qwen2_5_VLForConditionalGeneration` of 3.4 M parameters for the same scenes at any resolution, 64 to 196
            visual tokens. "video" is one of 3.0 M parameters for the clips of `hf_compress.demo.clips`, 512 visual
            tokens each. "recall" is a `LlamaForCausalLM` of 0.6 M parameters that recalls facts from prompts of
            `hf_compress.demo.recall_data`; "facts" is one of 0.7 M parameters for those of
            `hf_compress.demo.facts_data`, whose facts stand in running text.
        dtype: dtype of the weights, a name or a `torch.dtype`. The file holds fp16.
        **kwargs: passed on to `from_pretrained` of the model, such as `attn_implementation="eager"`.

    Returns:
        (model, processor): the model is in eval mode, on the CPU. Of "recall" and "facts" the second is a tokenizer, of
            "qwen" an `ImageOnlyProcessor`, of "video" a `ClipProcessor`.

    Raises:
        ValueError: no such name.
    """
    if name not in MODELS:
        raise ValueError(f"name={name!r} is not a demonstration model; there are: {', '.join(sorted(MODELS))}")
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    folder = Path(__file__).parent / MODELS[name]
    if name in TEXT:
        language_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **kwargs)
        return language_model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True, **kwargs)
    kind = AutoProcessor
    if name == "qwen":
        from hf_compress.demo.qwen_processor import ImageOnlyProcessor as kind
    elif name == "video":
        from hf_compress.demo.qwen_processor import ClipProcessor as kind
    # "pil": torchvision is not required
    return model.eval(), kind.from_pretrained(folder, local_files_only=True, backend="pil")


__all__ = ["MODELS", "load_demo"]
