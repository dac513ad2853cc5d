"""Exact match of a checkpoint on held-out contexts, through plain `model.generate`.

Usage:

    python recipes/tiny_recall/evaluate.py hf_compress/demo/recall --length 512
"""

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_compress.demo.recall_data import KINDS, load_recall, prompt


def answers(model, tokenizer, data, batch=16):
    """Greedy answers, one string per row of `data`, with the question inside the prompt; the model may be compressed."""
    found = []
    for start in range(0, len(data), batch):
        rows = data[start : start + batch]
        texts = [prompt(*pair) for pair in zip(rows["context"], rows["question"])]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=3)
        found += tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in found]


def score(found, data):
    """Exact match (0..1) per kind of question, and of "all"."""
    right = [answer == truth for answer, truth in zip(found, data["answer"], strict=True)]
    share = lambda kind: [hit for hit, k in zip(right, data["kind"], strict=True) if kind in (k, "all")]
    hits = {kind: share(kind) for kind in (*KINDS, "all")}
    return {kind: round(sum(hit) / len(hit), 4) for kind, hit in hits.items()}


def evaluate(folder, length=512, contexts=51, split="test", seed=0):
    """Loads the checkpoint in `folder` in fp32 and scores it (see `score`)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = load_recall(split, contexts, length, seed)
    return score(answers(model, tokenizer, data), data)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="checkpoint in Hugging Face format")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--contexts", type=int, default=51, help="five questions each")
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(evaluate(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
