"""The clips of `hf_compress.demo.clips` as a `datasets` builder; needs no network and no loading script.

Example:

    from hf_compress.demo.clip_dataset import load_clips

    data = load_clips("test", clips=32, questions=4)   # 128 rows
    row = data[0]                                       # row["video"] is a list of 16 PIL images
"""

from dataclasses import asdict, dataclass

import datasets
from PIL import Image

from hf_compress.demo.clips import MOMENTS, MOST, SIDE, ClipRenderer, ask
from hf_compress.demo.dataset import GREY, png, prepared
from hf_compress.demo.scenes import SPLITS, check_split

FEATURES = datasets.Features(
    {
        "video": datasets.List(datasets.Image()),  # 16 frames of 64 x 64, RGB, two a second, equal in pairs
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "type": datasets.Value("string"),  # one of clips.QUESTION_TYPES
        "video_id": datasets.Value("int32"),  # number of the clip in its split
        "objects": datasets.List(
            {
                "role": datasets.Value("string"),  # "moves", "still" or "new"
                "name": datasets.Value("string"),
                "color": datasets.Value("string"),
                "cells": datasets.List(datasets.Value("int32"), length=2),  # 0..8, row by row: at first and at last
                "first": datasets.Value("int32"),  # moment, 0..7
                "last": datasets.Value("int32"),
            }
        ),
    }
)


@dataclass
class ClipsConfig(datasets.BuilderConfig):
    """How much to render.

    Args:
        clips: per split.
        questions: per clip, each one row; 1 to 16.
        seed: any integer; clip i of a split depends on the split, the seed and i alone.
        splits: which splits to render. "train" and "validation" need scikit-image.
    """

    clips: int = 128
    questions: int = 4
    seed: int = 0
    splits: tuple = SPLITS


class Clips(datasets.GeneratorBasedBuilder):
    """One row per question; rows of one clip follow each other and repeat its frames."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = ClipsConfig
    BUILDER_CONFIGS = [ClipsConfig(name="default", version=VERSION)]

    def _info(self):
        return datasets.DatasetInfo(description=__doc__, features=FEATURES)

    def _split_generators(self, dl_manager):
        return [datasets.SplitGenerator(split, gen_kwargs={"split": split}) for split in self.config.splits]

    def _generate_examples(self, split):
        renderer = ClipRenderer(split, self.config.seed)
        for index in range(self.config.clips):
            clip = renderer[index]
            moments = [{"bytes": png(pixels), "path": None} for pixels in clip.pixels]
            frames = [moment for moment in moments for _ in range(2)]
            objects = [asdict(o) for o in clip.objects]
            asked = ask(clip.objects, self.config.questions, renderer.rng("questions", index))
            for number, (kind, question, answer) in enumerate(asked):
                row = {"video": frames, "question": question, "answer": answer, "type": kind}
                yield (index, number), row | {"video_id": index, "objects": objects}


def load_clips(split="test", clips=128, questions=4, seed=0):
    """Renders a split and returns it; 128 clips take a second or two. Nothing is left on disk.

    Args:
        split: "test" (scikit-learn and matplotlib suffice), "train" or "validation" (need scikit-image).
        clips: how many.
        questions: per clip, 1 to 16.
        seed: any integer; the default is the set that the reported accuracies refer to.

    Returns:
        `datasets.Dataset` of clips * questions rows with FEATURES, clip by clip. The first rows do not change when more
        clips are asked for.

    Raises:
        ValueError: no such split, or counts that make no sense.
        ImportError: a package that ships the photographs of this split is missing.
    """
    check_split(split)
    if clips < 1:
        raise ValueError(f"clips={clips}; choose 1 or more")
    if not 1 <= questions <= MOST:
        raise ValueError(f"questions={questions}; choose 1 to {MOST}")
    ClipRenderer(split, seed)  # a missing package is reported here as itself, not wrapped by the builder
    return prepared(Clips, split, clips=clips, questions=questions, seed=seed)


def grey_clip():
    """Frames without information, mean grey: what remains correct with them is guessed."""
    return [Image.new("RGB", (SIDE, SIDE), GREY)] * (2 * MOMENTS)
