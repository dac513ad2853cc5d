"""Trains the recall model from nothing, on one CPU core, and writes it as a Hugging Face folder.

    python recipes/tiny_recall/train.py --out hf_compress/demo/recall --seed 0

Needs nothing beside hf_compress and torch 2.9 or later: no network, no GPU, no data on disk. The training loop is that
of `recipes/tiny_llava`. Afterwards the checkpoint is scored on held-out contexts.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes are the parallelism; set before torch is imported

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from evaluate import evaluate
from model import build_model, build_tokenizer, states, use_training_attention
from sequences import PLAIN, RECALLED, micro_batch

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny_llava"))
from parallel import train

ROWS = 2  # micro-batches per step
RATES = (2e-3, 1e-2)  # AdamW, Muon
PLAIN_WEIGHT = 0.1
LENGTHS = (128, 256, 512, 1024)  # of the prompts that the result is scored on


def losses(model, tokens, positions, marks):
    """Cross entropy of recalled tokens, their share of right ones, cross entropy of plain tokens; a dict of scalars."""
    hidden, targets, marks = states(model, tokens, positions)[:, :-1], tokens[:, 1:], marks[:, 1:]
    recalled, plain = (model.lm_head(hidden[marks == mark]).float() for mark in (RECALLED, PLAIN))
    found = {
        "recalled": F.cross_entropy(recalled, targets[marks == RECALLED]),
        "right": (recalled.argmax(-1) == targets[marks == RECALLED]).float().mean(),
        "plain": F.cross_entropy(plain, targets[marks == PLAIN]),
    }
    return found | {"total": found["recalled"] + PLAIN_WEIGHT * found["plain"]}


def run(out, steps=1300, seed=0, processes=1):
    """Trains, exports and scores; see the module's docstring.

    Args:
        out: folder of the checkpoint.
        steps: optimiser steps of two micro-batches.
        seed: of the initial weights and the training sequences.
        processes: how many work at the same time, one thread each; their number does not change the result.

    Returns:
        dict: minutes of training by the clock and of CPU time, exact match per length and kind of question.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = build_model()
    use_training_attention(model)
    model.bfloat16()
    clock = time.time()
    weights = train(
        list(model.named_parameters()),
        lambda number: losses(model, *micro_batch(number, steps * ROWS, seed)),
        steps=steps,
        rows=ROWS,
        rates=RATES,
        processes=processes,
    )
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes = {"clock": time.time() - clock, "cpu": children.ru_utime + children.ru_stime}
    export(weights, out)
    scores = {length: evaluate(out, length) for length in LENGTHS}
    return {"minutes": {name: round(seconds / 60, 1) for name, seconds in minutes.items()}, "test": scores}


def export(weights, folder):
    """Writes fp32 `weights`, by name in the model, and the tokenizer as a Hugging Face folder in fp16."""
    model = build_model()
    model.load_state_dict(weights)
    model.generation_config.max_new_tokens = 3
    model.to(torch.float16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="one thread each")
    print(json.dumps(run(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
