"""Trains the demonstration model from nothing, on a CPU, and writes it as a Hugging Face folder.

    python recipes/tiny_llava/train.py --out hf_compress/demo/llava --seed 0

Renders the scenes (2.5 GB in the cache folder), trains the tower, trains projector and language model, exports, and
scores the result on the test split. Needs scikit-image beside hf_compress. A stage that is done is not repeated if
`--cache` names the same folder again.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes are the parallelism; set before torch is imported

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from evaluate import evaluate
from export import export
from model import TowerHeads, amplify, build_model, use_training_attention
from render import render
from stages import minutes, stage
from train_lm import train_lm
from train_tower import tower_accuracy, train_tower


def run(out, cache, seed=0, scenes=56_000, tower_images=144_000, lm_images=29_000, processes=2):
    """Runs all stages; see the module's docstring.

    Args:
        out: folder of the checkpoint.
        cache: folder of rendered scenes and of the weights after each stage.
        seed: of the scenes, the initial weights and the order of training.
        scenes: different scenes to train on.
        tower_images, lm_images: image passes of the two stages.
        processes: how many work at the same time, one thread each.

    Returns:
        dict: minutes of each stage, accuracies.
    """
    cache, report = Path(cache), {"minutes": {}}
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, heads = build_model(), TowerHeads()
    use_training_attention(model)
    model.bfloat16(), heads.bfloat16()

    clock = time.time()
    render(cache / "train", "train", scenes, seed, processes)
    render(cache / "validation", "validation", 1024, seed, processes)
    clock = minutes(report, "render", clock)

    tower = stage(cache / "tower.pt", lambda: train_tower(model, heads, cache / "train", tower_images, seed, processes))
    read_outs = {name.removeprefix("heads."): tower.pop(name) for name in list(tower) if name.startswith("heads.")}
    tower = amplify(tower)
    model.load_state_dict(tower, strict=False)
    heads.load_state_dict(read_outs)
    report["tower"] = tower_accuracy(model, heads, cache / "validation")
    print(report["tower"], flush=True)
    clock = minutes(report, "tower", clock)

    language = stage(cache / "lm.pt", lambda: train_lm(model, cache / "train", lm_images, seed, processes))
    clock = minutes(report, "language model", clock)

    export(tower | language, out)
    torch.set_num_threads(processes)
    report["test"], report["blind"] = evaluate(out), evaluate(out, blind=True)
    minutes(report, "evaluation", clock)
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the checkpoint")
    parser.add_argument("--cache", help="folder for rendered scenes; a temporary one by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=56_000, help="different scenes to train on")
    parser.add_argument("--tower-images", type=int, default=144_000, help="image passes of stage 1")
    parser.add_argument("--lm-images", type=int, default=29_000, help="image passes of stage 2")
    parser.add_argument("--processes", type=int, default=2, help="one thread each")
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as temporary:
        options["cache"] = options["cache"] or temporary
        print(json.dumps(run(**options), indent=1))


if __name__ == "__main__":
    main()
