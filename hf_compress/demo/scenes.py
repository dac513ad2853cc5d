"""Small scenes with exact answers: handwritten digits and coloured shapes on photographs.

A scene is a 112 x 112 RGB picture. Its background is a crop of a real photograph; on it lie two to four real
handwritten digits (`sklearn.datasets.load_digits`) and one to three drawn shapes, at different places of a 3 x 3
grid. Everything is known about a scene, so questions and answers follow by rule.

Scene `index` of a split is a pure function of (split, seed, index): it does not depend on how many scenes are
asked for, nor on the ones rendered before. The three splits share neither handwritten digits nor photographs.

The test split needs only scikit-learn and matplotlib, which ship the photographs it uses. The other two splits,
which only training needs, take theirs from scikit-image.
"""

import importlib
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 112  # pixels, height and width of a scene
GRID = 3  # cells per side
CELL = SIZE / GRID  # pixels, side of a cell
COLORS = {
    "red": (232, 38, 38),
    "green": (40, 190, 60),
    "blue": (50, 90, 245),
    "yellow": (245, 222, 40),
    "purple": (190, 60, 225),
    "white": (245, 245, 245),
}
COLOR_NAMES = tuple(COLORS)
DIGITS = tuple("0123456789")
SHAPES = ("circle", "square", "triangle", "cross")
NAMES = DIGITS + SHAPES
PLACES = tuple(f"{row} {col}" for row in ("top", "middle", "bottom") for col in ("left", "center", "right"))
SPLITS = ("train", "validation", "test")

# Photographs per split: package -> file names. Only files that lie in the installed wheels are listed.
PHOTOS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "skimage": (
            "astronaut.png", "brick.png", "camera.png", "coffee.png", "coins.png", "grass.png",
            "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
        )
    },
    "validation": {"skimage": ("chelsea.png", "gravel.png")},
    "test": {"sklearn": ("china.jpg", "flower.jpg"), "matplotlib": ("grace_hopper.jpg",)},
}  # fmt: skip
PHOTO_FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "matplotlib": "mpl-data/sample_data"}
PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}


@dataclass(frozen=True)
class SceneObject:
    """One digit or shape of a scene."""

    kind: str  # "digit" or "shape"
    name: str  # one of NAMES
    color: str  # one of COLOR_NAMES
    cell: int  # 0..8, row by row; PLACES[cell] in words
    box: tuple[int, int, int, int]  # pixels: left, top, right, bottom; right and bottom are outside

    @property
    def place(self):
        """The cell in words, such as "top left"."""
        return PLACES[self.cell]


@dataclass(frozen=True)
class Scene:
    """A rendered scene with all that is known about it."""

    pixels: np.ndarray  # (112, 112, 3) uint8, RGB
    objects: tuple[SceneObject, ...]
    owner: np.ndarray  # (112, 112) uint8: 0 background, 1 + i where object i is painted


def check_split(split):
    """Raises ValueError unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} does not exist; choose one of {', '.join(SPLITS)}")


@cache
def handwritten_digits(split):
    """Handwritten digits of one split, by class.

    Of each class, 36 digits are kept for test, 12 for validation, and about 130 are left for training.

    Args:
        split: one of SPLITS.

    Returns:
        list of ten float32 arrays (n, 12, 12) in 0..255: the 8 x 8 digits with a margin of two pixels.
    """
    from sklearn.datasets import load_digits

    check_split(split)
    data = load_digits()
    inked = np.pad(data.images.astype(np.float32) * (255 / 16), ((0, 0), (2, 2), (2, 2)))
    part = {"test": slice(0, 36), "validation": slice(36, 48), "train": slice(48, None)}[split]
    shuffle = np.random.RandomState(0)
    return [inked[shuffle.permutation(np.flatnonzero(data.target == digit))[part]] for digit in range(10)]


@cache
def photographs(split):
    """Photographs of one split, each at up to three scales (shorter side 150, 240 and 400 pixels).

    Args:
        split: one of SPLITS.

    Returns:
        list of uint8 arrays (height, width, 3), no side shorter than 112 pixels.

    Raises:
        ImportError: a package that ships photographs of this split is missing.
        FileNotFoundError: the package is there, the photograph is not.
    """
    check_split(split)
    scaled = []
    for package, names in PHOTOS[split].items():
        for name in names:
            picture = Image.open(_photo_path(package, name, split)).convert("RGB")
            for side in (150, 240, 400):
                scale = side / min(picture.size)
                if scale <= 1.5:
                    size = max(SIZE, int(picture.width * scale)), max(SIZE, int(picture.height * scale))
                    scaled.append(np.asarray(picture.resize(size, Image.Resampling.BICUBIC)))
    return scaled


def _photo_path(package, name, split):
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        needed = PACKAGES[package]
        message = f"the {split} split takes photographs from {needed}: run `pip install {needed}`"
        if split != "test":
            message += " (the test split does not need it)"
        raise ImportError(message) from error
    path = Path(module.__path__[0]) / PHOTO_FOLDERS[package] / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: this version of {PACKAGES[package]} does not ship {name}")
    return path


class SceneRenderer:
    """Renders scenes of one split; `renderer[index]` costs about a millisecond.

    Args:
        split: one of SPLITS.
        seed: any integer; another seed gives other scenes of the same digits and photographs.
        share: how many consecutive scenes lie on the same background. Training uses 2, to compare features of
            the same background under different objects.
    """

    def __init__(self, split="test", seed=0, share=1):
        self.split, self.seed, self.share = split, seed, share
        self.photos = photographs(split)
        self.digits = handwritten_digits(split)

    def rng(self, purpose, index):
        """A `random.Random` that depends only on (split, seed, purpose, index)."""
        return random.Random(f"{self.split}/{self.seed}/{purpose}/{index}")

    def __getitem__(self, index):
        """Scene number `index` (any integer from 0 on)."""
        canvas, noise = background(self.photos, self.rng("background", index // self.share))
        rng = self.rng("objects", index)
        owner = np.zeros((SIZE, SIZE), np.uint8)
        digits, shapes = rng.choice((2, 2, 3, 3, 4)), rng.choice((1, 1, 2, 2, 3))
        objects = []
        for i, cell in enumerate(rng.sample(range(GRID * GRID), digits + shapes)):
            name = rng.choice(DIGITS if i < digits else SHAPES)
            mask = digit_mask(rng.choice(self.digits[int(name)]), rng) if i < digits else shape_mask(name, rng)
            left, top = _corner(cell, mask.shape[0], rng)
            color = rng.choice(COLOR_NAMES)
            paint(canvas, mask, left, top, [c + rng.uniform(-18, 18) for c in COLORS[color]])
            box = (left, top, left + mask.shape[1], top + mask.shape[0])
            owner[box[1] : box[3], box[0] : box[2]][mask > 100] = i + 1
            objects.append(SceneObject("digit" if i < digits else "shape", name, color, cell, box))
        pixels = np.clip(canvas + noise, 0, 255).astype(np.uint8)
        return Scene(pixels, tuple(objects), owner)

    def questions(self, index, n):
        """`n` questions about scene `index`: a list of (type, question, answer), each question at most once."""
        return ask(self[index].objects, n, self.rng("questions", index))


def background(photos, rng):
    """A muted crop, float32 (112, 112, 3), and its noise, float32 (112, 112, 1); both in 0..255 units."""
    photo = rng.choice(photos)
    top, left = (rng.randrange(length - SIZE + 1) for length in photo.shape[:2])
    crop = photo[top : top + SIZE, left : left + SIZE]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    crop = crop.astype(np.float32)
    grey = crop.mean(2, keepdims=True)
    crop = grey + (crop - grey) * rng.uniform(0.2, 0.8)  # less saturated than the objects
    crop = (crop - crop.mean()) * rng.uniform(0.35, 0.85) + rng.uniform(40, 150)  # less contrast, any brightness
    noise = np.random.RandomState(rng.getrandbits(32)).randn(SIZE, SIZE, 1) * rng.uniform(0, 6)
    return np.clip(crop, 0, 255), noise.astype(np.float32)


def digit_mask(digit, rng, sides=(17, 33)):
    """Opacity, uint8 (side, side), of a handwritten (12, 12) digit: enlarged to `sides` pixels, slightly warped."""
    side, angle, shear = rng.randint(*sides), rng.uniform(-0.22, 0.22), rng.uniform(-0.18, 0.18)
    wide, high, ink = rng.uniform(0.88, 1.15), rng.uniform(0.88, 1.12), rng.uniform(1.25, 1.65)
    matrix = np.array([[np.cos(angle) * wide, shear - np.sin(angle)], [np.sin(angle), np.cos(angle) * high]])
    matrix *= 10 / side  # ten of the twelve source pixels fill the mask
    offset = np.array([6.0, 6.0]) - matrix @ np.array([side / 2, side / 2])
    affine = [matrix[0, 0], matrix[0, 1], offset[0], matrix[1, 0], matrix[1, 1], offset[1]]
    warped = Image.fromarray(digit).transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(warped) * ink - 51, 0, 255).astype(np.uint8)


def shape_mask(name, rng, sides=(12, 28)):
    """Opacity, uint8 (side, side), of a slightly rotated shape of `sides` pixels, drawn at four times its size."""
    side = rng.randint(*sides)
    big = side * 4
    picture = Image.new("L", (big, big), 0)
    draw, edge, mid = ImageDraw.Draw(picture), big * 0.04, big / 2
    if name == "circle":
        draw.ellipse([edge, edge, big - edge, big - edge], fill=255)
    elif name == "square":
        draw.rectangle([big * 0.1, big * 0.1, big * 0.9, big * 0.9], fill=255)
    elif name == "triangle":
        draw.polygon([(mid, edge), (big - edge, big - 2 * edge), (edge, big - 2 * edge)], fill=255)
    else:
        half = big * rng.uniform(0.13, 0.18)
        draw.rectangle([mid - half, edge, mid + half, big - edge], fill=255)
        draw.rectangle([edge, mid - half, big - edge, mid + half], fill=255)
    rotated = picture.rotate(rng.uniform(-14, 14), Image.Resampling.BICUBIC)
    return np.asarray(rotated.resize((side, side), Image.Resampling.BOX))


def _corner(cell, side, rng):
    """Left and top pixel of a mask of `side` pixels somewhere in `cell`, one pixel away from the scene's border."""
    slack = max(0.0, (CELL - side) / 2)
    centers = ((cell % GRID + 0.5) * CELL, (cell // GRID + 0.5) * CELL)
    return [int(np.clip(c + rng.uniform(-slack, slack) - side / 2, 1, SIZE - side - 1)) for c in centers]


def paint(canvas, mask, left, top, rgb):
    """Darkens a one-pixel rim around the mask, then paints the mask in `rgb`, in place."""
    height, width = mask.shape
    rim = canvas[top - 1 : top + height + 1, left - 1 : left + width + 1]
    rim *= 1 - 0.75 / 255 * _dilate(np.pad(mask, 1)).astype(np.float32)[..., None]
    inside = canvas[top : top + height, left : left + width]
    alpha = mask.astype(np.float32)[..., None] / 255
    inside[:] = inside * (1 - alpha) + np.clip(np.float32(rgb), 0, 255) * alpha


def _dilate(mask):
    """Grows a mask by one pixel in all eight directions."""
    tall = mask.copy()
    tall[1:] = np.maximum(tall[1:], mask[:-1])
    tall[:-1] = np.maximum(tall[:-1], mask[1:])
    wide = tall.copy()
    wide[:, 1:] = np.maximum(wide[:, 1:], tall[:, :-1])
    wide[:, :-1] = np.maximum(wide[:, :-1], tall[:, 1:])
    return wide


# ---------------------------------------------------------------------------------------------------- questions
# Each function takes the objects and a random generator and returns (question, answer), or None where the scene
# allows no such question.


def _of_kind(objects, kind):
    return [o for o in objects if o.kind == kind]


def _unique(objects):
    """Objects whose name occurs once; digits twice as often as shapes."""
    alone = [o for o in objects if sum(other.name == o.name for other in objects) == 1]
    return _of_kind(alone, "digit") * 2 + _of_kind(alone, "shape")


def _digit_at(objects, rng):
    o = rng.choice(_of_kind(objects, "digit"))
    text = rng.choice(("what digit is at the {} ?", "which number is at the {} ?", "read the digit at the {} ."))
    return text.format(o.place), o.name


def _shape_at(objects, rng):
    o = rng.choice(_of_kind(objects, "shape"))
    return rng.choice(("what shape is at the {} ?", "which shape is at the {} ?")).format(o.place), o.name


def _color_at(objects, rng):
    o = rng.choice(objects)
    text = rng.choice(("what color is the {} at the {} ?", "which color has the {} at the {} ?"))
    return text.format(o.kind, o.place), o.color


def _what_at(objects, rng):
    taken = {o.place for o in objects}
    if rng.random() < 0.2:
        return f"what is at the {rng.choice([p for p in PLACES if p not in taken])} ?", "nothing"
    o = rng.choice(objects)
    return f"what is at the {o.place} ?", f"{o.color} {o.name}"


def _color_of(objects, rng):
    if not (alone := _unique(objects)):
        return None
    o = rng.choice(alone)
    return rng.choice(("what color is the {} ?", "which color has the {} ?")).format(o.name), o.color


def _where(objects, rng):
    if not (alone := _unique(objects)):
        return None
    o = rng.choice(alone)
    return f"where is the {o.name if rng.random() < 0.7 else f'{o.color} {o.name}'} ?", o.place


def _count(objects, rng):
    what = rng.choice(("digit", "shape", "color"))
    if what == "color":
        color = rng.choice(objects).color if rng.random() < 0.8 else rng.choice(COLOR_NAMES)
        return f"how many {color} objects are there ?", str(sum(o.color == color for o in objects))
    text = rng.choice(("how many {}s are there ?", "count the {}s ."))
    return text.format(what), str(len(_of_kind(objects, what)))


def _exist(objects, rng):
    present = rng.random() < 0.5
    if rng.random() < 0.5:
        names = {o.name for o in objects}
        digit = rng.choice([d for d in DIGITS if (d in names) == present])
        return f"is there a {digit} ?", "yes" if present else "no"
    pairs = {(o.color, o.name) for o in objects}
    o = rng.choice(objects)
    color = o.color if present else rng.choice([c for c in COLOR_NAMES if (c, o.name) not in pairs])
    return f"is there a {color} {o.name} ?", "yes" if present else "no"


def _extreme(objects, rng):
    values = [int(o.name) for o in _of_kind(objects, "digit")]
    word, value = rng.choice((("largest", max(values)), ("smallest", min(values))))
    return rng.choice(("what is the {} digit ?", "which digit is the {} ?")).format(word), str(value)


def _list(objects, rng):
    digits = sorted(_of_kind(objects, "digit"), key=lambda o: o.cell)
    return rng.choice(("read all the digits .", "list all the digits .")), " ".join(o.name for o in digits)


QUESTIONS = {  # type -> (relative frequency, function)
    "digit_at": (3.0, _digit_at),
    "shape_at": (1.5, _shape_at),
    "color_at": (1.5, _color_at),
    "what_at": (2.5, _what_at),
    "color_of": (2.0, _color_of),
    "where": (2.5, _where),
    "count": (2.0, _count),
    "exist": (1.5, _exist),
    "extreme": (1.5, _extreme),
    "list": (2.0, _list),
}
QUESTION_TYPES = tuple(QUESTIONS)


def ask(objects, n, rng):
    """Questions about a scene, each at most once.

    Args:
        objects: the scene's SceneObjects.
        n: how many questions; every scene has at least 20 different ones.
        rng: `random.Random`.

    Returns:
        list of n tuples (type, question, answer). Answers are one to four words.
    """
    if not 0 <= n <= 20:
        raise ValueError(f"questions={n} per scene; choose 0 to 20")
    return draw_questions(QUESTIONS, objects, n, rng)


def draw_questions(kinds, about, n, rng):
    """`n` different questions, a list of (type, question, answer).

    Args:
        kinds: type -> (relative frequency, function of `about` and `rng` that returns (question, answer) or None).
    """
    weights = [weight for weight, _ in kinds.values()]
    asked: dict[str, tuple[str, str, str]] = {}
    while len(asked) < n:
        kind = rng.choices(tuple(kinds), weights)[0]
        found = kinds[kind][1](about, rng)
        if found and found[0] not in asked:
            asked[found[0]] = (kind, *found)
    return list(asked.values())
