"""Trains the recall model from nothing, on one CPU core, and writes it as a Hugging Face folder.

    python recipes/tiny_recall/train.py --out hf_compress/demo/recall --seed 0

Needs nothing beside hf_compress and torch 2.9 or later, no network and no disk. The training loop is that of
`recipes/tiny_llava`.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes are the parallelism; set before torch is imported

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from evaluate import evaluate
from model import build_model, build_tokenizer, states, use_training_attention
from sequences import FILLER, KNOWN, micro_batch

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny_llava"))
from parallel import train

ROWS = 2  # micro-batches per step
RATES = (2e-3, 1e-2)  # AdamW, Muon
FILLER_WEIGHT = 0.1


def losses(model, tokens, positions, marks):
    """Cross entropy of what can be known, its share of right tokens, and cross entropy of the filler."""
    hidden, marks = states(model, tokens, positions)[:, :-1], marks[:, 1:]
    found = {}
    for name, mark in (("known", KNOWN), ("filler", FILLER)):
        logits, targets = model.lm_head(hidden[marks == mark]).float(), tokens[:, 1:][marks == mark]
        found[name] = F.cross_entropy(logits, targets)
        if mark == KNOWN:
            found["right"] = (logits.argmax(-1) == targets).float().mean()
    return found | {"total": found["known"] + FILLER_WEIGHT * found["filler"]}


def run(out, steps=2000, seed=0, processes=1):
    """Trains, exports and scores; see the module's docstring.

    Args:
        out: folder of the checkpoint.
        steps: optimiser steps of two micro-batches.
        seed: of the initial weights and the training sequences.
        processes: how many work at the same time, one thread each; does not change the result.

    Returns:
        dict: minutes of training, exact match per length and kind.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = build_model()
    use_training_attention(model)
    model.bfloat16()
    clock = time.time()
    weights = train(
        [(name, p) for name, p in model.named_parameters()],
        lambda number: losses(model, *micro_batch(number, steps * ROWS, seed)),
        steps=steps,
        rows=ROWS,
        rates=RATES,
        processes=processes,
    )
    report = {"minutes": round((time.time() - clock) / 60, 1)}
    model = build_model()
    model.load_state_dict(weights, strict=False)  # the tied output weights need no entry
    model.generation_config.max_new_tokens = 3
    model.to(torch.float16).save_pretrained(out)
    build_tokenizer().save_pretrained(out)
    return report | {"test": {length: evaluate(out, length) for length in (128, 256, 512, 1024)}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="one thread each")
    print(json.dumps(run(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
