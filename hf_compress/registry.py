"""The one list of methods: `@register` fills it, everything else (API, README table, CLI, tests) reads it."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

STAGES = ("vision", "prompt", "decoder", "cache")  # the order in which a forward meets them
NEEDS = {
    "visual": "visual tokens in the prompt",
    "cls": "a [CLS] attention row, or a surrogate of it",
    "video": "videos in the prompt",
    "places": "crops whose places in their image are known",
    "tower": "a vision tower whose blocks can be entered one by one",
    "columns": "the attention of every prompt row (streamed: on its way on a CPU, else in a second pass)",
}


@dataclass(frozen=True)
class Spec:
    """One registered method: its name, its stage, the paper it follows and what it needs from a model."""

    name: str
    stage: str
    paper: str
    needs: frozenset[str]
    cls: type

    @property
    def summary(self) -> str:
        """First line of the method's docstring."""
        return (self.cls.__doc__ or "").strip().splitlines()[0]

    @property
    def example(self) -> dict[str, object]:
        """Budget and knobs for small models, see `Method.example`."""
        return dict(getattr(self.cls, "example", {}))

    @property
    def knobs(self) -> dict[str, object]:
        """The method's own arguments and their defaults."""
        return {f.name: f.default for f in fields(self.cls)}


_METHODS: dict[str, Spec] = {}


def register(name: str, *, stage: str, paper: str, needs: Iterable[str] = ()) -> Callable[[type], type]:
    """Class decorator that makes a method known under `name`.

    Raises:
        ValueError: the name is taken, the stage or a need is unknown, or the class is none of that stage or has no
            docstring.
    """
    if stage not in STAGES:
        raise ValueError(f"register({name!r}): stage={stage!r} is not one of {STAGES}")
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
        _METHODS[name] = Spec(name, stage, paper, frozenset(needs), cls)
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
    if not isinstance(name, str):
        raise ValueError(f"{argument}={name!r} must be the name of a method; known methods are {', '.join(known)}")
    if name in known:
        return known[name]
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known methods are {', '.join(known)}"
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
