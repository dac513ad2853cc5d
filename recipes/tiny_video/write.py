"""Writes a trained model as a Hugging Face folder, and scores one on held-out clips.

Before writing it runs a clip the plain way, through processor and model, and compares with training.
"""

from collections import defaultdict
from pathlib import Path

import torch
from arrays import GRID, TOKENS
from begin import VOCABULARY, build_config, build_processor
from export import name_processor
from model import PREFIX, answer, look, use_training_functions
from PIL import Image
from processor import VIDEO, VISION_END
from render import LENGTH, normalise, token_block
from transformers import Qwen2_5_VLForConditionalGeneration
from vocabulary import BOS, EOS, PAD

from hf_compress.demo import load_demo
from hf_compress.demo.clip_dataset import grey_clip, load_clips
from hf_compress.demo.clips import QUESTION_TYPES, ClipRenderer
from hf_compress.demo.qwen_processor import ClipProcessor
from hf_compress.evaluate import answer as answers
from hf_compress.evaluate import exact_match
from hf_compress.evaluate.scoring import encode
from hf_compress.pictures import Frames


def write(weights, folder):
    """Writes the checkpoint.

    Args:
        weights: fp32 tensors by parameter name of `build_model()`; all of them.
        folder: directory, made if absent.
    """
    check(weights)
    model = _load(weights)
    for name, value in (("bos", BOS), ("eos", EOS), ("pad", PAD)):
        setattr(model.generation_config, f"{name}_token_id", value)
    model.generation_config.max_new_tokens = 8
    model.to(torch.float16).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    name_processor(Path(folder))


def _load(weights):
    known, _ = load_demo("qwen")
    model = Qwen2_5_VLForConditionalGeneration(build_config(known.config)).eval()
    model.load_state_dict(weights)
    lost = [name for name, found in model.state_dict().items() if not torch.equal(found, weights[name])]
    if lost:  # tied weights, given twice and not alike: the later name wins
        raise AssertionError(f"the model does not hold what was given for {lost}")
    return model


@torch.no_grad()
def check(weights):
    """Raises AssertionError unless processor and model give the ids and the logits that training has."""
    clip = ClipRenderer("test")[0]
    question = "what vanishes ?"
    inputs = encode(build_processor(), [Frames(Image.fromarray(pixels) for pixels in clip.frames)], [question])
    block = token_block(question, "red 7", VOCABULARY)[0]
    length = block.index(PAD) - 2  # without the answer
    expected = [*PREFIX, *[VIDEO] * TOKENS, VISION_END, *block[:length]]
    if inputs["input_ids"][0].tolist() != expected:
        raise AssertionError(f"the processor gives {inputs['input_ids'].tolist()}, training used {expected}")
    plain = _load(weights)(**inputs).logits[0, -length:]
    model = _load(weights)
    use_training_functions(model)
    seen, _ = look(model, normalise(torch.from_numpy(clip.pixels)))
    tokens = torch.tensor(block).view(1, 1, LENGTH)
    trained = answer(model, seen.flatten(0, 1)[None], torch.arange(TOKENS)[None], GRID, tokens)[0, 0]
    torch.testing.assert_close(trained[:length], plain, rtol=1e-3, atol=1e-3)


def evaluate(folder, clips=100, questions=4, blind=False):
    """Exact match of the checkpoint in `folder`, fp32, on clips of the test split, through `model.generate`.

    Returns:
        dict: "exact_match" (0..1), "questions", and "types": type -> (exact match, questions).
    """
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = ClipProcessor.from_pretrained(folder, backend="pil")
    data = load_clips("test", clips, questions)
    asked = [{"video": grey_clip(), "question": q} for q in data["question"]] if blind else data
    hits = defaultdict(list)
    right = exact_match(answers(model, processor, asked, batch_size=32), data["answer"])
    for kind, hit in zip(data["type"], right, strict=True):
        hits[kind].append(hit)
    types = {kind: (sum(hits[kind]) / len(hits[kind]), len(hits[kind])) for kind in QUESTION_TYPES if hits[kind]}
    return {"exact_match": sum(right) / len(right), "questions": len(right), "types": types}
