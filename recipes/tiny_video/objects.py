"""Which tokens methods keep of clips: the figures in the docstrings of those that lose on the board of clips.

    python recipes/tiny_video/objects.py --methods random,vidcom2,prunevid --ratio .75

Per method: how many of the 512 tokens reach the last layer, which share of them shows an object, and of how many
objects a token is among them in the moment that shows the object first. Those of decoder methods are of the last layer.
"""

import argparse

import numpy as np
from PIL import Image

from hf_compress.demo import load_demo
from hf_compress.demo.clips import ClipRenderer, ask
from hf_compress.evaluate.models import config_of
from hf_compress.evaluate.prompts import encode
from hf_compress.pictures import Frames

MOMENTS, SIDE, TOKEN = 8, 8, 8  # tokens a side of a moment, pixels a side of a token
LEAST = 6  # pixels of an object that a token must hold to show it, as in training
BEFORE = 3  # rows of the prompt in front of the clip


def shown(clip):
    """(512, objects) bool: what every token shows."""
    painted = np.stack([clip.owner == 1 + i for i in range(len(clip.objects))], -1)
    counts = painted.reshape(MOMENTS, SIDE, TOKEN, SIDE, TOKEN, -1).sum((2, 4))
    return counts.reshape(MOMENTS * SIDE**2, -1) >= LEAST


def measure(method, ratio, clips=16):
    """(tokens, share of them on objects, share of objects seen when they appear), means over clips of "test"."""
    model, processor = load_demo("video")
    renderer, found = ClipRenderer("test"), []
    for number in range(clips):
        clip = renderer[number]
        question = ask(clip.objects, 4, renderer.rng("questions", number))[number % 4][1]
        inputs = encode(processor, [Frames(map(Image.fromarray, clip.frames))], [question])
        with model.compressed(config_of("demo:video", method, ratio)):
            model(**inputs)
            rows = np.array(model.compression.last.layer_index[-1][0]) - BEFORE
        tokens, shows = rows[(rows >= 0) & (rows < MOMENTS * SIDE**2)], shown(clip)
        of = tokens // SIDE**2  # the moment of each
        seen = [shows[tokens[of == o.first], i].any() for i, o in enumerate(clip.objects)]
        found.append((len(tokens), shows[tokens].any(1).mean(), np.mean(seen)))
    return np.mean(found, 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="random,uniform,vidcom2,divprune,prunevid,date,dycoke,bvllm")
    parser.add_argument("--ratio", type=float, default=0.75)
    given = parser.parse_args()
    for method in given.methods.split(","):
        tokens, on, seen = measure(method, given.ratio)
        print(f"{method:12} {tokens:4.0f} tokens, {on:.0%} on objects, {seen:.0%} of the objects when they appear")


if __name__ == "__main__":
    main()
