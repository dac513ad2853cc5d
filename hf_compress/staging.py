"""From what was asked for to methods with their budgets, by stage; refusal of what a model cannot have."""

from __future__ import annotations

from fractions import Fraction

from torch import nn

from hf_compress import budget, registry
from hf_compress.checks import check_stages
from hf_compress.config import CompressionConfig, MethodConfig
from hf_compress.engine.stage import Budgeted
from hf_compress.engine.vision import known_tokens
from hf_compress.methods.base import CacheMethod, Method
from hf_compress.patches.base import Architecture

ADAPTIVE = "adaptive"


def stages_of(config: CompressionConfig, model: nn.Module, adapter: Architecture) -> dict[str, Budgeted]:
    """New methods with their budgets, in the order in which a forward meets them. The model is not touched.

    Raises:
        ValueError: a budget or a knob is wrong, or the model cannot do it.
    """
    specs = [registry.get(entry.method) for entry in config.methods]
    stages = _by_stage([(spec, _stage(spec, entry)) for spec, entry in zip(specs, config.methods)], model, adapter)
    check_stages(model, adapter, stages)
    return stages


def _by_stage(
    asked: list[tuple[registry.Spec, Budgeted]], model: nn.Module, adapter: Architecture
) -> dict[str, Budgeted]:
    """The methods by stage, in the order in which a forward meets them; some act in several."""
    out: dict[str, Budgeted] = {}
    layers = len(adapter.layers(adapter.decoder(model)))
    for spec, whole in asked:
        if whole.schedule is not None and type(whole.method).parts is not Method.parts:
            raise ValueError(f"schedule={whole.schedule}: {spec.name!r} acts in several stages; give ratio or keep")
        parts = whole.method.parts(layers, known_tokens(adapter, model, whole), whole.ratio, whole.keep)
        acting = {stage: Budgeted(spec.name, *part) for stage, part in parts.items()} or {spec.stage: whole}
        for stage, one in acting.items():
            if stage in out:
                raise ValueError(
                    f"method={[s.name for s, _ in asked]}: {out[stage].name!r} and {spec.name!r} both act in the "
                    f"{stage} stage and cannot be combined"
                )
            out[stage] = one
    return {stage: out[stage] for stage in registry.STAGES if stage in out}


def _stage(spec: registry.Spec, entry: MethodConfig) -> Budgeted:
    ratio, keep, schedule = entry.ratio, entry.keep, entry.schedule
    if schedule is not None:
        if ratio is not None or keep is not None or schedule.stage != spec.stage:
            raise ValueError(
                f"method={spec.name!r}: schedule={schedule} goes with neither ratio={ratio!r} nor keep={keep!r}, and "
                f"with methods of the {schedule.stage} stage; of several methods give a list with None for this one"
            )
        return _checked(spec, entry, None, None)
    stores = issubclass(spec.cls, CacheMethod) and not spec.cls.ranks()
    if ratio is None and keep is None and stores:
        return _checked(spec, entry, None, None)
    if (ratio is None) == (keep is None):
        got = "both" if ratio is not None else "neither"
        raise ValueError(
            f"method={spec.name!r}: got {got} of ratio={ratio!r} and keep={keep!r}; give exactly one: "
            "ratio (fraction removed) or keep (absolute count)"
        )
    if keep is not None and stores:
        raise ValueError(f"keep={keep!r}: method={spec.name!r} stores every entry; give ratio, the fraction of bytes")
    if ratio == ADAPTIVE:
        return _checked(spec, entry, *_adaptive(spec))
    exact = None if ratio is None else budget.check_ratio(ratio)
    return _checked(spec, entry, exact, None if keep is None else budget.check_keep(keep))


def _adaptive(spec: registry.Spec) -> tuple[None, None]:
    """No budget, for a method that can do without."""
    if not getattr(spec.cls, "adaptive", False):
        able = [s.name for s in registry.methods().values() if getattr(s.cls, "adaptive", False)]
        works = f"; these decide themselves: {able}" if able else ""
        raise ValueError(
            f"ratio={ADAPTIVE!r}: method={spec.name!r} has no rule for how many tokens stay; give ratio as a number or "
            f"keep{works}"
        )
    return None, None


def _checked(spec: registry.Spec, entry: MethodConfig, ratio: Fraction | None, keep: int | None) -> Budgeted:
    if unknown := set(entry.knobs) - set(spec.knobs):
        raise ValueError(f"method={spec.name!r} has no {sorted(unknown)}; it takes {sorted(spec.knobs)}")
    try:
        method = spec.cls(**entry.knobs)
    except ValueError as error:
        raise ValueError(f"method={spec.name!r}: {error}") from error
    return Budgeted(spec.name, method, ratio, keep, entry.schedule)
