"""What the invariants are checked against: slow, obvious references that share no code with the engine.

run = greedy(model, batch)                          # tokens, logits of every step, cache
full = FullLength("llava", batch, run.tokens)       # the bare model, eager, uncached, nothing removed ...
full.logits([full.causal()] * full.layers)          # ... each layer under a mask that the test writes
short_logits("llava", alone, tokens, kept)          # the language model on embeddings shortened by hand
"""

from __future__ import annotations

import contextlib
import copy
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as T

import hf_compress
from tests import tiny
from tests.tiny import GREEDY, IMG

# The scale of the logits is 1.7 (standard deviation). In fp32 the bare model itself moves them by 1.3e-5 when a prompt
# is padded, and sums in another order (cut or masked, batched or alone) by up to 8e-5; one wrong row moves them by more
# than 0.1.
TOLERANCE = 1e-4

# What tiny models need: four decoder layers, three or two usable tower blocks, prompts of 15 tokens.
KNOBS: dict[str, dict[str, Any]] = {"snapkv": {"window": 4}, "fastv": {"layer": 1}, "vtc_cls": {"layers": 2}}
RATIOS = {"fastv": 0.4, "pyramiddrop": 0.4}

# Variants of tests/tiny.py with the same weights: a sliding window behind images, and one in half of the layers.
FAMILY = {"llava_window": "llava", "qwen2_mixed": "qwen2"}
CENTRAL = [*tiny.VISION, "llama"]  # one model of each kind


def family(name: str) -> str:
    """The model of tests/tiny.py whose inputs `name` takes."""
    return FAMILY.get(name, name)


def fresh(name: str, attn: str = "sdpa") -> T.PreTrainedModel:
    """A new model, for tests that leave it changed."""
    base = tiny.build(family(name), attn)
    spread = torch.linspace(0.5, 1.5, tiny.TEXT["hidden_size"])
    for key, weight in base.named_parameters():
        if "k_norm" in key:  # all ones, every key of a layer would have the same norm, and knorm nothing but ties
            weight.data.copy_(spread[:: len(spread) // len(weight)])
    if name not in FAMILY:
        return base
    config = copy.deepcopy(base.config)
    if name == "llava_window":
        config.text_config = T.MistralConfig(**tiny.TEXT, sliding_window=tiny.SLIDING_WINDOW)
    else:
        sliding = dict(use_sliding_window=True, sliding_window=tiny.SLIDING_WINDOW, max_window_layers=2)
        config = T.Qwen2Config(**tiny.TEXT, **sliding)
    model = type(base)._from_config(config, attn_implementation=attn).eval()
    model.load_state_dict(base.state_dict())
    model.generation_config = base.generation_config
    return model


@functools.cache
def shared(name: str, attn: str = "sdpa") -> T.PreTrainedModel:
    """One model per process: compress it only inside `with model.compressed(...)`."""
    return fresh(name, attn)


@functools.cache
def bare(name: str, attn: str = "eager") -> T.PreTrainedModel:
    """A model that no test compresses."""
    return fresh(name, attn)


def batch_of(name: str, kind: str = "inputs", side: str = "left") -> tiny.Batch:
    """A ragged batch of two: `kind` is a function of tests/tiny.py, or "equal" (no padding)."""
    model, base = bare(name), family(name)
    if kind == "equal":
        return tiny.single(tiny.inputs(base, model), 0, base)
    return getattr(tiny, kind)(base, model, side=side)


def alone(name: str, batch: tiny.Batch, row: int) -> tiny.Batch:
    """One row without its padding."""
    return tiny.single(batch, row, family(name))


# -- the matrix -----------------------------------------------------------------------------------------------------
def options(method: str, **changes: Any) -> dict[str, Any]:
    """Budget and knobs with which a method is compressed here."""
    size = {} if "keep" in changes else {"ratio": RATIOS.get(method, 0.5)}
    return size | KNOBS.get(method, {}) | changes


def compressed(model: Any, method: str, **changes: Any) -> Any:
    """`model.compressed(method, ...)` with `options`."""
    return model.compressed(method, **options(method, **changes))


def applies(method: str, name: str) -> bool:
    """Whether a method can act on a model."""
    spec, adapter = hf_compress.methods()[method], hf_compress.architectures()[bare(name).config.model_type]
    sliding = name in ("mistral_window", "llava_window") and spec.stage == "cache"  # every layer is bounded already
    return spec.stage in adapter.stages and spec.needs <= adapter.gives and not sliding


def cases(stage: str | None = None, names: list[str] | None = None) -> list[Any]:
    """Every method of the registry on every model that it applies to, as (method, name)."""
    names = tiny.ARCHITECTURES if names is None else names
    pairs = [(m, n) for m in hf_compress.methods(stage) for n in names if applies(m, n)]
    return [pytest.param(m, n, id=f"{m}-{n}") for m, n in pairs]


def matrix(stage: str | None = None, names: list[str] | None = None) -> Any:
    """Parametrises a test with `method` and `name`."""
    return pytest.mark.parametrize(("method", "name"), cases(stage, names))


def kernels(stage: str | None = None, names: list[str] | None = None) -> Any:
    """Parametrises with `method`, `name` and `attn`: sdpa on all of `names`, eager on one model of each kind."""
    sdpa = [(*case.values, "sdpa") for case in cases(stage, names)]
    eager = [(*case.values, "eager") for case in cases(stage, CENTRAL) if names is None or case.values[1] in names]
    return pytest.mark.parametrize(("method", "name", "attn"), [pytest.param(*c, id="-".join(c)) for c in sdpa + eager])


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
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


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


# -- embeddings and positions by hand -------------------------------------------------------------------------------
@torch.no_grad()
def image_embeddings(name: str, batch: tiny.Batch) -> list[torch.Tensor]:
    """(N, D) per image, from the bare model."""
    if "pixel_values" not in batch:
        return []
    pixels = {key: batch[key] for key in ("pixel_values", "image_grid_thw") if key in batch}
    return list(bare(name, "sdpa").model.get_image_features(**pixels, return_dict=True).pooler_output)


def embed(name: str, batch: tiny.Batch, ids: torch.Tensor) -> torch.Tensor:
    """(B, L, D) embeddings of `ids` with the image features in place."""
    with torch.no_grad():
        x = bare(name).get_input_embeddings()(ids)
    images = image_embeddings(name, batch)
    if images:
        x[ids == IMG] = torch.cat(images)
    return x


def prompt_positions(name: str, batch: tiny.Batch) -> torch.Tensor:
    """(B, L) positions that generate gives a prompt, (3, B, L) on M-RoPE."""
    mask = batch["attention_mask"]
    plain = (mask.cumsum(1) - 1).clamp(min=0)
    if name != "qwen2_5_vl":
        return plain
    if "image_grid_thw" not in batch:
        return plain.expand(3, -1, -1)
    keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    return bare(name).model.get_rope_index(**{key: batch[key] for key in keys})[0]


def extend(positions: torch.Tensor, steps: int) -> torch.Tensor:
    """Positions of the prompt and of what is generated: each is one more than the last."""
    more = positions[..., -1:] + torch.arange(1, steps + 1)
    return torch.cat([positions, more], -1)


class FullLength:
    """The bare model in eager attention, without a cache, over prompt and new tokens at full length.

    Args:
        name: of the model; batch: its prompt; tokens: (B, T) generated.
        positions: of all rows, where they are not those that generate would give.
    """

    def __init__(self, name: str, batch: tiny.Batch, tokens: torch.Tensor, positions: torch.Tensor | None = None):
        self.model, self.prompt = bare(name), batch["input_ids"].shape[1]
        ids = torch.cat([batch["input_ids"], tokens[:, :-1]], 1)
        self.embeds = embed(name, batch, ids)
        self.positions = extend(prompt_positions(name, batch), tokens.shape[1] - 1) if positions is None else positions
        self.valid = torch.cat([batch["attention_mask"].bool(), torch.ones_like(tokens[:, :-1], dtype=torch.bool)], 1)
        self.rows = ids.shape[1]
        text = self.model.config.get_text_config()
        self.layers, self.heads, self.kv_heads = (
            text.num_hidden_layers,
            text.num_attention_heads,
            text.num_key_value_heads,
        )
        types = getattr(text, "layer_types", None) or ["sliding_attention"] * self.layers
        window = getattr(text, "sliding_window", None)
        self.windows = [window if kind == "sliding_attention" else None for kind in types]

    def causal(self, layer: int = 0, order: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 1, L, L) bool: what each row sees when nothing is removed. `order` (B, L): where windows are measured."""
        at = torch.arange(self.rows).expand(len(self.valid), -1) if order is None else order
        see = torch.ones(self.rows, self.rows, dtype=torch.bool).tril() & self.valid[:, None, None, :]
        if self.windows[layer] is not None:
            see = see & (at[:, None, :, None] - at[:, None, None, :] < self.windows[layer])
        return see

    @torch.no_grad()
    def run(self, see: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits (B, L, V) and attention (B, H, L, L) per layer, layer l under the bool mask `see[l]`."""
        decoder, attention = self.model.get_decoder(), []
        handles = []
        for layer, mask in zip(decoder.layers, see):
            add = torch.zeros(mask.shape).masked_fill(~(mask | torch.eye(self.rows, dtype=torch.bool)), -1e30)
            put = lambda _, args, kwargs, add=add: (args, dict(kwargs, attention_mask=add))
            note = lambda _, args, out: attention.append(out[1])
            handles += [layer.register_forward_pre_hook(put, with_kwargs=True)]
            handles += [layer.self_attn.register_forward_hook(note)]
        try:
            ones = torch.ones_like(self.valid, dtype=torch.long)
            out = decoder(inputs_embeds=self.embeds, position_ids=self.positions, attention_mask=ones, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return self.model.lm_head(out.last_hidden_state), attention

    def logits(self, see: list[torch.Tensor]) -> torch.Tensor:
        """(B, T, V): the logits that generate must have given, step by step."""
        return self.run(see)[0][:, self.prompt - 1 :]

    def columns(self, kept: list[list[int]]) -> torch.Tensor:
        """(B, L) bool: these rows of the prompt per sample, and everything after the prompt."""
        out = torch.zeros(len(kept), self.rows, dtype=torch.bool)
        out[:, self.prompt :] = True
        for b, rows in enumerate(kept):
            out[b, rows] = True
        return out


def slots(cache: Any, layer: int, rows: int, heads: int) -> torch.Tensor:
    """(B, H, rows) bool: which of the caller's rows a layer of a compressed cache stores, per query head."""
    layout = cache.layers[layer].layout
    index, valid = layout.index, layout.valid
    if index.ndim == 2:
        index, valid = index[:, None], valid[:, None]
    held = torch.zeros(*index.shape[:2], rows, dtype=torch.int64).scatter_add(2, index, valid.long())
    assert held.max() <= 1, "a row is stored twice"
    return held.bool().repeat_interleave(heads // index.shape[1], 1)


def storages(cache: Any) -> int:
    """Bytes of all storages behind the keys and values of a cache."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# -- embeddings shortened by hand -----------------------------------------------------------------------------------
@torch.no_grad()
def short_logits(
    name: str,
    sample: tiny.Batch,
    tokens: torch.Tensor,
    kept: list[list[int]],
    vectors: list[torch.Tensor] | None = None,
    positions: str = "auto",
) -> torch.Tensor:
    """(T, V): the language model on one sample whose visual embeddings were cut by hand, without a cache.

    Args:
        sample: one unpadded row; tokens: (T,) that were generated; kept: token indices per image.
        vectors: what stands at the kept places, per image (default: their embeddings).
    """
    model, ids = bare(name), sample["input_ids"]
    whole = torch.cat([ids, tokens[None, :-1]], 1)
    x = embed(name, sample, whole)[0]
    images = image_embeddings(name, sample)
    starts, rows, at = [], [], 0
    places = (ids[0] == IMG).nonzero()[:, 0].tolist()
    for image, embeddings in enumerate(images):
        mine = places[at : at + len(embeddings)]
        at += len(embeddings)
        chosen = [mine[k] for k in kept[image]]
        if vectors is not None:
            x[chosen] = vectors[image]
        rows += chosen
        starts += mine
    assert at == len(places)
    stay = sorted(set(range(whole.shape[1])) - set(starts) | set(rows))
    where = extend(prompt_positions(name, sample), len(tokens) - 1)[..., stay]
    if positions == "renumber" or (positions == "auto" and name != "qwen2_5_vl"):
        where = torch.arange(len(stay))[None]
    ones = torch.ones(1, len(stay), dtype=torch.long)
    out = model.get_decoder()(inputs_embeds=x[None, stay], position_ids=where, attention_mask=ones, use_cache=False)
    return model.lm_head(out.last_hidden_state)[0, -len(tokens) :]


def mixing(assignment: Any, image: int, tokens: int) -> torch.Tensor:
    """(K, N) the matrix that an Assignment means, written out entry by entry."""
    K = assignment.kept.shape[1]
    if assignment.dense is not None:
        return assignment.dense[image].float()
    W = torch.zeros(K, tokens)
    if assignment.groups is None:
        for k, j in enumerate(assignment.kept[image].tolist()):
            W[k, j] = 1
        return W
    groups = assignment.groups[image].tolist()
    for j, k in enumerate(groups):
        if k >= 0:
            W[k, j] = 1 / groups.count(k) if assignment.weight is None else assignment.weight[image, j]
    return W
