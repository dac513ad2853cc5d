"""Exact match of a checkpoint on held-out scenes, through plain `model.generate`.

Usage:

    python recipes/tiny_llava/evaluate.py hf_compress/demo/llava
    python recipes/tiny_llava/evaluate.py hf_compress/demo/llava --blind   # floor: every image is mean grey
"""

import argparse
import json
from collections import defaultdict

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_compress.demo.dataset import grey_image, load_scenes
from hf_compress.demo.qwen_processor import ImageOnlyProcessor
from hf_compress.demo.scenes import QUESTION_TYPES
from hf_compress.evaluate import answer


def score(found, data):
    """Exact match, overall and per question type.

    Returns:
        dict: "exact_match" (0..1), "questions", "images", and "types": type -> (exact match, questions).
    """
    hits = defaultdict(list)
    for said, truth, kind in zip(found, data["answer"], data["type"], strict=True):
        hits[kind].append(said == truth)
    types = {kind: (sum(hits[kind]) / len(hits[kind]), len(hits[kind])) for kind in QUESTION_TYPES if hits[kind]}
    right = sum(sum(hit) for hit in hits.values())
    total = {"exact_match": right / len(found), "questions": len(found), "images": len(set(data["image_id"]))}
    return total | {"types": types}


def evaluate(folder, split="test", images=256, questions=8, seed=0, blind=False, device="cpu"):
    """Loads the checkpoint in `folder` in fp32 and scores it on a rendered split (see `score`)."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    kind = ImageOnlyProcessor if model.config.model_type == "qwen2_5_vl" else AutoProcessor
    processor = kind.from_pretrained(folder, backend="pil")
    data = load_scenes(split, images, questions, seed)
    asked = [{"image": grey_image(), "question": q} for q in data["question"]] if blind else data
    return score(answer(model, processor, asked, batch_size=64), data)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="checkpoint in Hugging Face format")
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--questions", type=int, default=8, help="per image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blind", action="store_true", help="show mean grey instead of the images")
    print(json.dumps(evaluate(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
