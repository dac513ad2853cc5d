"""Exact match of a checkpoint on held-out contexts, through plain `model.generate`, per kind of question.

Usage:

    python recipes/tiny_recall/evaluate.py hf_compress/demo/recall
    python recipes/tiny_recall/evaluate.py hf_compress/demo/recall --method snapkv --ratio 0.9
    python recipes/tiny_recall/evaluate.py hf_compress/demo/recall --method snapkv --ratio 0.9 --turns 2
    python recipes/tiny_recall/evaluate.py hf_compress/demo/recall --blind  # floor: no context
    python recipes/tiny_recall/evaluate.py hf_compress/demo/facts --data facts  # facts in running text
"""

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_compress
from hf_compress.demo.facts_data import load_facts
from hf_compress.demo.recall_data import KINDS, answer, load_recall
from hf_compress.evaluate import exact_match

LOADERS = {"recall": load_recall, "facts": load_facts}


def score(found, data):
    """Exact match, 0..1, per kind of question and of all."""
    right = exact_match(found, data["answer"])
    hits = {kind: [hit for hit, k in zip(right, data["kind"]) if k == kind] for kind in KINDS} | {"all": right}
    return {kind: round(sum(hit) / len(hit), 4) for kind, hit in hits.items()}


def evaluate(folder, data="recall", length=512, contexts=52, seed=0, turns=1, method=None, ratio=0.5, blind=False):
    """Loads the checkpoint in `folder` in fp32 and scores it on the test split (see `score`).

    Args:
        data: a key of LOADERS.
        length: tokens of a prompt with its question.
        contexts: of the test split, five questions each.
        seed: of the contexts.
        turns: 1 with the question in the prompt, 2 with the question in a second turn.
        method: name of a cache method, or None.
        ratio: fraction of the cache that the method removes.
        blind: leave the context out.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = LOADERS[data]("test", contexts, length, seed)
    if blind:
        rows = rows.map(lambda row: {"context": ""})
    if method:
        hf_compress.compress(model, method, ratio)
    return score(answer(model, tokenizer, rows, turns=turns), rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="checkpoint in Hugging Face format")
    parser.add_argument("--data", choices=sorted(LOADERS), default="recall")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--contexts", type=int, default=52, help="five questions each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=1, choices=(1, 2), help="2: ask after the context is compressed")
    parser.add_argument("--method", help="cache method of hf_compress; none by default")
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of the cache that it removes")
    parser.add_argument("--blind", action="store_true", help="leave the context out")
    print(json.dumps(evaluate(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
