"""What `compress` refuses before anything is changed: methods and budgets that a model cannot have."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import nn

from hf_compress import registry
from hf_compress.engine.plans import plan
from hf_compress.engine.stage import Budgeted
from hf_compress.engine.vision import check_tower, image_budget, known_tokens
from hf_compress.methods.base import DecoderMethod, PixelMethod, PromptMethod, TowerMethod, VisionMethod
from hf_compress.methods.knobs import step_of
from hf_compress.patches.base import AS_CONFIGURED, DEEPEST, Architecture
from hf_compress.signals import LOSS, Read

KERNELS = ("sdpa", "eager")
SCOPES = ("crop", "image", "video", "sample")


def check_stages(model: nn.Module, adapter: Architecture, stages: dict[str, Budgeted]) -> None:
    """Needs of the methods against what the architecture gives, and budgets where they are known by now.

    Args:
        stages: in the order in which a forward meets them.

    Raises:
        ValueError: naming the method, and what works.
    """
    for where, stage in stages.items():
        _check_offer(model, adapter, stage, where)
    fixed = known_tokens(adapter, model, *stages.values())
    for stage in stages.values():
        if stage.schedule is not None:
            check_schedule(model, adapter, stage)
        if isinstance(stage.method, VisionMethod):
            _check_step(model, adapter, stage, stages)
            _check_passing(model, adapter, stage, stages)
            fixed = _check_vision(model, adapter, stage, fixed)
        elif isinstance(stage.method, PromptMethod):
            _check_prompt(model, adapter, stage, stages.get("vision"))
        elif isinstance(stage.method, DecoderMethod):
            _check_kernel(model, adapter, stage)
            layers = adapter.layers(adapter.decoder(model))
            changes = [Read("layer", i, "changes") for i, layer in enumerate(layers) if adapter.parts(layer)]
            _check_reads(model, adapter, stage, *changes)
            _check_plan(model, adapter, stage, fixed)
            if stage.method.idles and stage.ratio is None:
                raise ValueError(
                    f"method={stage.name!r} leaves layers out for generated tokens, which no count of rows says; give "
                    "ratio, the fraction of layers left out on average"
                )
            if stage.method.trims and stage.method.waits:
                raise ValueError(
                    f"method={stage.name!r} both waits (its rows come back) and trims (they leave the caches of "
                    "earlier layers); set one of them"
                )
            if stage.method.trims and "cache" in stages:
                raise ValueError(
                    f"method={stage.name!r} takes rows out of the caches of earlier layers, from which "
                    f"{stages['cache'].name!r} has chosen by then; compress with one of them"
                )
        else:
            _check_kernel(model, adapter, stage)
            _check_cache(model, adapter, stage)


def _check_offer(model: nn.Module, adapter: Architecture, stage: Budgeted, where: str) -> None:
    spec, kind = registry.get(stage.name), type(model).__name__
    lacking = _needs(spec) - adapter.gives
    if not lacking and where in adapter.stages:
        return
    works = [s.name for s in registry.methods().values() if s.stage in adapter.stages and _needs(s) <= adapter.gives]
    if lacking:
        what = f"needs {'; '.join(registry.NEEDS[n] for n in sorted(lacking))}, which {kind} does not have"
    else:
        why = f" ({adapter.without})" if adapter.without else ""
        what = f"acts in the {where} stage, and {kind} has {' and '.join(adapter.stages) or 'none'} only{why}"
    raise ValueError(f"method={stage.name!r} {what}; methods that work on it: {works}")


def _needs(spec: registry.Spec) -> frozenset[str]:
    """What it declares, and visual tokens where nothing else may go: a text model would leave it idle."""
    visual = getattr(spec.cls, "removable", None) is DecoderMethod.removable
    return spec.needs | {"visual"} if visual else spec.needs


def _check_kernel(model: nn.Module, adapter: Architecture, stage: Budgeted) -> None:
    found = adapter.decoder(model).config._attn_implementation
    if found not in KERNELS:
        raise ValueError(
            f"method={stage.name!r} gives layers their own masks, which attn_implementation={found!r} does not take; "
            f"load the model with one of {KERNELS}"
        )


def _check_vision(model: nn.Module, adapter: Architecture, stage: Budgeted, fixed: int | None) -> int | None:
    """Returns what is left of an image of `fixed` tokens, None where that is not known."""
    method, kind = stage.method, type(model).__name__
    _check_positions(model, adapter, stage)
    if method.scope not in SCOPES or (method.scope != "crop" and isinstance(method, (TowerMethod, PixelMethod))):
        raise ValueError(
            f"scope={method.scope!r} of method={stage.name!r} must be one of {SCOPES}, and 'crop' where it acts in the "
            "tower or on pixels"
        )
    _check_layers(model, adapter, stage)
    if method.passes:
        _check_kernel(model, adapter, stage)
    if isinstance(method, TowerMethod) and method.where == "tower" and not adapter.tower_blocks(model, DEEPEST):
        raise ValueError(f"where='tower': the tower of {kind} cannot be entered; use where='output' or 'auto'")
    method.prepare(model)
    if fixed is not None:
        _check_most(stage, fixed, kind)
    check_tower(stage, adapter, model, AS_CONFIGURED)
    if fixed is None or stage.open:
        return None
    keep, grid = image_budget(fixed, stage.ratio, stage.keep), adapter.grid(model, fixed, AS_CONFIGURED)
    return math.prod(method.resize(grid, keep)) if isinstance(method, PixelMethod) and grid else keep


def _check_positions(model: nn.Module, adapter: Architecture, stage: Budgeted) -> None:
    wanted = stage.method.positions
    if wanted not in ("auto", "original") and adapter.positions == "original":
        raise ValueError(
            f"positions={wanted!r} has no meaning for the (t, h, w) positions of {type(model).__name__}; "
            "use positions='original' or 'auto'"
        )


def _check_step(model: nn.Module, adapter: Architecture, stage: Budgeted, stages: dict[str, Budgeted]) -> None:
    """Raises ValueError where visual tokens cannot lie less than a whole position apart."""
    if step_of(wanted := stage.method.positions) is None:
        return
    decoder = adapter.decoder(model)
    layered = [s.name for where, s in stages.items() if where in ("decoder", "cache")]
    if layered or any(adapter.window(decoder, i) for i in range(len(adapter.layers(decoder)))):
        what = f"{layered[0]!r}" if layered else f"{type(model).__name__} with sliding windows"
        raise ValueError(
            f"positions={wanted!r} of {stage.name!r} goes neither with methods that act between or behind layers nor "
            f"with sliding windows: {what} measures distances in whole rows; use positions='auto'"
        )


def _check_passing(model: nn.Module, adapter: Architecture, stage: Budgeted, stages: dict[str, Budgeted]) -> None:
    """Raises ValueError where tokens cannot be hidden from text, or taken out of the cache behind the prompt."""
    if not stage.method.passes:
        return
    if "cache" not in adapter.stages:
        raise ValueError(
            f"method={stage.name!r} takes tokens out of the cache, and {type(model).__name__} has no cache stage "
            f"({adapter.without}); use another vision method, or another model"
        )
    if layered := [s.name for where, s in stages.items() if where in ("decoder", "cache")]:
        raise ValueError(
            f"method={stage.name!r} takes tokens out of the cache at the end of the prompt, from which {layered[0]!r} "
            "has chosen by then; compress with one of them"
        )
    if step_of(stage.method.positions) is not None:
        raise ValueError(
            f"positions={stage.method.positions!r}: method={stage.name!r} leaves all tokens of the prompt where they "
            "are; use positions='auto'"
        )


def _check_prompt(model: nn.Module, adapter: Architecture, stage: Budgeted, vision: Budgeted | None) -> None:
    wanted = stage.method.positions
    _check_positions(model, adapter, stage)
    if vision is not None and vision.method.positions != wanted:
        raise ValueError(
            f"positions={wanted!r} of {stage.name!r} and {vision.method.positions!r} of {vision.name!r}: rows that are "
            "left are numbered in one way; give both methods the same positions"
        )
    _check_reads(model, adapter, stage, LOSS)


def _check_reads(model: nn.Module, adapter: Architecture, stage: Budgeted, *further: Read) -> None:
    """Raises ValueError where a method reads what nobody will show it: neither attention of a layer nor `further`."""
    layers = len(adapter.layers(adapter.decoder(model)))
    known = {Read("layer", i, "attention") for i in range(layers)} | set(further)
    if wrong := stage.method.reads(layers) - known:
        more = [str(read) for read in further if read.where != "layer"] or sorted({repr(r.what) for r in further})
        what = " or ".join(["the 'attention' of one of them", *more])
        raise ValueError(
            f"method={stage.name!r} reads {sorted(wrong, key=str)}; {type(model).__name__} has {layers} layers, and a "
            f"method of its stage reads {what}"
        )


def _check_layers(model: nn.Module, adapter: Architecture, stage: Budgeted) -> None:
    """Raises ValueError where a vision method reads layers of the language model that are not there or keep a state."""
    layers = adapter.layers(adapter.decoder(model))
    for read in stage.method.reads(0):
        if read.where != "layer":
            continue
        if read.what != "attention" or not 0 <= read.at < len(layers) or not hasattr(layers[read.at], "self_attn"):
            raise ValueError(
                f"method={stage.name!r} reads {read}; of the layers 0 to {len(layers) - 1} of {type(model).__name__} "
                "those that attend show their 'attention'"
            )


def _check_most(stage: Budgeted, fixed: int, kind: str) -> None:
    if stage.keep is not None and stage.keep > fixed:
        raise ValueError(f"keep={stage.keep}: images of {kind} have {fixed} visual tokens here; keep at most {fixed}")


def _check_plan(model: nn.Module, adapter: Architecture, stage: Budgeted, fixed: int | None) -> None:
    """Where an image has any number of tokens, `keep` is a ratio that only the first forward knows."""
    layers, kind = len(adapter.layers(adapter.decoder(model))), type(model).__name__
    if "visual" not in _needs(registry.get(stage.name)):
        fixed = None  # it counts other rows
    if fixed is not None:
        _check_most(stage, fixed, kind)
    known, tokens = stage, fixed or 1000
    if stage.schedule is not None:
        tokens = fixed or stage.schedule.levels[0]
    elif fixed is None and stage.ratio is None:
        known = Budgeted(stage.name, stage.method, None, tokens)
    plan(known, layers, tokens, 1, adapter.min_drop_layer(model))


def check_schedule(model: nn.Module, adapter: Architecture, stage: Budgeted) -> None:
    """Raises ValueError if the schedule of a stage does not fit its method or the layers of the model."""
    assert stage.schedule is not None
    method, told = stage.method, f"schedule={stage.schedule}"
    levels, decoder = stage.schedule.levels, adapter.decoder(model)
    if len(levels) != (n := len(adapter.layers(decoder))):
        raise ValueError(
            f"{told} has {len(levels)} levels; {type(model).__name__} has {n} decoder layers, give one each"
        )
    if isinstance(method, DecoderMethod):
        slides = [False] * n
        if not method.returns and any(b > a for a, b in pairwise(levels)):
            raise ValueError(f"{told} rises; rows that method={stage.name!r} has dropped do not come back")
    else:
        slides = [adapter.window(decoder, i) is not None for i in range(n)]
        if not method.ranks():
            raise ValueError(f"{told}: method={stage.name!r} stores every entry; give ratio, the fraction of bytes")
        if any(len(group) > 1 for group in method.groups([i for i in range(n) if not slides[i]])):
            raise ValueError(f"{told}: method={stage.name!r} shares one budget between layers; give ratio or keep")
    for layer, (level, slide) in enumerate(zip(levels, slides)):
        if slide and level:
            raise ValueError(f"{told}: layer {layer} keeps a sliding window already; its level must be 0")
        if not slide and not level:
            raise ValueError(f"{told}: layer {layer} keeps nothing; its level must be at least 1")


def _check_cache(model: nn.Module, adapter: Architecture, stage: Budgeted) -> None:
    method, name, decoder = stage.method, type(model).__name__, adapter.decoder(model)
    layers = len(adapter.layers(decoder))
    if all(adapter.window(decoder, i) is not None for i in range(layers)):
        raise ValueError(
            f"method={stage.name!r}: every layer of {name} keeps a sliding window of {adapter.window(decoder, 0)} "
            "tokens already, so there is nothing to evict"
        )
    method.prepare(model, stage.ratio)
    method.check(layers, stage.ratio)
    told_apart = getattr(method, "scope", "all") != "all" or getattr(method, "protect", "none") != "none"
    if method.ranks() and told_apart and "visual" not in adapter.gives:
        raise ValueError(
            f"scope={method.scope!r}, protect={method.protect!r}: {name} has no visual tokens to tell from text; use "
            "scope='all' and protect='none'"
        )
    reader, windows = method.reader(), [adapter.window(decoder, i) for i in range(layers)]
    if reader is not None and reader.turns and (adapter.positions == "original" or any(windows)):
        what = "positions (t, h, w)" if adapter.positions == "original" else "layers with a sliding window"
        raise ValueError(
            f"method={stage.name!r} attends at positions of its own, which {name} with {what} does not take; leave "
            "that out, or use a model with one position per token that sees everything before it"
        )
    holding = method.holding()
    if holding is not None and holding.relative and adapter.positions == "original":
        raise ValueError(
            f"rotation='cache' has no meaning for the (t, h, w) positions of {name}; use rotation='original'"
        )
