"""compress, decompress, compressed: composition and refusal. Everything is checked before anything is changed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from hf_compress import registry
from hf_compress.config import CompressionConfig, MethodConfig, Schedule, plain
from hf_compress.engine.distill import Distill
from hf_compress.engine.runtime import Compression
from hf_compress.patches.registry import adapter_for
from hf_compress.staging import stages_of
from hf_compress.weights import Exported, Weights

Methods = str | Sequence[str] | CompressionConfig | dict[str, Any]


def compress(
    model: nn.Module,
    method: Methods,
    ratio: float | str | Sequence[float | str | None] | None = None,
    *,
    keep: int | Sequence[int | None] | None = None,
    schedule: Any = None,
    weights: str | os.PathLike[str] | Weights | None = None,
    trainable: str | None = None,
    distill: Distill | float | None = None,
    **knobs: Any,
) -> nn.Module:
    """Install one method, or one per stage, on a model; calls of the model stay as they are.

    Where `method` is a list, a list for any of the others has one entry per method, None for what a method does not
    take or for its default. A value that is itself a sequence, for all methods that take it, is then a tuple:
    `compress(["divprune", "pyramiddrop"], ratio=0.5, layers=(1, 2, 3))`, or `layers=[None, (1, 2, 3)]`. Numbers of
    numpy and torch are numbers.

    Args:
        model: a `PreTrainedModel` of a supported architecture (`hf_compress.architectures()`).
        method: a name of `hf_compress.methods()`, or a list of names of different stages; a list runs in stage order.
            Or a whole `CompressionConfig` (also as a dict), which brings budgets and knobs along.
        ratio: fraction removed, 0 <= ratio < 1, of what the method's stage acts on: visual tokens (vision), visual
            tokens averaged over layers (decoder), bytes of the KV cache against one of 16 bits per number (cache): of a
            method that only evicts the same fraction of its entries, of one that packs whatever codes, scales and
            indices take. "adaptive": the method decides how many tokens of each image stay, where it has a rule.
        keep: the absolute count instead: tokens per image, layer-averaged tokens per image, cache entries per head.
        schedule: a budget per layer instead, for methods of the decoder or the cache stage: a `Schedule` (also as a
            dict, or a JSON file); `model.compression.reschedule` puts another in its place.
        weights: of what the methods train: a folder (or repository) that `model.compression.save` wrote. Default: new.
        trainable: "compressor" trains what the methods bring (`model.compressor`) and freezes all else;
            "compressor+projector", "all" likewise. Default: as it is. `decompress` gives back what was.
        distill: in training (`model.train()`, with labels) add the divergence from what the same weights say without
            compression, and without an adapter of PEFT, to the loss: a weight, or a `hf_compress.train.Distill`. Costs
            a forward of the uncompressed model per step, and no weights. Checkpoints hold both of the two, so that a
            training goes on as it began; what is passed here is taken in place of what a config says.
        knobs: the methods' own arguments, by name; one that several methods have goes to all of them.

    Returns:
        the model itself, so that it can be chained as `.eval()` and `.to()` are; of one that PEFT, `torch.compile` or
        data parallelism has wrapped, the model inside.

    Raises:
        ValueError: an argument is wrong, or the model cannot do it; the model is then as it was.
    """
    model = bare(model)
    if getattr(model, "compression", None) is not None:
        raise ValueError(
            f"model is already compressed by {model.compression.config.summary()}; "
            "call model.decompress() first (to combine methods pass a list: compress(['visionzip', 'snapkv'], ...))"
        )
    adapter = adapter_for(model)
    config = _requested(method, {"ratio": ratio, "keep": keep, "schedule": schedule}, knobs)
    stages = stages_of(config, model, adapter)
    taught, trainable = Distill.of(config.distill if distill is None else distill), trainable or config.trainable
    config = replace(config, trainable=trainable, distill=None if taught is None else asdict(taught))
    compression = Compression(model, adapter, stages, config)
    compression.install(weights if isinstance(weights, Weights) or weights is None else Exported(weights), trainable)
    compression.context.distill = taught
    model.compression = compression
    _forget_compiled()
    return model


def _requested(method: Methods, budgets: dict[str, Any], knobs: dict[str, Any]) -> CompressionConfig:
    """The arguments of `compress` as one config, in stage order."""
    config: CompressionConfig | None = None
    if isinstance(method, (dict, CompressionConfig)):
        if knobs or any(value is not None for value in budgets.values()):
            raise ValueError("a compression config brings its own budgets and knobs; pass it alone, or edit it")
        config = CompressionConfig.from_dict(method) if isinstance(method, dict) else method
        entries = replace(config).methods  # it may have been edited since
        specs = [registry.get(entry.method) for entry in entries]
    elif isinstance(method, (str, list, tuple)):
        specs = [registry.get(name) for name in ([method] if isinstance(method, str) else method)]
        several = not isinstance(method, str)
        ratios, keeps = (_spread(name, plain(budgets[name]), specs, several) for name in ("ratio", "keep"))
        schedules = _schedules(budgets["schedule"], specs, several)
        options = _share_knobs(specs, plain(knobs), several)
        entries = [MethodConfig(s.name, *rest) for s, *rest in zip(specs, ratios, keeps, options, schedules)]
    else:
        raise ValueError(
            f"method={method!r} must be a name of hf_compress.methods(), a list of names, or a CompressionConfig"
        )
    if not entries:
        raise ValueError("method=[] is empty; name at least one of hf_compress.methods()")
    registry.check_stages(specs)
    ordered = sorted(entries, key=lambda e: registry.STAGES.index(registry.get(e.method).stage))
    return CompressionConfig(ordered) if config is None else replace(config, methods=ordered)


def decompress(model: nn.Module) -> None:
    """Take a compression back; the model is bit-exactly as before.

    Raises:
        ValueError: the model is not compressed.
    """
    model = bare(model)
    compression = getattr(model, "compression", None)
    if compression is None:
        raise ValueError(f"model={type(model).__name__} is not compressed; call model.compress(...) first")
    compression.uninstall()
    del model.compression
    _forget_compiled()


@contextlib.contextmanager
def compressed(
    model: nn.Module, method: Methods, ratio: Any = None, *, keep: Any = None, **knobs: Any
) -> Iterator[nn.Module]:
    """`compress` for the length of a `with` block, undone also after an exception.

    What the block itself took off, or put in its place, is left as it is.

    Args:
        model, method, ratio, keep, knobs: as of `compress`, and everything else that it takes.
    """
    compress(model, method, ratio, keep=keep, **knobs)
    mine = bare(model).compression
    try:
        yield model
    finally:
        if bare(model).compression is mine:
            decompress(model)


def bare(model: Any) -> Any:
    """The model of transformers inside what wraps it: PEFT, `torch.compile`, data parallelism."""
    while not hasattr(type(model), "compression"):
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
            model = inner  # torch.compile, data parallelism
        else:
            break
    return model


def _spread(name: str, value: Any, specs: list[registry.Spec], several: bool) -> list[Any]:
    """One value per method: where `several` are listed, a list has one entry for each."""
    if not several or not isinstance(value, list):
        return [value] * len(specs)
    if len(value) != len(specs):
        raise ValueError(
            f"{name}={value} has {len(value)} entries for {len(specs)} methods {[s.name for s in specs]}; give one "
            "each (None: its default), or a tuple that goes to every method as it is"
        )
    return value


def _schedules(value: Any, specs: list[registry.Spec], several: bool) -> list[Schedule | None]:
    """One per method, None for those without: a single one belongs to the method of its stage."""
    if several and isinstance(value, list):
        return [None if one is None else Schedule.of(one) for one in _spread("schedule", value, specs, several)]
    if value is None:
        return [None] * len(specs)
    schedule = Schedule.of(value)
    if all(spec.stage != schedule.stage for spec in specs):
        raise ValueError(
            f"schedule={schedule} is for a method of the {schedule.stage} stage; "
            f"{' and '.join(f'{s.name!r} acts in the {s.stage} stage' for s in specs)}"
        )
    return [schedule if spec.stage == schedule.stage else None for spec in specs]


def _share_knobs(specs: list[registry.Spec], knobs: dict[str, Any], several: bool) -> list[dict[str, Any]]:
    """The knobs of each method: every knob goes to all methods that have it, a list of entries to one each."""
    shared: list[dict[str, Any]] = [{} for _ in specs]
    for knob, value in knobs.items():
        if not any(knob in spec.knobs for spec in specs):
            known = {spec.name: sorted(spec.knobs) for spec in specs}
            raise ValueError(f"{knob}={value!r} is not an argument of these methods; they take {known}")
        each = several and isinstance(value, list)
        for spec, own, one in zip(specs, shared, _spread(knob, value, specs, several)):
            if knob not in spec.knobs and each and one is not None:
                raise ValueError(
                    f"{knob}={value!r}: {spec.name!r} has no {knob!r}, so its entry must be None; it takes "
                    f"{sorted(spec.knobs)}"
                )
            if knob in spec.knobs and not (each and one is None):
                own[knob] = one
    return shared


def _forget_compiled() -> None:
    """Graphs compiled before know nothing of hooks set or removed since; torch does not notice by itself."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
