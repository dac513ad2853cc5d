"""Trains a model that recalls facts from nothing, on one CPU core, and writes it as a Hugging Face folder.

    python recipes/tiny_recall/train.py --out hf_compress/demo/recall --seed 0
    python recipes/tiny_recall/train.py --data facts --out hf_compress/demo/facts --seed 0  # facts in running text

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

import running_text
import sequences
import torch
import torch.nn.functional as F
from evaluate import evaluate
from model import build_model, build_tokenizer, states, use_training_attention

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny_llava"))
from parallel import train

ROWS = 2  # micro-batches per step
RATES = (2e-3, 1e-2)  # AdamW, Muon
DATA = {"recall": sequences, "facts": running_text}
LENGTHS = (128, 256, 512, 1024)  # of the prompts that the result is scored on


def losses(model, tokens, positions, marks, weights):
    """Per name of `weights` the cross entropy of its tokens and the share of right ones; "total"; a dict of scalars.

    Args:
        tokens, positions, marks: of a micro-batch.
        weights: name -> (mark, weight in the total).
    """
    hidden, targets, marks = states(model, tokens, positions)[:, :-1], tokens[:, 1:], marks[:, 1:]
    found, total = {}, 0.0
    for name, (mark, weight) in weights.items():
        logits, wanted = model.lm_head(hidden[marks == mark]).float(), targets[marks == mark]
        found[name] = F.cross_entropy(logits, wanted)
        found[f"{name} right"] = (logits.argmax(-1) == wanted).float().mean()
        total = total + weight * found[name]
    return found | {"total": total}


def run(out, data="recall", steps=None, seed=0, processes=1):
    """Trains, exports and scores; see the module's docstring.

    Args:
        out: folder of the checkpoint.
        data: a key of DATA.
        steps: optimiser steps of two micro-batches; by default as many as the shipped model had.
        seed: of the initial weights and the training sequences.
        processes: how many work at the same time, one thread each; their number does not change the result.

    Returns:
        dict: minutes of training by the clock and of CPU time, exact match per length and kind of question.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    source = DATA[data]
    steps = steps or source.STEPS
    model = build_model(source.WORDS)
    use_training_attention(model)
    model.bfloat16()
    clock = time.time()
    weights = train(
        list(model.named_parameters()),
        lambda number: losses(model, *source.micro_batch(number, steps * ROWS, seed), source.WEIGHTS),
        steps=steps,
        rows=ROWS,
        rates=RATES,
        processes=processes,
    )
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes = {"clock": time.time() - clock, "cpu": children.ru_utime + children.ru_stime}
    export(weights, out, source)
    scores = {length: evaluate(out, data, length) for length in LENGTHS}
    return {"minutes": {name: round(seconds / 60, 1) for name, seconds in minutes.items()}, "test": scores}


def export(weights, folder, source):
    """Writes fp32 `weights`, by name in the model, and the tokenizer as a Hugging Face folder in fp16."""
    model = build_model(source.WORDS)
    model.load_state_dict(weights)
    model.generation_config.max_new_tokens = source.ANSWER
    model.to(torch.float16).save_pretrained(folder)
    build_tokenizer(source.WORDS).save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the checkpoint")
    parser.add_argument("--data", choices=sorted(DATA), default="recall")
    parser.add_argument("--steps", type=int, help="as many as the shipped model had by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="one thread each")
    print(json.dumps(run(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
