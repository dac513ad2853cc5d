"""The one list of methods: `@register` fills it, everything else (API, README table, CLI, tests) reads it."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

from hf_compress import docstrings

STAGES = ("vision", "prompt", "decoder", "cache")  # the order in which a forward meets them
NEEDS = {
    "visual": "visual tokens in the prompt",
    "cls": "a [CLS] attention row, or a surrogate of it",
    "video": "videos in the prompt",
    "places": "crops whose places in their image are known",
    "pixels": "tokens made of squares of pixels that are known",
    "tower": "a vision tower whose blocks can be entered one by one",
    "columns": "the attention of every prompt row (streamed: on its way on a CPU, else in a second pass)",
}

KINDS = {  # by stage, in the order of the tables: what methods of a kind have in common, and when to take one
    "vision": {
        "control": "What every method has to beat at the same budget: take one to see what a method is worth.",
        "saliency": "What the vision tower itself attends to stays: the cheapest scores, good down to about a quarter "
        "of the tokens; below that near duplicates use up the budget.",
        "diversity": "Tokens that differ from each other stay, some by attention too: at small budgets, a tenth of the "
        "tokens and less, these lose least.",
        "merging": "What goes lives on in what stays: for dense pictures, and for fine-tuning, as gradients reach all "
        "tokens.",
        "crops": "The method shares the budget over the crops of a large image, its pages or several images.",
        "question": "The text behind the image says what stays: for one question per image; a second question may ask "
        "for what has gone.",
        "video": "Frames are compared with each other: for videos.",
        "trained": "A module of the method's own decides or fills what stays: pass `weights`, or train it.",
    },
    "prompt": {"text": "Text of the prompt that does not enter the language model."},
    "decoder": {
        "dropping": "Visual tokens leave between layers, where the model has already read them: mild budgets, and the "
        "first layers stay as expensive as they are.",
        "diversity": "Visual tokens that repeat each other leave between layers, whatever attention says.",
        "merging": "What goes is merged into what stays before and between the layers.",
        "skipping": "Rows miss single layers and come back behind them; nothing is lost, and less is saved.",
        "prompt": "Rows of the whole prompt leave between layers, text too: for long prompts, and text models.",
    },
    "cache": {
        "control": "What every method has to beat at the same bytes.",
        "attention": "What the prompt's last rows, or all of them, attend to stays: for a question that is already "
        "there.",
        "content": "What keys, values or places say, whoever asks: the cheapest, and for questions that come later.",
        "repetition": "The context is read again to see what it takes to repeat it: expensive once, best for many "
        "later questions.",
        "low bits": "All entries stay, in fewer bits: the mildest loss down to about a quarter of the bytes.",
        "merging": "Entries, or layers, are joined: all is remembered, less exactly.",
    },
}
OWN = "own"  # the kind of methods that name none


@dataclass(frozen=True)
class Spec:
    """One registered method: its name, stage and kind, the paper it follows and what it needs from a model."""

    name: str
    stage: str
    paper: str
    needs: frozenset[str]
    cls: type
    kind: str = OWN

    @property
    def summary(self) -> str:
        """First line of the method's docstring."""
        return docstrings.summary(self.cls)

    @property
    def when(self) -> str:
        """When to take a method of its kind; "" of those without one."""
        return KINDS[self.stage].get(self.kind, "")

    @property
    def title(self) -> str:
        """The title of the paper, as the docstring has it; "" of a control."""
        return docstrings.title(self.cls)

    @property
    def cost(self) -> str:
        """What a decision costs, as the docstring says; "" if it does not."""
        return docstrings.cost(self.cls)

    @property
    def example(self) -> dict[str, object]:
        """Budget and knobs for small models, see `Method.example`."""
        return dict(getattr(self.cls, "example", {}))

    @property
    def trains(self) -> bool:
        """Whether it has a module that is trained."""
        found: bool = getattr(self.cls, "trains", bool)()
        return found

    @property
    def needs_weights(self) -> bool:
        """Whether it is of no use before it is trained, see `Method.needs_weights`, whatever its budget."""
        return bool(getattr(self.cls, "needs_weights", False)) and not getattr(self.cls, "counts_only", False)

    @property
    def knobs(self) -> dict[str, object]:
        """The method's own arguments and their defaults."""
        return {f.name: f.default for f in fields(self.cls)}

    @property
    def meanings(self) -> dict[str, str]:
        """What these arguments mean, as the docstrings say."""
        return docstrings.knobs(self.cls)


_METHODS: dict[str, Spec] = {}


def register(
    name: str, *, stage: str, paper: str, needs: Iterable[str] = (), kind: str = OWN
) -> Callable[[type], type]:
    """Class decorator that makes a method known under `name`.

    Args:
        stage: one of `STAGES`.
        paper: "arXiv:..." or "control".
        needs: what a model must have, of `NEEDS`.
        kind: what it stands beside in tables, of `KINDS[stage]`.

    Raises:
        ValueError: the name is taken, the stage, the kind or a need is unknown, or the class is none of that stage or
            has no docstring.
    """
    if stage not in STAGES:
        raise ValueError(f"register({name!r}): stage={stage!r} is not one of {STAGES}")
    if kind != OWN and kind not in KINDS[stage]:
        raise ValueError(f"register({name!r}): kind={kind!r} is not one of {(*KINDS[stage], OWN)}")
    unknown = set(needs) - set(NEEDS)
    if unknown:
        raise ValueError(f"register({name!r}): unknown needs {sorted(unknown)}; known are {sorted(NEEDS)}")

    def add(cls: type) -> type:
        if name in _METHODS:
            raise ValueError(f"register({name!r}): the name is taken by {_METHODS[name].cls.__qualname__}")
        wanted = getattr(importlib.import_module("hf_compress.methods.base"), f"{stage.capitalize()}Method")
        if not issubclass(cls, wanted):
            raise ValueError(f"register({name!r}): a method of the {stage} stage is a {wanted.__name__}; {cls} is none")
        if not cls.__doc__:
            raise ValueError(f"register({name!r}): {cls.__qualname__} has no docstring")
        _METHODS[name] = Spec(name, stage, paper, frozenset(needs), cls, kind)
        return cls

    return add


def forget(names: Iterable[str]) -> None:
    """Methods that are known no longer."""
    for name in names:
        _METHODS.pop(name, None)


@functools.cache
def _import_all() -> None:
    """Every module of the folder of methods, by which they register themselves."""
    folder = importlib.import_module("hf_compress.methods")  # the attribute of that name is a function
    for module in pkgutil.walk_packages(folder.__path__, prefix=f"{folder.__name__}."):
        importlib.import_module(module.name)


def methods(stage: str | None = None) -> dict[str, Spec]:
    """All registered methods by name, in stage order; of one `stage` if given.

    Raises:
        ValueError: `stage` is not one of `STAGES`.
    """
    _import_all()
    if stage is not None and stage not in STAGES:
        raise ValueError(f"methods(stage={stage!r}): stage must be one of {STAGES}")
    found = sorted(_METHODS.values(), key=lambda s: (STAGES.index(s.stage), s.name))
    return {s.name: s for s in found if stage in (None, s.stage)}


def get(name: str, argument: str = "method") -> Spec:
    """The method called `name`.

    Args:
        argument: what the name was passed as, for the message.

    Raises:
        ValueError: there is none; the message names the nearest ones.
    """
    known = methods()
    everything = f"`hf-compress methods` lists all {len(known)}, hf_compress.methods() holds them"
    if not isinstance(name, str):
        raise ValueError(f"{argument}={name!r} must be the name of a method; {everything}")
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else everything
    raise ValueError(f"{argument}={name!r} is not a method of hf_compress; {hint}")


def check_stages(specs: Iterable[Spec]) -> None:
    """Whether methods can act together.

    Raises:
        ValueError: two of them act in one stage.
    """
    by_stage: dict[str, str] = {}
    for spec in (specs := list(specs)):
        if spec.stage in by_stage:
            raise ValueError(
                f"method={[s.name for s in specs]}: {by_stage[spec.stage]!r} and {spec.name!r} both act in the "
                f"{spec.stage} stage and cannot be combined; name one method per stage {STAGES}"
            )
        by_stage[spec.stage] = spec.name
