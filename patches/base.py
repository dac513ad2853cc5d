"""What an architecture has to say about itself. Everything here has a default; a file per architecture overrides it."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_compress.patches.unsupported import reason
from hf_compress.signals import Assignment
from hf_compress.tensors.rows import take

Grid = tuple[int, int]  # (h, w) in tokens that the language model reads
Box = tuple[float, float, float, float]  # top, left, bottom, right as fractions of the sides of an image
Crops = Tensor | list[Tensor]  # one tensor per crop, or all in one where they are of one size
# Arguments of calls that encode images: one that leaves all to the config, one that reads the last block of the tower.
AS_CONFIGURED: Mapping[str, Any] = MappingProxyType({})
DEEPEST: Mapping[str, Any] = MappingProxyType({"vision_feature_layer": -1})


@dataclass
class TowerBlock:
    """The parts of one vision block between which tokens can be reduced."""

    block: nn.Module
    attention: nn.Module
    norm: nn.Module  # reads the sum of the residual stream and the attention output
    mlp: nn.Module


@dataclass
class TowerCall:
    """What one call of `get_image_features` (or videos) left behind.

    Attributes:
        inputs: arguments of that call, by name; `tower`: arguments of the vision tower.
        features: what the projector read, as it came; `further`: what it read then, where it was called again.
        blocks: tower blocks that see the whole image, the last of which makes the features.
        reads: what will be read of which block, (block, what), and what its calls left: of "attention" records, of
            "key" and "value" the tensors (B, H, P, d), of "hidden" the states as they came.
        fixed: per crop the kept tokens that were settled on the pixels or inside the tower, if they were.
        sample: a few numbers of what came into the tower, by which an image is known again, (crops, n), or (patches,)
            where it takes rows of patches; and how many numbers a crop (a row) has in all.
    """

    inputs: dict[str, Any]
    tower: dict[str, Any] = field(default_factory=dict)
    features: Tensor | None = None
    further: list[Tensor] = field(default_factory=list)
    blocks: Sequence[int] = ()
    reads: dict[tuple[int, str], list[Any]] = field(default_factory=dict)
    fixed: list[Assignment] | None = None
    sample: tuple[Tensor, int] | None = None


@dataclass
class Unit:
    """One crop of one image: what a method sees as an image.

    Attributes:
        image: which image (or video) of the call.
        grid: (h, w) in tokens, None where it cannot be known.
        rows: (N,) rows of the image's features that are its tokens, ascending; rows of no unit (newlines) always stay.
        crop: which crop of the tower's batch, and `source` (N,) which of its tokens; None: all of them.
        pooled: its tokens are mixtures of what the projector gave, so that merging before it would change them all.
        crops: over how many crops, from `crop` on, its grid lies.
        box: where it lies in its image, None where that is not known.
    """

    image: int
    grid: Grid | None
    rows: Tensor
    crop: int
    source: Tensor | None = None
    pooled: bool = False
    crops: int = 1
    box: Box | None = (0.0, 0.0, 1.0, 1.0)

    def read(self, crops: Crops) -> Tensor:
        """A signal of this unit, (N, ...), from the signals of all crops."""
        rows = crops[self.crop]
        return rows if self.source is None else rows[self.source]


class Architecture:
    """Base of the adapters in this folder.

    Attributes:
        model_types: `config.model_type` values that the adapter serves.
        stages: the stages of methods that can act on it; `without` says why others cannot.
        states: types of decoder layers that keep one state of what they have read instead of keys and values per token.
            Rows that only fill up would change it: they may stand in front of a prompt only.
        around: types of language models that it serves and that are refused elsewhere.
        gives: the needs of methods that it meets (`hf_compress.registry.NEEDS`).
        modalities: what its visual tokens can be, "image" and "video".
        positions: what "auto" means here: "renumber" on 1-D RoPE, "original" on M-RoPE.
        has_cls: [CLS] stands before the patches in the tower.
        crops: an image is cut into crops, each with its own share of the budget.
        tiles: the tiles of a picture come as images of their own, which `same_picture` joins.
        resizable: the tower takes images of any resolution.
        tower_signals: which attention rows there are and what of them belongs to a token, one line for the tables.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    stages: ClassVar[tuple[str, ...]] = ("vision", "prompt", "decoder", "cache")
    without: ClassVar[str] = ""
    states: ClassVar[frozenset[str]] = frozenset()
    around: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    positions: ClassVar[str] = "renumber"
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    has_cls: ClassVar[bool] = False
    crops: ClassVar[bool] = False
    tiles: ClassVar[bool] = False
    resizable: ClassVar[bool] = False
    tower_signals: ClassVar[str] = "none"

    def check(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> None:
        """Raises ValueError where a checkpoint of the right type is built in a way that the adapter does not know.

        Args:
            inputs: arguments of `get_image_features` (or videos) by name, which can ask for what the config does not.

        By default: around a language model that cannot be served.
        """
        text = model.config.get_text_config()
        if why := reason(text, self.states, self.around):
            raise ValueError(f"model={type(model).__name__} around {text.model_type!r} cannot be compressed: {why}")

    def setting(self, model: nn.Module, inputs: Mapping[str, Any], name: str, default: Any = None) -> Any:
        """What a call that encodes goes by: its argument, else the config. One that no config has is not read."""
        if not hasattr(model.config, name):
            return default
        given = inputs.get(name)
        return getattr(model.config, name) if given is None else given

    # -- language model -------------------------------------------------------------------------------------------
    def decoder(self, model: nn.Module) -> nn.Module:
        """The stack of decoder layers with its embeddings and final norm."""
        return model.get_decoder()

    def layers(self, decoder: nn.Module) -> nn.ModuleList:
        """Its layers."""
        return decoder.layers

    def parts(self, layer: nn.Module) -> list[nn.Module]:
        """What a decoder layer adds to its residual stream, in order: its attention and its MLP; []: not known."""
        found = [getattr(layer, name, None) for name in ("self_attn", "mlp")]
        return [part for part in found if part is not None] if all(found) else []

    def last_part(self, layer: nn.Module) -> nn.Module:
        """What gives a decoder layer the last thing that it adds to its residual stream: its MLP, or a norm behind it.

        Raises:
            ValueError: it is not known.
        """
        for name in ("post_feedforward_layernorm", "post_mlp_layernorm", "mlp", "feed_forward", "block_sparse_moe"):
            if isinstance(found := getattr(layer, name, None), nn.Module):
                return found
        raise ValueError(f"model: where the MLP of a {type(layer).__name__} ends is not known; use another method")

    def min_drop_layer(self, model: nn.Module) -> int:
        """The first decoder layer before which rows may be dropped."""
        return 1

    def window(self, decoder: nn.Module, layer: int) -> int | None:
        """Sliding window of a layer in tokens, None if it sees everything."""
        config = decoder.config
        types = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        if types is not None:
            return window if types[layer] == "sliding_attention" else None
        return window if getattr(config, "use_sliding_window", True) else None

    def earlier_layer(self, decoder: nn.Module, layer: int) -> int | None:
        """The layer whose keys and values a decoder layer reads in place of its own; None: it has its own."""
        return None

    def rotates(self, attention: nn.Module) -> bool:
        """Whether an attention of the decoder rotates its queries and keys; some models spare their full layers."""
        kind, window = getattr(attention.config, "model_type", ""), getattr(attention, "sliding_window", None)
        if kind == "cohere2":
            return window is not None
        if kind == "exaone4":
            return window is None or bool(attention.is_sliding)
        return bool(getattr(attention, "use_rope", True))  # SmolLM3

    def query_key(
        self, layer: nn.Module, hidden: Tensor, rows: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Rotated queries of a few rows and all rotated keys of a decoder layer about to run.

        Args:
            hidden: (B, S, D) entering the layer.
            rows: (B, R) whose queries are wanted.
            rotary: cos and sin, (B or 1, S, d).

        Returns:
            (B, Hq, R, d) and (B, Hkv, S, d).
        """
        attention = layer.self_attn
        x = layer.input_layernorm(hidden)
        rows, cos, sin = (t.to(x.device) for t in (rows, *rotary))  # layers may lie on several devices
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb

        def rotated(name: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            out = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim))
            norm = getattr(attention, f"{name}_norm", None)
            out = (out if norm is None else norm(out)).transpose(1, 2).contiguous()  # else all that follows is slower
            return rotate(out[:, :0], out, cos, sin)[1]  # it turns two tensors at once: the other one has no heads

        return rotated("q", *(take(t, rows) for t in (x, cos, sin))), rotated("k", x, cos, sin)

    def cut_extras(self, kw: dict[str, Any], keep: Tensor, rows: Tensor, alive: Tensor) -> None:
        """Cut what else the language model takes per token, in place.

        Args:
            kw: its keyword arguments.
            keep: (B, q) bool, rows that stay; rows: (B, L) their indices; alive: (B, L) False on filler slots.
        """

    # -- vision ---------------------------------------------------------------------------------------------------
    def placeholders(self, config: Any) -> dict[str, int]:
        """{modality: token id that stands for its features}; {} on text models."""
        ids = {m: getattr(config, f"{m}_token_id", None) for m in self.modalities}
        return {m: i for m, i in ids.items() if i is not None}

    def tower(self, model: nn.Module) -> nn.Module | None:
        """The vision tower."""
        return None

    def by_tower(self, model: nn.Module) -> list[Architecture]:
        """An adapter per vision tower: itself alone, unless modalities have towers of their own."""
        return [self]

    def projector(self, model: nn.Module) -> nn.Module:
        """What turns tower features into embeddings of the language model."""
        raise NotImplementedError

    def tokens_per_image(self, model: nn.Module) -> int | None:
        """Visual tokens of every image where the checkpoint takes one resolution only."""
        return None

    def attention_blocks(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> list[int]:
        """Blocks whose attention sees the whole image, up to the one that produces the features of a call.

        Args:
            inputs: arguments of `get_image_features` (or videos) by name.
        """
        return []

    def feature_blocks(self, model: nn.Module, inputs: Mapping[str, Any], depth: int) -> list[int]:
        """Of `depth` blocks those up to the last one whose hidden states the projector reads."""
        layers = self.setting(model, inputs, "vision_feature_layer", -1)  # of hidden states; 0 is the embedding
        layers = [layers] if isinstance(layers, int) else layers
        if not layers or not all(-depth - 1 <= i <= depth for i in layers):
            raise ValueError(f"vision_feature_layer={layers}: the vision tower has {depth} blocks")
        return list(range(max(i if i >= 0 else depth + 1 + i for i in layers)))

    def attention_module(self, model: nn.Module, block: int) -> nn.Module:
        """Attention of one tower block."""
        raise NotImplementedError

    def hidden_module(self, model: nn.Module, block: int) -> nn.Module:
        """What gives the hidden states of one tower block: the block itself."""
        raise NotImplementedError

    def cls_tokens(self, model: nn.Module) -> int:
        """How many rows of the tower stand before the patches of a crop: its [CLS], or none."""
        return int(self.has_cls)

    def packed(self, model: nn.Module, call: TowerCall) -> list[int] | None:
        """Patches of every crop where the tower reads all crops in one row; None: they stand side by side."""
        return None

    def real(self, call: TowerCall) -> Tensor | None:
        """(crops, P) bool: which patches the tower attends to; None: all of them."""
        return None

    def per_token(self, model: nn.Module, call: TowerCall, x: Tensor) -> Crops:
        """Patches of the tower as tokens of the language model: all that its other signals follow from.

        Args:
            x: (crops, P, C), or (1, P, C) where all crops are `packed` in one row; without [CLS].

        Returns:
            (N, g, C) per crop: the g patches that each token joins, in reading order.
        """
        return x[:, :, None]

    def tower_blocks(self, model: nn.Module, inputs: Mapping[str, Any] = AS_CONFIGURED) -> list[TowerBlock]:
        """Blocks up to the feature block of a call, where tokens can be reduced inside the tower; [] where not."""
        return []

    def joined(self, model: nn.Module) -> int:
        """How many patches that follow each other in the tower are one token behind it, where it can be entered."""
        return 1

    def crops_per_image(self, call: TowerCall) -> list[int] | None:
        """How many of the crops of a call belong to each image, where a tower that can be entered reads several of one
        image; None: one each."""
        return None

    def tower_mergers(self, model: nn.Module) -> list[nn.Module]:
        """Modules inside the tower that join the patches of tokens, (R, D) to (N, D): they give all tokens again."""
        return []

    def cut_block(self, kwargs: dict[str, Any], source: Tensor) -> None:
        """Cut what a block of the tower takes per row, in place.

        Args:
            kwargs: its keyword arguments; source: (R',) the rows that are left of those that entered the tower.
        """

    def images(self, model: nn.Module, modality: str, out: Any, inputs: dict[str, Any]) -> list[Tensor]:
        """(rows, D) per image from what `get_image_features` gave."""
        return list(out.pooler_output)

    def refill(self, out: Any, features: Tensor, keep: Tensor) -> Any:
        """A copy of what `get_image_features` gave that holds the features of a shortened prompt.

        Args:
            features: (K, D) those that stay, all images in a row; keep: (rows,) bool, which ones they are.
        """
        out = copy.copy(out)
        out.pooler_output = features[None] if torch.is_tensor(out.pooler_output) else [features]
        return out

    def units(self, model: nn.Module, modality: str, images: list[Tensor], inputs: dict[str, Any]) -> list[Unit]:
        """The crops of every image, in the order of the images.

        Args:
            images: (rows, D) features per image.
            inputs: arguments of `get_image_features`, or of `forward` if the caller encoded the images himself.
        """
        return [
            Unit(i, self.grid(model, len(x), inputs), torch.arange(len(x), device=x.device), i)
            for i, x in enumerate(images)
        ]

    def same_picture(self, before: list[int], gap: int) -> bool:
        """Whether an image is a tile of the picture that the image before it belongs to, where `tiles`.

        Args:
            before: token ids of the prompt up to its first placeholder; gap: how many of them stand between the two.
        """
        raise NotImplementedError

    def grid(self, model: nn.Module, tokens: int, inputs: Mapping[str, Any]) -> Grid | None:
        """Grid of an image of so many tokens: a square, None where there is none."""
        side = math.isqrt(tokens)
        return (side, side) if side * side == tokens else None

    def pixels(self, model: nn.Module, call: TowerCall) -> Crops:
        """What the tower was given, per crop, without what only fills up the batch."""
        return call.tower["pixel_values"]

    def grids(self, model: nn.Module, call: TowerCall, tokens: list[int]) -> list[Grid | None]:
        """The token grid of every crop of a call, of so many tokens each, where a tower can be entered."""
        return [self.grid(model, n, call.inputs) for n in tokens]

    def token_pixels(self, model: nn.Module, call: TowerCall) -> Crops:
        """(N, C) per crop: the pixels of the patches that each token joins, as the tower was given them.

        By default of images in the patches of the vision config, which `per_token` takes in raster order.
        """
        sides = model.config.vision_config.patch_size
        p, q = (sides, sides) if isinstance(sides, int) else sides
        x = self.pixels(model, call)
        assert isinstance(x, Tensor)
        if x.ndim == 5:  # frames of videos
            x = x.flatten(0, 1)
        x = x.unflatten(2, (-1, p)).unflatten(4, (-1, q)).permute(0, 2, 4, 1, 3, 5)  # (crops, h, w, 3, p, q)
        return each(lambda tokens: tokens.flatten(-2), self.per_token(model, call, x.flatten(1, 2).flatten(2)))

    def features(self, model: nn.Module, call: TowerCall) -> Crops:
        """(N, Dv) per crop: what the projector read, patches that it joins into one token concatenated."""
        assert call.features is not None
        x = call.features if call.features.ndim == 3 else call.features[None]
        return each(lambda tokens: tokens.flatten(-2), self.per_token(model, call, x))

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        """(K, Dv) merged features of tokens to (K, D) embeddings."""
        return self.projector(model)(features[None])[0]

    def resize(self, model: nn.Module, tower: dict[str, Any], choose: Any) -> tuple[dict[str, Any], list[Tensor]]:
        """The arguments of a tower call with every image resized.

        Args:
            tower: arguments of the tower, by name.
            choose: function ((h, w), frames) -> (h', w') on token grids; all frames of a video take one.

        Returns:
            the new arguments; per crop the (N,) index of the new token nearest to each original one.
        """
        raise NotImplementedError

    def spread(self, out: Any, index: Tensor) -> None:
        """Copy what a tower made of resized images over the tokens of the original ones, in place.

        Args:
            out: output of the tower.
            index: (N,) the new token that stands at each original one, all crops in a row.
        """
        out.pooler_output = out.pooler_output[index]


def each(change: Callable[[Tensor], Tensor], crops: Crops) -> Crops:
    """Every crop changed, or all at once where they are of one size."""
    return change(crops) if isinstance(crops, Tensor) else [change(x) for x in crops]
