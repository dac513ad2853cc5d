"""The language model by hand: slow, obvious references that share no code with the engine.

full = FullLength("llava", batch, run.tokens)       # the bare model, eager, uncached, nothing removed ...
full.logits([full.causal(i) for i in range(full.layers)])  # ... each layer under a mask that the test writes
short_logits("llava", alone, tokens, kept)          # ... or on embeddings shortened by hand

Both are a forward of the bare model in which only what enters its language model is replaced: encoding, merging of
embeddings, DeepStack features and the scaling of logits are those of transformers, on every architecture.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import transformers as T

from hf_compress.stores import held_layers
from tests import tiny
from tests.tiny import IMG, TOKEN_KEYS, VID


@functools.cache
def bare(name: str, attn: str = "eager") -> T.PreTrainedModel:
    """A model that no test compresses."""
    return tiny.build(name, attn)


@torch.no_grad()
def rerun(
    model: Any, batch: tiny.Batch, change: Callable[[dict[str, Any]], dict[str, Any]], see: list[torch.Tensor] | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One forward of a bare model whose language model reads `change(arguments)` in place of its arguments.

    Args:
        see: per layer that attends the bool mask under which it runs; None: those that the language model makes itself.

    Returns:
        logits (B, L, V) and, of eager models, attention (B, H, L, L) per layer.
    """
    decoder, attention, handles = model.get_decoder(), [], []

    def enter(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        ids = kwargs.pop("input_ids", None)
        if "inputs_embeds" not in kwargs:
            kwargs["inputs_embeds"] = decoder.get_input_embeddings()(ids)
        return (), change(kwargs)

    handles.append(decoder.register_forward_pre_hook(enter, with_kwargs=True))
    for layer, mask in zip(decoder.layers, see or []):
        if not hasattr(layer, "self_attn"):
            continue  # it keeps a state: rows are real or not, which the model is told
        add = torch.zeros(mask.shape).masked_fill(~(mask | torch.eye(mask.shape[-1], dtype=torch.bool)), -1e30)
        put = lambda _, args, kwargs, add=add: (args, dict(kwargs, attention_mask=add))
        handles.append(layer.register_forward_pre_hook(put, with_kwargs=True))
        handles.append(layer.self_attn.register_forward_hook(lambda _, args, out: attention.append(out[1])))
    try:
        return model(**batch, use_cache=False).logits, attention
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def embed(name: str, batch: tiny.Batch, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """(B, L, D) what the language model reads of a prompt, and of `tokens` (B, T) behind it."""
    whole, seen = batch if tokens is None else longer(name, batch, tokens), []
    rerun(bare(name), whole, lambda kwargs: seen.append(kwargs["inputs_embeds"]) or kwargs, None)
    return seen[0]


# -- positions ------------------------------------------------------------------------------------------------------
def mrope(name: str) -> bool:
    """Whether positions have three axes."""
    return hasattr(bare(name).base_model, "get_rope_index")


def prompt_positions(name: str, batch: tiny.Batch) -> torch.Tensor:
    """(B, L) positions that generate gives a prompt, (3, B, L) on M-RoPE."""
    plain = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0) + int(name == "paligemma")
    if not mrope(name):
        return plain
    if not any(key.startswith("pixel_values") for key in batch):
        return plain.expand(3, -1, -1)
    given = {key: value for key, value in batch.items() if not key.startswith("pixel_values")}
    if "video_second_per_grid" in given:
        given["second_per_grids"] = given.pop("video_second_per_grid")
    return bare(name).base_model.get_rope_index(**given)[0]


def extend(positions: torch.Tensor, steps: int) -> torch.Tensor:
    """Positions of the prompt and of what is generated: each is one more than the last."""
    more = positions[..., -1:] + torch.arange(1, steps + 1)
    return torch.cat([positions, more], -1)


def longer(name: str, batch: tiny.Batch, tokens: torch.Tensor) -> tiny.Batch:
    """A batch with `tokens` (B, n) after its prompt; what is not of the prompt is the causal suffix of PaliGemma."""
    fill = dict(attention_mask=1, token_type_ids=int(name == "paligemma"), mm_token_type_ids=0)
    added = {key: torch.full_like(tokens, fill[key], dtype=batch[key].dtype) for key in fill if key in batch}
    added["input_ids"] = tokens
    return batch | {key: torch.cat([batch[key], new], 1) for key, new in added.items()}


# -- full length ----------------------------------------------------------------------------------------------------
class FullLength:
    """The bare model in eager attention, without a cache, over prompt and new tokens at full length.

    Args:
        name: of the model; batch: its prompt; tokens: (B, T) generated.
        positions: of all rows, where they are not those that generate would give.
    """

    def __init__(self, name: str, batch: tiny.Batch, tokens: torch.Tensor, positions: torch.Tensor | None = None):
        self.name, self.model, self.prompt = name, bare(name), batch["input_ids"].shape[1]
        self.batch = longer(name, batch, tokens[:, :-1])
        self.positions = extend(prompt_positions(name, batch), tokens.shape[1] - 1) if positions is None else positions
        self.valid, self.rows = self.batch["attention_mask"].bool(), self.batch["input_ids"].shape[1]
        text = self.model.config.get_text_config()
        self.layers, self.heads = text.num_hidden_layers, text.num_attention_heads
        self.kv_heads = text.num_key_value_heads
        self.windows = windows(name)

    @property
    def evicting(self) -> list[int]:
        """Layers that see the whole prompt; sliding ones are bounded already."""
        return [i for i in range(self.layers) if self.windows[i] is None]

    @property
    def blocks(self) -> torch.Tensor | None:
        """(B, L) which block a row belongs to, whose rows see each other both ways; -1: none. None: there are none."""
        types = self.batch.get("token_type_ids")
        if types is None:
            return None
        if self.name == "paligemma":  # the prompt
            return types.ne(0).long().neg()
        starts = types * torch.cat([types[:, :1], types.diff(dim=1)], 1).clamp(min=0)  # Gemma 3: runs of image tokens
        return torch.where(types == 1, starts.cumsum(1), -1)

    def images(self, row: int) -> list[list[int]]:
        """Rows of the prompt at which the tokens of each image stand, then of each video."""
        out = []
        for token, sizes in ((IMG, tiny.image_tokens), (VID, tiny.video_tokens)):
            where = (self.batch["input_ids"] == token).nonzero()
            if len(where):
                parts = where.split(sizes(self.name, self.batch))
                out += [part[:, 1].tolist() for part in parts if part[0, 0] == row]
        return out

    def visual(self, row: int) -> list[list[int]]:
        """The same without the newlines that stand between the crops of an image and are no tokens of it."""
        newline = getattr(self.model.base_model, "image_newline", None)
        if newline is None:
            return self.images(row)
        x = embed(self.name, self.batch)[row]
        return [[i for i in rows if not torch.equal(x[i], newline)] for rows in self.images(row)]

    def causal(self, layer: int = 0, rows: list[int] | None = None, order: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 1, L, L) bool: what each row sees when nothing is removed.

        Args:
            rows: only these, as if there were no others; order: (B, L) where windows are measured.
        """
        rows = list(range(self.rows)) if rows is None else rows
        at = torch.arange(len(rows)).expand(len(self.valid), -1) if order is None else order
        see = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        if self.blocks is not None:
            block = self.blocks[:, rows]
            see = see | ((block[:, :, None] == block[:, None]) & (block >= 0)[:, None])[:, None]
        see = see & self.valid[:, None, None, rows]
        if self.windows[layer] is not None:
            see = see & (at[:, None, :, None] - at[:, None, None, :] < self.windows[layer])
        return see

    def run(self, see: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits (B, L, V) and attention (B, H, L, L) per layer, layer l under the bool mask `see[l]`."""
        real = self.valid.long()
        return rerun(self.model, self.batch, lambda kw: dict(kw, position_ids=self.positions, attention_mask=real), see)

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

    def survivors(self, kept: list[list[list[int]]], order: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Per layer: causal, and of the prompt only the rows that entered the layer."""
        return [self.causal(i, order=order) & self.columns(rows)[:, None, None] for i, rows in enumerate(kept)]

    def evicted(self, see: list[torch.Tensor], cache: Any) -> list[torch.Tensor]:
        """Masks, and hidden from the rows after the prompt what each layer and head no longer stores."""
        out, late = list(see), torch.arange(self.rows)[:, None] >= self.prompt
        for i in self.evicting:
            held = slots(cache, i, self.rows + 1, self.heads)[..., : self.rows]  # the last token may be stored
            out[i] = out[i] & (held[:, :, None] | ~late)
        return out


def windows(name: str) -> list[int | None]:
    """Sliding window of every layer, None where a layer sees everything."""
    text = bare(name).config.get_text_config()
    types = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None)
    return [window if kind == "sliding_attention" else None for kind in types]


# -- shortened by hand ----------------------------------------------------------------------------------------------
def short_logits(
    name: str,
    sample: tiny.Batch,
    tokens: torch.Tensor,
    kept: list[list[int]],
    vectors: list[torch.Tensor] | None = None,
    deep: list[torch.Tensor] | None = None,
    positions: str | float = "auto",
    more: torch.Tensor | None = None,
) -> torch.Tensor:
    """(T, V): the language model on one sample whose visual embeddings were cut by hand, without a cache.

    Args:
        sample: one unpadded row; tokens: (T,) that were generated; kept: token indices per image, then per video.
        vectors: what stands at the kept places, per image (default: their embeddings).
        deep: per layer of DeepStack the features of the kept places (default: their own).
        positions: "auto", "renumber", "original", how far visual tokens lie apart, or "shared:G".
        more: (L, D) what is added to the embeddings of the prompt.
    """
    full = FullLength(name, sample, tokens[None])
    images = full.images(0)
    assert len(images) == len(kept)
    chosen = [rows[k] for rows, mine in zip(images, kept) for k in mine]
    stay = sorted(set(range(full.rows)) - {row for rows in images for row in rows} | set(chosen))
    where = full.positions[..., stay]
    if positions == "renumber" or (positions == "auto" and not mrope(name)):
        where = full.positions[..., : len(stay)]
    if isinstance(positions, float):  # visual tokens so far apart, text at the next whole one
        at, places = -1.0, []
        for row in stay:
            at = at + positions if row in chosen else float(math.ceil(at)) + 1
            places.append(at)
        where = torch.tensor([places])
    if str(positions).startswith("shared"):
        at, places, run = -1, [], 0
        for row in stay:
            run = run + 1 if row in chosen else 0
            at += run % int(positions[7:]) == 1 or not run
            places.append(at)
        where = torch.tensor([places])

    def change(kwargs: dict[str, Any]) -> dict[str, Any]:
        x = kwargs["inputs_embeds"].clone()
        if vectors is not None:
            x[0, chosen] = torch.cat(vectors)
        if more is not None:
            x[0, : len(more)] += more
        ones = torch.ones(1, len(stay), dtype=torch.long)
        out = dict(kwargs, inputs_embeds=x[:, stay], position_ids=where, attention_mask=ones)
        if "per_layer_inputs" in kwargs:  # of every token, for every layer
            out["per_layer_inputs"] = kwargs["per_layer_inputs"][:, stay]
        if "visual_pos_masks" in kwargs:  # DeepStack: features for every visual row, in their order
            visual = kwargs["visual_pos_masks"][0]
            left = [i for i, row in enumerate(visual.nonzero()[:, 0].tolist()) if row in stay]
            out["visual_pos_masks"] = visual[None, stay]
            out["deepstack_visual_embeds"] = deep or [x[left] for x in kwargs["deepstack_visual_embeds"]]
        return out

    # A model that hands ready-made masks to its language model would hand those of a short prompt.
    see = None if full.blocks is None else [full.causal(i, stay) for i in range(full.layers)]
    return rerun(full.model, full.batch, change, see)[0][0, -len(tokens) :]


@torch.no_grad()
def image_embeddings(name: str, batch: tiny.Batch) -> list[torch.Tensor]:
    """(N, D) of every image, then of every video, of one sample."""
    full, x = FullLength(name, batch, batch["input_ids"][:, :1]), embed(name, batch)
    return [x[0, rows] for rows in full.images(0)]


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


# -- what a compressed cache stores ---------------------------------------------------------------------------------
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
    """Bytes of all storages behind what a cache keeps of its entries; what layers share counts once."""
    tensors = [t for layer in held_layers(cache) for t in layer.tensors()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def visual_inputs(batch: tiny.Batch) -> tiny.Batch:
    """What a batch holds besides tokens."""
    return {key: value for key, value in batch.items() if key not in TOKEN_KEYS}
