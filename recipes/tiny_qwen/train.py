"""Trains the second demonstration model from nothing and writes it as a Hugging Face folder.

    python recipes/tiny_qwen/train.py --out hf_compress/demo/qwen --seed 0 --device cuda --processes 16
    python recipes/tiny_qwen/train.py --out hf_compress/demo/qwen --seed 0  # two CPU cores

Renders the scenes (2.8 GB in the cache folder), trains the tower, trains merger and language model, exports, and
scores the result on the test split. Needs scikit-image beside hf_compress. A stage that is done is not repeated if
`--cache` names the same folder again.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes are the parallelism; set before torch is imported

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tiny_llava"))  # loop, words, rendering, scoring

from data import SCENE_ARRAYS, describe
from evaluate import evaluate
from export import export
from model import TowerHeads, build_model, use_training_functions
from render import render
from stages import minutes, stage
from train_lm import train_lm
from train_tower import tower_accuracy, train_tower

GRIDS = ((14, 14), (11, 11), (8, 8))  # at which the tower is scored


def run(out, cache, seed=0, scenes=56_000, tower_images=102_400, lm_images=83_200, processes=2, device="cpu"):
    """Runs all stages; see the module's docstring.

    Args:
        out: folder of the checkpoint.
        cache: folder of rendered scenes and of the weights after each stage.
        seed: of the scenes, the initial weights and the order of training.
        scenes: different scenes to train on.
        tower_images, lm_images: image passes of the two stages.
        processes: how many work at the same time, one thread each; on an accelerator they only render.
        device: "cpu" or "cuda".

    Returns:
        dict: minutes of each stage, accuracies.
    """
    cache, report = Path(cache), {"minutes": {}}
    torch.set_num_threads(1)
    clock = time.time()
    render(cache / "train", "train", scenes, seed, processes, SCENE_ARRAYS, describe)
    render(cache / "validation", "validation", 1024, seed, processes, SCENE_ARRAYS, describe)
    clock = minutes(report, "render", clock)

    torch.manual_seed(seed)
    model, heads = build_model(), TowerHeads()
    use_training_functions(model)
    model.to(device, torch.bfloat16), heads.to(device, torch.bfloat16)

    tower = stage(cache / "tower.pt", lambda: train_tower(model, heads, cache / "train", tower_images, seed, processes))
    read_outs = {name.removeprefix("heads."): tower.pop(name) for name in list(tower) if name.startswith("heads.")}
    model.load_state_dict(tower, strict=False)
    heads.load_state_dict(read_outs)
    report["tower"] = {f"{r} x {c}": tower_accuracy(model, heads, cache / "validation", (r, c)) for r, c in GRIDS}
    print(report["tower"], flush=True)
    clock = minutes(report, "tower", clock)

    language = stage(cache / "lm.pt", lambda: train_lm(model, cache / "train", lm_images, seed, processes))
    clock = minutes(report, "language model", clock)

    export(tower | language, out)
    torch.set_num_threads(processes)
    report["test"], report["blind"] = (evaluate(out, blind=blind, device=device) for blind in (False, True))
    minutes(report, "evaluation", clock)
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the checkpoint")
    parser.add_argument("--cache", help="folder for rendered scenes; a temporary one by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=56_000, help="different scenes to train on")
    parser.add_argument("--tower-images", type=int, default=102_400, help="image passes of stage 1")
    parser.add_argument("--lm-images", type=int, default=83_200, help="image passes of stage 2")
    parser.add_argument("--processes", type=int, default=2, help="one thread each")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where training and scoring run")
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as temporary:
        options["cache"] = options["cache"] or temporary
        print(json.dumps(run(**options), indent=1))


if __name__ == "__main__":
    main()
