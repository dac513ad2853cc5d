"""The scenes of `hf_compress.demo.scenes` as a `datasets` builder; needs no network and no loading script.

Example:

    from hf_compress.demo.dataset import load_scenes, prompt

    data = load_scenes("test", images=64, questions=4)   # 256 rows
    row = data[0]                                        # row["image"] is a PIL image
    text = prompt(row["question"])                       # what LLaVA's processor expects beside the image
"""

import io
import tempfile
from dataclasses import asdict, dataclass

import datasets
from PIL import Image

from hf_compress.demo.scenes import SIZE, SPLITS, SceneRenderer, ask, check_split

TOKEN = 8  # pixels, side of a visual token of both demonstration models
FEWEST, MOST = 8, SIZE // TOKEN  # visual tokens per side of a picture of mixed resolutions
GREY = (122, 117, 104)  # the mean that the processors subtract

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),  # 112 x 112, RGB; "mixed": 64 to 112 pixels a side
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "type": datasets.Value("string"),  # one of scenes.QUESTION_TYPES
        "image_id": datasets.Value("int32"),  # number of the scene in its split
        "objects": datasets.List(
            {
                "kind": datasets.Value("string"),  # "digit" or "shape"
                "name": datasets.Value("string"),
                "color": datasets.Value("string"),
                "cell": datasets.Value("int32"),  # 0..8, row by row
                "box": datasets.List(datasets.Value("int32"), length=4),  # pixels: left, top, right, bottom
            }
        ),
    }
)


@dataclass
class ScenesConfig(datasets.BuilderConfig):
    """How much to render.

    Args:
        images: scenes per split.
        questions: questions per scene, each one row; 1 to 20.
        seed: any integer; scene i of a split depends on the split, the seed and i alone.
        splits: which splits to render. "train" and "validation" need scikit-image.
        mixed: every scene at a resolution of its own, 64 to 112 pixels a side, whole visual tokens.
    """

    images: int = 256
    questions: int = 4
    seed: int = 0
    splits: tuple = SPLITS
    mixed: bool = False


class Scenes(datasets.GeneratorBasedBuilder):
    """One row per question; rows of one scene follow each other and repeat its image."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = ScenesConfig
    BUILDER_CONFIGS = [ScenesConfig(name="default", version=VERSION)]

    def _info(self):
        return datasets.DatasetInfo(description=__doc__, features=FEATURES)

    def _split_generators(self, dl_manager):
        return [datasets.SplitGenerator(split, gen_kwargs={"split": split}) for split in self.config.splits]

    def _generate_examples(self, split):
        renderer = SceneRenderer(split, self.config.seed)
        for index in range(self.config.images):
            scene = renderer[index]
            size = _size(renderer.rng("size", index)) if self.config.mixed else (SIZE, SIZE)
            image = {"bytes": png(scene.pixels, size), "path": None}
            objects = [asdict(o) | {"box": _scaled(o.box, size)} for o in scene.objects]
            asked = ask(scene.objects, self.config.questions, renderer.rng("questions", index))
            for number, (kind, question, answer) in enumerate(asked):
                row = {"image": image, "question": question, "answer": answer, "type": kind}
                yield (index, number), row | {"image_id": index, "objects": objects}


def _size(rng):
    """(width, height) in pixels: 8 to 14 visual tokens a side, nearly square, as the Qwen2.5-VL was trained on."""
    rows = rng.randint(FEWEST, MOST)
    columns = min(max(rows + rng.randint(-2, 2), FEWEST), MOST)
    return columns * TOKEN, rows * TOKEN


def _scaled(box, size):
    """A box of the rendered scene in pixels of the picture."""
    return [round(edge * side / SIZE) for edge, side in zip(box, (*size, *size))]


def png(pixels, size=None):
    """PNG bytes of a uint8 (height, width, 3) array, at another (width, height) if so wanted."""
    buffer, image = io.BytesIO(), Image.fromarray(pixels)
    (image.resize(size, Image.Resampling.BICUBIC) if size else image).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def prepared(builder, split, **wanted):
    """A split of a builder of this package as a `datasets.Dataset` in memory; nothing is left on disk."""
    quiet = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = builder(cache_dir=folder, splits=(split,), **wanted)
            made.download_and_prepare()
            return made.as_dataset(split, in_memory=True)
    finally:
        if quiet:
            datasets.enable_progress_bars()


def load_scenes(split="test", images=256, questions=4, seed=0, mixed=False):
    """Renders a split and returns it; 256 scenes take a second or two. Nothing is left on disk.

    Args:
        split: "test" (scikit-learn and matplotlib suffice), "train" or "validation" (need scikit-image).
        images: scenes.
        questions: questions per scene, 1 to 20.
        seed: any integer; the default is the set that the reported accuracies refer to.
        mixed: every scene at a resolution of its own: 64 to 112 pixels a side, which are 64 to 196 visual tokens of
            the Qwen2.5-VL. Scenes and questions are those of the default.

    Returns:
        `datasets.Dataset` of images * questions rows with FEATURES, scene by scene. The first rows do not change
        when more scenes are asked for.

    Raises:
        ValueError: no such split, or counts that make no sense.
        ImportError: a package that ships the photographs of this split is missing.
    """
    check_split(split)
    if images < 1:
        raise ValueError(f"images={images}; choose 1 or more")
    if not 1 <= questions <= 20:
        raise ValueError(f"questions={questions}; choose 1 to 20")
    SceneRenderer(split, seed)  # a missing package is reported here as itself, not wrapped by the builder
    return prepared(Scenes, split, images=images, questions=questions, seed=seed, mixed=mixed)


def prompt(question):
    """The text that goes with one image for the demonstration LLaVA: its chat template, written out.

    The Qwen2.5-VL has other marks around the image; `processor.apply_chat_template` serves both.

    Args:
        question: such as "what digit is at the top left ?".
    """
    return f"USER: <image>\n{question} ASSISTANT:"


def grey_image():
    """A picture without information, 112 x 112 mean grey: what remains correct with it is guessed."""
    return Image.new("RGB", (SIZE, SIZE), GREY)
