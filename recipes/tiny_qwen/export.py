"""Writes a trained model as a Hugging Face folder: fp16 weights, configuration, tokenizer, processor.

Before that it runs an image of an odd size the plain way, through processor and model, and compares with training.
"""

import json
from pathlib import Path

import torch
from model import PREFIX, answer, build_model, look, use_training_functions
from PIL import Image
from processor import FEWEST, MERGE, MOST, PATCH, TOKEN, VISION_END, build_processor
from render import LENGTH, normalise, token_block
from vocabulary import BOS, EOS, IMAGE, PAD

from hf_compress.evaluate.scoring import encode

GRID = (10, 13)  # windows at the right and at the bottom are not full


def export(weights, folder):
    """Writes the checkpoint.

    Args:
        weights: fp32 tensors by parameter name of `build_model()`; all of them.
        folder: directory, made if absent.
    """
    model, processor = _load(weights), build_processor()
    check(weights, processor)
    for name, value in (("bos", BOS), ("eos", EOS), ("pad", PAD)):
        setattr(model.generation_config, f"{name}_token_id", value)
    model.generation_config.max_new_tokens = 8
    model.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    name_processor(Path(folder))


def _load(weights):
    model = build_model().eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = set(missing) & dict(model.named_parameters()).keys()  # tied weights and buffers need no entry
    if missing or unexpected:
        raise ValueError(f"weights: missing {sorted(missing)}, unexpected {unexpected}")
    return model


@torch.no_grad()
def check(weights, processor):
    """Raises AssertionError unless processor and model give the ids and the logits that training has."""
    pixels = torch.randint(256, (1, GRID[0] * TOKEN, GRID[1] * TOKEN, 3), dtype=torch.uint8)
    question = "what digit is at the top left ?"
    inputs = encode(processor, [Image.fromarray(pixels[0].numpy())], [question])
    block = token_block(question, "7")[0]
    length = block.index(PAD) - 1  # without the answer
    tokens = GRID[0] * GRID[1]
    expected = [*PREFIX, *[IMAGE] * tokens, VISION_END, *block[:length]]
    if inputs["input_ids"][0].tolist() != expected:
        raise AssertionError(f"the processor gives {inputs['input_ids'].tolist()}, training used {expected}")
    plain = _load(weights)(**inputs).logits[0, -length:]
    model = _load(weights)
    use_training_functions(model)
    seen, _ = look(model, normalise(pixels))
    trained = answer(model, seen, torch.arange(tokens)[None], GRID, torch.tensor(block).view(1, 1, LENGTH))[0, 0]
    torch.testing.assert_close(trained[:length], plain, rtol=1e-3, atol=1e-3)


def name_processor(folder):
    """Lets `AutoProcessor` restore a plain `Qwen2_5_VLProcessor` where torchvision is there, videos included."""
    for name in ("processor_config.json", "tokenizer_config.json"):
        config = json.loads((folder / name).read_text())
        config["processor_class"] = "Qwen2_5_VLProcessor"
        if name == "processor_config.json":
            config["video_processor"] = {
                "video_processor_type": "Qwen2VLVideoProcessor",
                "patch_size": PATCH,
                "merge_size": MERGE,
                "temporal_patch_size": 2,
                "size": {"shortest_edge": (FEWEST * TOKEN) ** 2, "longest_edge": (MOST * TOKEN) ** 2},
                "image_mean": config["image_processor"]["image_mean"],
                "image_std": config["image_processor"]["image_std"],
            }
        (folder / name).write_text(json.dumps(config, indent=2) + "\n")
