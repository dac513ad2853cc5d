"""Continues the demonstration Qwen2.5-VL on clips and writes the result as a Hugging Face folder.

    python recipes/tiny_video/train.py --out tiny_video --cache tiny_video_cache

One process of one thread: encodes the clips (0.4 MB each in the cache folder), trains merger and language model,
exports, and scores the result on the test split. Needs scikit-image beside hf_compress. Stopped, it goes on with the
same `--cache` where it was.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # set before torch is imported

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tiny_llava"))  # words, optimizer
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tiny_qwen"))  # the forward passes of training; goes first

from arrays import encode
from begin import build_model
from learn import SIZE, learn
from model import use_training_functions
from write import evaluate, write


def run(out, cache, seed=0, clips=10_000, passes=20_000):
    """Runs everything; see the module's docstring.

    Args:
        out: folder of the checkpoint.
        cache: folder of encoded clips and of the state of training.
        seed: of the clips, the new words and the order of training.
        clips: different clips to train on.
        passes: how many are shown, with 16 questions each, over several epochs.

    Returns:
        dict: exact match on the test split, with and without seeing.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    model, cache = build_model(), Path(cache)
    plain = {name: t.clone() for name, t in model.state_dict().items()}
    use_training_functions(model)
    model.to(torch.bfloat16)
    encode(model, cache / "train", "train", clips, seed)
    trained = learn(model, cache / "train", clips, passes // SIZE, seed, cache / "state.pt")
    words = trained["model.language_model.embed_tokens.weight"]  # `lm_head` is tied to them
    write(plain | trained | {"lm_head.weight": words}, out)
    return {"test": evaluate(out), "blind": evaluate(out, blind=True)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the checkpoint")
    parser.add_argument("--cache", required=True, help="folder for encoded clips and the state of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=int, default=10_000, help="different clips to train on")
    parser.add_argument("--passes", type=int, default=20_000, help="clips shown, over several epochs")
    print(json.dumps(run(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
