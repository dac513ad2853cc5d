"""What methods have in common, one kind per stage: the knobs each of them has, and the verbs the engine calls."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from hf_compress.methods.holding import Holding
from hf_compress.methods.knobs import check_choice as check_choice
from hf_compress.methods.knobs import check_count as check_count
from hf_compress.methods.knobs import check_counts as check_counts
from hf_compress.methods.knobs import check_file as check_file
from hf_compress.methods.knobs import check_layers as check_layers
from hf_compress.methods.knobs import check_number as check_number
from hf_compress.methods.knobs import check_positions as check_positions
from hf_compress.methods.reader import Reader
from hf_compress.signals import Assignment, Block, CacheView, DecoderView, Patches, Read, Repetition, Text, Tokens
from hf_compress.stores.store import Store
from hf_compress.tensors.rows import best_rows

Count = TypeVar("Count", Tensor, int)


class Method:
    """What methods of every stage may have.

    Attributes:
        example: budget and smallest knobs, with which it acts on four layers and a dozen of tokens: `compress(name,
            **example)`. Tests run every method with it, and the README shows it.
        needs_weights: a new module of its own gives nothing of use: without `weights=` it runs in training only, until
            it has been trained.
        counts_only: its module only says how many rows stay: where a budget says that, there is none.
    """

    example: ClassVar[Mapping[str, Any]] = {"ratio": 0.5}
    needs_weights: ClassVar[bool] = False
    counts_only: ClassVar[bool] = False

    def module(self, model: nn.Module) -> nn.Module | None:
        """What it trains, new, for the widths of `model`; None: nothing.

        It becomes part of the model (`model.compressor`) in the precision of its embeddings: `Trainer` trains it, and
        checkpoints hold it. The method finds it in what it is shown, and never holds it itself: PEFT puts others in its
        place.
        """
        return None

    @classmethod
    def trains(cls) -> bool:
        """Whether it has such a module."""
        return cls.module is not Method.module

    def parts(self, layers: int, tokens: int | None, ratio: Fraction | None, keep: int | None) -> Mapping[str, Part]:
        """Of a method that acts in several stages: by stage what acts there, and its budget; {}: itself, in its own.

        `layers` are those of the language model, `tokens` those of every image where that is known.
        """
        return {}


Part = tuple[Method, Fraction | None, int | None]  # a method, its ratio, its keep


@dataclass
class VisionMethod(Method):
    """Decides once per image, before the language model.

    What it sees at a time, as one sequence with one exact budget, is its `scope`: "crop" (a crop or a frame), "image"
    (all crops of an image; frames one by one), "video" (all frames of a video; crops one by one) or "sample" (all
    images, or all videos, of a sample). Tokens that pass (`passes`) leave the cache at the end of the prompt.

    Args:
        positions: "auto" (consecutive positions on 1-D RoPE, original ones on M-RoPE), "renumber" or "original"; or a
            number above 0 and at most 1: how far visual tokens lie apart (V2PE, arXiv:2412.09616); or "shared:4": four
            that follow each other lie at one position (MouSi, arXiv:2401.17221). Text behind them goes on at the next
            whole position. Where all tokens stay nothing moves; models with M-RoPE or sliding windows, and decoder and
            cache methods beside it, are refused.
    """

    positions: str | float = "auto"

    scope: ClassVar[str] = "crop"
    at_most: ClassVar[bool] = False  # it may keep fewer than asked (a control, see `downsample`)
    adaptive: ClassVar[bool] = False  # `assign(tokens, None)` decides how many stay, `ratio="adaptive"` asks for that
    passes: ClassVar[bool] = False  # what does not stay goes through the language model, seen by its own sequence alone

    def __post_init__(self) -> None:
        check_positions(self.positions)

    def reads(self, depth: int) -> set[Read]:
        """What it reads of a vision tower of so many blocks that see the whole image."""
        return set()

    def tower_reader(self, model: nn.Module, width: int, depth: int) -> nn.Module | None:
        """What it trains where it reads hidden states of the tower, in place of `module`.

        Args:
            width: of these states; depth: as of `reads`, as the config of the model says.
        """
        return None

    @classmethod
    def trains(cls) -> bool:
        return super().trains() or cls.tower_reader is not VisionMethod.tower_reader

    def prepare(self, model: nn.Module) -> None:
        """Called once by `compress`, before `check`: fetch what it needs to know of this model (calibration files).

        Raises:
            ValueError: it is not there, or belongs to another model.
        """

    def check(self, grid: tuple[int, int], keep: int) -> None:
        """Raises ValueError if an image of the token grid (h, w) cannot have `keep` tokens, saying which it can."""

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Which `keep` of the N tokens of each image survive, and what is merged into them."""
        raise NotImplementedError

    def note(self, tokens: Tokens) -> dict[str, Tensor]:
        """(n, N) by name: what the decoder method of the same call finds in its `memory` (0 on text), of all tokens."""
        return {}

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor | tuple[Tensor, Tensor] | None:
        """(n, K, D) with gradient: what stands at the kept tokens; None: what `assignment` says.

        With it, of a method that reads the question, (n, T, D): what is added to the embedded text behind each image,
        before the language model reads it (of several images the mean). Text that comes in a later call is not told.
        Not asked for images that keep all their tokens.
        """
        return None


@dataclass
class TowerMethod(VisionMethod):
    """Acts inside the vision tower where the architecture allows it (`reduce`), else on its output (`assign`).

    Inside the tower the weights of a group must sum to one. With `Read("tower", EVERY, "attention")` among its `reads`
    it acts in the blocks that see the whole image, else in all.

    Args:
        where: "tower", "output", or "auto" (the tower if it can be entered, else the output).
    """

    where: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("where", self.where, ("auto", "tower", "output"))

    @property
    def inside(self) -> bool:
        """Whether it wants to act in the tower."""
        return self.where != "output"

    def tower_module(self, width: int, blocks: int) -> nn.Module | None:
        """What it trains where it acts in the tower, in place of `module`.

        Args:
            width: of the hidden states; blocks: in which it acts, as the config of the model says.
        """
        return None

    @classmethod
    def trains(cls) -> bool:
        return super().trains() or cls.tower_module is not TowerMethod.tower_module

    @property
    def admits(self) -> bool:
        """Whether it says which tokens enter the tower."""
        return type(self).admit is not TowerMethod.admit

    def admit(self, patches: Patches, keep: int) -> Tensor:
        """(n, N) bool: the tokens whose patches enter the first block, position embeddings added; `keep` as below."""
        raise NotImplementedError

    def reduce(self, block: Block, keep: int) -> Assignment | None:
        """After the attention of `block`: how its m tokens become fewer, or None.

        Behind the last block `keep` patches must be left, and the n images may differ before (`Assignment.valid`). Of
        methods that are `adaptive` it can be None: they decide.
        """
        return None

    def add(self, block: Block, keep: int, answer: Assignment) -> Tensor | None:
        """(n, K, D), with gradient: what is added to the hidden states of the tokens that stay; None: nothing.

        Asked where `reduce` gave an `answer`, and in its order. A gate g is `(g - 1) * answer.apply(block.hidden)`.
        """
        return None


@dataclass
class PixelMethod(VisionMethod):
    """Acts on the pixels where the checkpoint takes any resolution (`resize`), else on the features (`assign`)."""

    def resize(self, grid: tuple[int, int], keep: int) -> tuple[int, int]:
        """The token grid (h, w) that the image of token grid `grid` is resized to; at most `keep` tokens."""
        raise NotImplementedError


@dataclass
class PromptMethod(Method):
    """Decides once per prompt which of its text enters the language model; visual tokens are not touched.

    Neither rows with labels nor those that predict one may go. The ids, the positions of what is generated and what is
    returned stay those of the whole prompt.

    Args:
        positions: as of `VisionMethod`, which decides where both act.
        keep_first: rows of text at the beginning of every prompt (a system message) that always stay.
        keep_last: rows of text at its end (a question, the mark of an answer) that always stay.
    """

    positions: str = "auto"
    keep_first: int = 4
    keep_last: int = 32

    def __post_init__(self) -> None:
        check_choice("positions", self.positions, ("auto", "renumber", "original"))
        check_count("keep_first", self.keep_first, least=0)
        check_count("keep_last", self.keep_last, least=1)

    def reads(self, depth: int) -> set[Read]:
        """What it reads of a language model of so many layers, in a further forward over the whole prompt."""
        return set()

    def assign(self, text: Text, keep: int) -> Assignment:
        """Which `keep` of the N tokens of one sample that may go stay, and what is merged into them."""
        raise NotImplementedError

    def make(self, text: Text, assignment: Assignment) -> Tensor | None:
        """(1, K, D), with gradient: what stands at `assignment.kept` in place of the tokens; None: what they were.

        Not asked for prompts that keep all their tokens.
        """
        return None


@dataclass
class DecoderMethod(Method):
    """Drops (or merges, or lets wait) rows between decoder layers; visual ones unless it says otherwise.

    Args:
        scope: "joint" ranks all rows of a sample together, "per_image" shares the budget over its images.
    """

    scope: str = "joint"

    adaptive: ClassVar[bool] = False  # `decide(view, None)` finds how many stay, `ratio="adaptive"` asks for that
    source: ClassVar[str] = "own"  # attention of the layer just run, or "next": of the layer about to run
    back: ClassVar[int] = 0  # 1: of the layer before the one just run, too
    waits: ClassVar[bool] = False  # rows that do not go through a layer come back behind it
    gates: ClassVar[str] = "layer"  # what `gate` is for: the "layer" as a whole, or its "mlp" and rows that wait
    trims: ClassVar[bool] = False  # rows that go leave the caches of the layers run before, too
    discards: ClassVar[bool] = False  # rows left out of the attention of a layer leave its cache

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, ("joint", "per_image"))

    @property
    def picks(self) -> bool:
        """Whether it says which rows take part in the attention of a layer, and all of them go through the layer."""
        return type(self).among is not DecoderMethod.among

    @property
    def returns(self) -> bool:
        """Whether rows are there again behind a layer of the plan."""
        return self.waits or self.picks

    @property
    def idles(self) -> bool:
        """Whether generated tokens leave out layers."""
        return type(self).idle is not DecoderMethod.idle

    def boundaries(self, layers: int) -> Sequence[int]:
        """The layers of so many before which `plan` may drop tokens, whatever the ratio; by default all but 0."""
        return range(1, layers)

    def reads(self, depth: int) -> set[Read]:
        """What it reads of a language model of so many layers."""
        layers = {i - 1 - back for i in self.boundaries(depth) for back in range(self.back + 1)}
        return {Read("layer", i, "attention") for i in layers} if self.source == "own" else set()

    def plan(self, layers: int, tokens: int, ratio: Fraction) -> Mapping[int, int | None]:
        """{layer: rows that enter it and all later ones} for a sample with `tokens` rows that may go.

        Of a method whose rows wait: that go through it. None: `decide` finds how many. `ratio` is the fraction removed,
        averaged over all `layers`.

        Raises:
            ValueError: the budget cannot be reached; the message states the reachable interval.
        """
        raise NotImplementedError

    def removable(self, view: DecoderView) -> Tensor:
        """(B, S) bool: the rows that may go; asked at the entry for their number, and before each layer of the plan."""
        return view.visual

    def enter(self, view: DecoderView) -> None:
        """Called once per prompt, `view.hidden` being the embeddings: what is put into `view.memory` goes along.

        Attention cannot be read yet. Without gradient.
        """

    def among(self, view: DecoderView, keep: list[int] | None) -> Tensor | None:
        """(B, 1, Hkv or Hq, S) bool: the rows that take part in the attention of a layer of the plan; None: all do.

        In place of `decide`, asked inside the attention: `source="own"` is this very layer. Rows that may not go always
        take part. The others look at nothing there and nobody looks at them, and they go on with the rest of the layer.
        Their keys are cached unless it `discards`; what is generated looks at everything that is cached. Not for packed
        samples, nor under gradient checkpointing. `keep` is what the plan says for each sample.
        """
        return None

    def idle(self, layers: int, ratio: Fraction, nth: int) -> Collection[int]:
        """Of a method whose rows wait: the layers that the `nth` token behind a prompt, from 0, does not go through.

        Asked at every step with a cache; they must be among `boundaries`. Where answers stand in one forward with their
        prompt (training, or no cache), `plan` and `decide` have to say the same of their rows.
        """
        return ()

    def units(self, images: int) -> int:
        """How many times `keep` rows a sample with so many images keeps on average."""
        return images

    def score(self, view: DecoderView) -> Tensor:
        """(B, S): of the rows that may go those with the highest values stay."""
        return view.attention(source=self.source)

    def decide(self, view: DecoderView, keep: list[int] | None) -> Assignment | None:
        """How the rows before a layer of the plan become fewer; None: not at all. Without gradient.

        `keep` is what the plan says for each sample. By default the best scored stay, as they are. Rows that others
        predict from are among the best, whatever their score: they must not vanish.
        """
        assert keep is not None
        if (score := self.score(view)).shape != view.valid.shape:
            raise ValueError(f"score: {tuple(score.shape)} is not (B, S) = {tuple(view.valid.shape)}")
        score = score.masked_fill(view.speaks, float("inf"))
        part = view.image if self.scope == "per_image" else None
        stays = best_rows(score, view.removable, keep, part)
        return Assignment.selection(view.valid & ~view.removable | stays)

    def gate(self, view: DecoderView, answer: Assignment) -> Tensor | None:
        """(B, S) with gradient, where rows wait: a layer turns x into x + gate * (y - x); None: into y.

        Of a method whose rows do not wait those that go on are multiplied by it before the layer, where some leave.

        With `gates = "mlp"` what the MLP adds is multiplied by it, and rows that wait come out as gate * x; not under
        gradient checkpointing.
        Generated rows, and samples none of whose rows wait, go through as if it were 1.
        """
        return None


@dataclass
class CacheMethod(Method):
    """Compresses the KV cache: which entries stay, what becomes of the others, how the rest is stored.

    Args:
        policy: "grow" keeps every generated token; "hold" keeps the cache at its budget while decoding.
    """

    policy: str = "grow"

    ragged: ClassVar[bool] = False  # heads of a layer may keep different numbers of entries

    def __post_init__(self) -> None:
        check_choice("policy", self.policy, self.policies)

    @property
    def policies(self) -> tuple[str, ...]:
        """What `policy` may be."""
        return ("grow",) if self.holding() is None else ("grow", "hold")

    @classmethod
    def ranks(cls) -> bool:
        """Whether it ranks entries; else it stores all of them, in another way, and its own knobs may say all."""
        return cls.score is not CacheMethod.score

    def reads(self, depth: int) -> set[Read]:
        """What it reads of a language model of so many layers: see `CacheView`, and `Rereading` for `AGAIN`."""
        return set()

    def prepare(self, model: nn.Module, ratio: Fraction | None) -> None:
        """Called once by `compress`, before `check`: fetch what it needs to know of this model (calibration files).

        Raises:
            ValueError: it is not there, or belongs to another model.
        """

    def check(self, layers: int, ratio: Fraction | None) -> None:
        """Raises ValueError if a decoder of so many layers cannot meet the ratio."""

    def groups(self, layers: list[int]) -> list[list[int]]:
        """Which of the `layers` it acts on are decided and packed together, when the last of them is complete."""
        return [[layer] for layer in layers]

    def score(self, view: CacheView) -> Tensor:
        """(B, Hkv, S): the entries with the highest values stay; +inf protects."""
        raise NotImplementedError

    def layer_budget(self, budget: Tensor, lengths: Tensor, layer: int, layers: int) -> Tensor:
        """(B,) entries per head of one layer, from the mean budget (B,) and the prompt lengths (B,)."""
        return budget

    def head_budget(self, score: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
        """(B,) entries of every head, or (B, Hkv) entries per head with the same sum.

        Of one layer, or of a group with the heads of all of its layers side by side.
        """
        return budget

    def outside(self, view: CacheView) -> Tensor | None:
        """(B, 1 or Hkv, S) bool: entries that the ratio does not apply to; they all stay."""
        return None

    def protected(self, view: CacheView) -> Tensor | None:
        """(B, 1 or Hkv, S) bool: entries that stay whatever the budget, and count in it."""
        return None

    def merge(self, view: CacheView, slots: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Keys and values (B, Hkv, n, d) for the kept `slots` (B, Hkv, n), with evicted ones merged in; None: as is.

        `real` (same shape) is False on slots that only fill up a head with fewer entries; None: all are real.
        """
        return None

    def packing(self) -> Store | None:
        """How entries are packed; None: as they are."""
        return None

    def reader(self) -> Reader | None:
        """How the attention of the layers looks at what is stored; None: at everything."""
        return None

    def holding(self) -> Holding | None:
        """What keeps the cache at its budget while decoding; None: it cannot be held."""
        return None


class Rereading(CacheMethod):
    """A cache method that reads `AGAIN`: its entries are scored by further forwards over the prompt."""

    def repeats(self, image: list[int]) -> list[Repetition]:
        """The further forwards for one sample, `image` the ordinal of the image of each entry, -1 on text.

        What the entries of a layer received then is `view.scores`: the largest share over rows and query heads.
        """
        raise NotImplementedError


def head_size(model: nn.Module) -> int:
    """Channels of a key of the language model."""
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def clamp(count: Count, least: int, most: int | None = None) -> Count:
    """A count, or one per row, in these bounds; `least` wins."""
    if isinstance(count, int):
        return max(least, count if most is None else min(count, most))
    return count.clamp(least, most)
