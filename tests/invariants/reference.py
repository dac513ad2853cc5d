"""What the invariants range over and how they are run: the matrix, batches, runs, snapshots.

run = greedy(model, batch)                          # tokens, logits of every step, cache

`language.py` holds the references that they are checked against.
"""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
import transformers as T

import hf_compress
from hf_compress.methods.base import DecoderMethod
from hf_compress.registry import NEEDS
from hf_compress.signals import COLUMNS, QUESTION
from tests import tiny
from tests.invariants.language import (  # noqa: F401  (what the tests import from here)
    FullLength,
    bare,
    embed,
    extend,
    image_embeddings,
    longer,
    mixing,
    mrope,
    prompt_positions,
    rerun,
    short_logits,
    slots,
    storages,
    visual_inputs,
    windows,
)
from tests.tiny import GREEDY

# For logits of a standard deviation of 1.7, and in proportion where it is larger. In fp32 the bare model itself moves
# them by 1.3e-5 when a prompt is padded, and sums in another order (cut or masked, batched or alone) by up to 8e-5; one
# wrong row moves them by more than 0.1.
TOLERANCE = 1e-4

# Cache methods that store every entry (in fewer bits, at lower rank ...) take no ratio here; those that merge, and
# those whose layers or heads differ in number, have tests of their own in tests/methods.
MERGING, UNEVEN = ("ems", "lookm"), ("adakv", "compresskv", "pyramidkv")

VLMS = [name for name in tiny.ALL_VISION if name != "mllama"]  # refused as a whole: tests/architectures
NAMES = [*VLMS, *tiny.ALL_DECODER_ONLY]
CENTRAL = [*tiny.VISION, "llama"]  # one model of each kind


def fresh(name: str, attn: str = "sdpa") -> T.PreTrainedModel:
    """A new model, for tests that leave it changed."""
    return tiny.build(name, attn)


@functools.cache
def shared(name: str, attn: str = "sdpa") -> T.PreTrainedModel:
    """One model per process: compress it only inside `with model.compressed(...)`."""
    return fresh(name, attn)


@functools.cache
def adapter_of(name: str) -> Any:
    """What `patches/` says about an architecture."""
    return hf_compress.architectures()[bare(name).config.model_type]


def batch_of(name: str, kind: str = "inputs", side: str = "left") -> tiny.Batch:
    """A ragged batch of two: `kind` is a function of tests/tiny, or "equal" (no padding)."""
    model = bare(name)
    if kind == "equal":
        return tiny.single(tiny.inputs(name, model), 0, name)
    return getattr(tiny, kind)(name, model, side=side)


def alone(name: str, batch: tiny.Batch, row: int) -> tiny.Batch:
    """One row without its padding."""
    return tiny.single(batch, row, name)


# -- the matrix -----------------------------------------------------------------------------------------------------
def within(lengths: list[int], window: int) -> list[int]:
    """Entries of rows of these lengths that a sliding window leaves for the next token."""
    return [min(n, window - 1) for n in lengths]


@functools.cache
def refusal(method: str, name: str) -> str | None:
    """Why a method cannot act on a model: a part of the message with which `compress` refuses it. None: it can.

    This is the only place that says what the tests do not range over; `test_budget.py` tests every refusal.
    """
    spec, adapter = hf_compress.methods()[method], adapter_of(name)
    if lacking := sorted(spec.needs - adapter.gives):
        return f"needs .*{re.escape(NEEDS[lacking[-1]])}"
    if lacking := [stage for stage in stages_of(method) if stage not in adapter.stages]:
        return f"acts in the {lacking[0]} stage"
    if method in of_kind("passing") and "cache" not in adapter.stages:
        return "has no cache stage"
    if spec.stage == "cache" and all(windows(name)):
        return "sliding window"  # every layer is bounded already
    return None


def stages_of(method: str) -> list[str]:
    """The stages in which a method acts."""
    spec = hf_compress.methods()[method]
    return list(spec.cls().parts(4, None, Fraction(1, 2), None)) or [spec.stage]


def acts_inside_layers(method: str) -> bool:
    """Whether it does something in the middle of a layer, which gradient checkpointing would not do again."""
    cls = hf_compress.methods()[method].cls
    return issubclass(cls, DecoderMethod) and (cls().picks or (cls.waits and cls.gates == "mlp"))


def acts_on_steps_alone(method: str) -> bool:
    """Whether a prompt costs what it costs without the method."""
    cls = hf_compress.methods()[method].cls
    return issubclass(cls, DecoderMethod) and cls().idles


def leaves_prompts_whole(method: str) -> bool:
    """Whether all rows of a prompt go through all layers and stay in all caches."""
    cls = hf_compress.methods()[method].cls
    chooses = issubclass(cls, DecoderMethod) and cls().picks and not cls().discards
    return acts_on_steps_alone(method) or chooses


def asks(method: str) -> bool:
    """Whether a method reads the question: another one where a conversation is fed again as one prompt."""
    spec = hf_compress.methods()[method]
    return looks(method) or (spec.stage == "vision" and QUESTION in spec.cls().reads(1))


def looks(method: str) -> bool:
    """Whether a vision method reads layers of the language model, over whole prompts only."""
    spec = hf_compress.methods()[method]
    return spec.stage == "vision" and any(read.where == "layer" for read in spec.cls().reads(1))


def of_kind(kind: str | None) -> list[str]:
    """The methods of a stage; of the vision stage those that shorten the prompt, or "passing" ones, also "before" (they
    act in no other stage), of the decoder stage "shrinking" (visual rows
    only), "dropping" (they act in no other stage, and what stays is what it was), "picking" (of these: visual rows
    only) and "looking" (of these: by the attention of the last row), of the cache stage "evicting" (what stays is what
    it was) and "even" (the same number of entries in all heads and layers)."""
    if kind in ("vision", "before", "passing"):
        found = {m: spec.cls.passes for m, spec in hf_compress.methods("vision").items()}
        found = [m for m, passes in found.items() if passes == (kind == "passing")]
        return [m for m in found if stages_of(m) == ["vision"]] if kind == "before" else found
    if kind == "packable":  # several samples in a row: not where rows are chosen inside the attention
        return [m for m, spec in hf_compress.methods("decoder").items() if not spec.cls().picks]
    if kind == "shrinking":
        return [m for m, spec in hf_compress.methods("decoder").items() if "visual" in spec.needs]
    if kind in ("dropping", "looking", "picking"):
        found = {m: spec for m, spec in hf_compress.methods("decoder").items() if spec.kind != "merging"}
        found = {m: spec for m, spec in found.items() if stages_of(m) == ["decoder"] and not spec.cls().returns}
        plain = lambda cls: (cls.score, cls.decide) == (DecoderMethod.score, DecoderMethod.decide)
        fits = {"dropping": lambda spec: True, "looking": lambda spec: plain(spec.cls)}
        return [m for m, spec in found.items() if fits.get(kind, lambda spec: "visual" in spec.needs)(spec)]
    if kind not in ("evicting", "even"):
        return list(hf_compress.methods(kind))
    evicting = [m for m, spec in hf_compress.methods("cache").items() if spec.cls.ranks() and m not in MERGING]
    return evicting if kind == "evicting" else [m for m in evicting if m not in UNEVEN]


def options(method: str, model: Any = None, **changes: Any) -> dict[str, Any]:
    """Budget and knobs with which a method is compressed here, on `model` where that matters."""
    knobs = hf_compress.methods()[method].example
    size = {"ratio": knobs.pop("ratio")} if "ratio" in knobs else {}
    if "keep" in changes:
        size = {}
    first = 1 if model is None else hf_compress.architectures()[model.config.model_type].min_drop_layer(model)
    if first > 1:  # DeepStack adds to the visual rows up to there; that earlier drops are refused: test_qwen.py
        later = {"layer": first, "layers": tuple(range(first, 4))} if method in of_kind("decoder") else {}
        knobs = knobs | {knob: at for knob, at in later.items() if knob in hf_compress.methods()[method].knobs}
    return size | knobs | changes


def on_output(method: str) -> dict[str, Any]:
    """The knob that keeps a method out of the tower, where it would be refused."""
    return {"where": "output"} if "where" in hf_compress.methods()[method].knobs else {}


def compressed(model: Any, method: str, **changes: Any) -> Any:
    """`model.compressed(method, ...)` with `options`."""
    return model.compressed(method, **options(method, model, **changes))


def cases(stage: str | None = None, names: list[str] | None = None, refused: bool = False) -> list[Any]:
    """Every method of the registry on every model that it applies to (or that refuses it), as (method, name)."""
    names = NAMES if names is None else names
    pairs = [(m, n) for m in of_kind(stage) for n in names if (refusal(m, n) is not None) == refused]
    return [pytest.param(m, n, id=f"{m}-{n}") for m, n in pairs]


def matrix(stage: str | None = None, names: list[str] | None = None) -> Any:
    """Parametrises a test with `method` and `name`: all of them, unless `names` says which and the test says why."""
    return pytest.mark.parametrize(("method", "name"), cases(stage, names))


def kernels(stage: str | None = None, names: list[str] | None = None) -> Any:
    """Parametrises with `method`, `name` and `attn`: sdpa and eager."""
    both = [(*case.values, attn) for attn in ("sdpa", "eager") for case in cases(stage, names)]
    return pytest.mark.parametrize(("method", "name", "attn"), [pytest.param(*c, id="-".join(c)) for c in both])


# -- runs -----------------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """One greedy generate: (B, T) new tokens, (B, T, V) logits before suppression, and everything returned."""

    tokens: torch.Tensor
    logits: torch.Tensor
    out: Any

    @property
    def cache(self) -> Any:
        return self.out.past_key_values


def greedy(model: Any, batch: tiny.Batch, **kwargs: Any) -> Run:
    """Greedy generate with the logits of every step."""
    out = model.generate(**batch, **(GREEDY | kwargs), return_dict_in_generate=True, output_logits=True)
    return Run(out.sequences[:, batch["input_ids"].shape[1] :], torch.stack(out.logits, 1), out)


@torch.no_grad()
def logits_of(model: Any, batch: tiny.Batch, **kwargs: Any) -> torch.Tensor:
    """(B, L, V) logits of one forward."""
    return model(**batch, **kwargs).logits


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = TOLERANCE) -> None:
    """Equal up to rounding."""
    if expected.numel() > 1:
        atol *= max(1.0, float(expected.detach().std()) / 1.7)
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def untouched(method: str, attn: str, actual: torch.Tensor, plain: torch.Tensor) -> None:
    """A prompt before a cache method has acted: the same numbers, up to rounding where it is read on its way."""
    if COLUMNS in hf_compress.methods()[method].cls().reads(1) and attn == "sdpa":
        close(actual, plain)
    else:
        assert torch.equal(actual, plain)


def snapshot(model: torch.nn.Module) -> dict[str, Any]:
    """Everything that compress() may touch and decompress() must bring back."""
    modules = {
        path: {key: (len(value) if hasattr(value, "__len__") else id(value)) for key, value in vars(module).items()}
        for path, module in model.named_modules()
    }
    classes = {cls: dict(vars(cls)) for cls in type(model).__mro__[:-1] if cls is not torch.nn.Module}
    return dict(
        modules=modules,
        configs={path: id(m.config) for path, m in model.named_modules() if hasattr(m, "config")},
        config=model.config.to_json_string(),
        forwards={path: module.forward for path, module in model.named_modules()},
        generate=getattr(model, "generate", None),
        classes=classes,
        state={key: value.clone() for key, value in model.state_dict().items()},
        training=model.training,
    )


def assert_restored(model: torch.nn.Module, before: dict[str, Any]) -> None:
    """The model is as in the snapshot."""
    after = snapshot(model)
    assert after["modules"].keys() == before["modules"].keys()
    for path, entries in before["modules"].items():
        assert after["modules"][path] == entries, path or "the model itself"
    assert all(torch.equal(after["state"][key], value) for key, value in before["state"].items())
    for key in before.keys() - {"modules", "state"}:
        assert after[key] == before[key], key


@contextlib.contextmanager
def unchanged(model: torch.nn.Module) -> Any:
    """The model leaves the block as it entered it."""
    before = snapshot(model)
    yield
    assert_restored(model, before)
