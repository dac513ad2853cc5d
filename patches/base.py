"""What an architecture has to say about itself. Everything here has a default; a file per architecture overrides it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Grid = tuple[int, int]  # (h, w) in tokens that the language model reads


@dataclass
class TowerBlock:
    """The parts of one vision block between which tokens can be reduced."""

    block: nn.Module
    attention: nn.Module
    norm: nn.Module  # reads the sum of the residual stream and the attention output
    mlp: nn.Module


@dataclass
class TowerCall:
    """What one run of the vision tower left behind.

    Attributes:
        inputs: positional and keyword arguments of the call, by name.
        features: what the projector read, as it came.
        embeddings: what the projector gave, as it came.
        attention: per block, the (query, key, scaling) triples of its attention calls.
    """

    inputs: dict[str, Any]
    features: Tensor | None
    embeddings: Tensor | None
    attention: dict[int, list[tuple[Tensor, Tensor, float]]]


class Architecture:
    """Base of the adapters in this folder.

    Attributes:
        model_types: `config.model_type` values that the adapter serves.
        stages: the stages of methods that can act on it.
        gives: the needs of methods that it meets (`hf_compress.registry.NEEDS`).
        positions: what "auto" means here: "renumber" on 1-D RoPE, "original" on M-RoPE.
        tower_signals: how the [CLS] row is obtained, one line for the tables.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    stages: ClassVar[tuple[str, ...]] = ("vision", "decoder", "cache")
    gives: ClassVar[frozenset[str]] = frozenset()
    positions: ClassVar[str] = "renumber"
    has_cls: ClassVar[bool] = False
    resizable: ClassVar[bool] = False  # the tower takes images of any resolution
    tower_signals: ClassVar[str] = "none"

    # -- language model -------------------------------------------------------------------------------------------
    def decoder(self, model: nn.Module) -> nn.Module:
        """The stack of decoder layers with its embeddings and final norm."""
        return model.get_decoder()

    def layers(self, decoder: nn.Module) -> nn.ModuleList:
        """Its layers."""
        return decoder.layers

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
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        d = attention.head_dim

        def project(t: Tensor, name: str) -> Tensor:
            out = getattr(attention, f"{name}_proj")(t).unflatten(-1, (-1, d))
            norm = getattr(attention, f"{name}_norm", None)
            return (out if norm is None else norm(out)).transpose(1, 2)

        def at_rows(t: Tensor) -> Tensor:
            return t.expand(x.shape[0], -1, -1).gather(1, rows[..., None].expand(-1, -1, t.shape[-1]))

        q, k = project(at_rows(x), "q"), project(x, "k")
        cos, sin = rotary
        return rotate(q, q, at_rows(cos), at_rows(sin))[0], rotate(k, k, cos, sin)[0]

    # -- vision ---------------------------------------------------------------------------------------------------
    def placeholder_ids(self, config: Any) -> tuple[int, ...]:
        """Token ids that stand for visual features; () on text models."""
        names = ("image_token_id", "video_token_id")
        return tuple(i for i in (getattr(config, name, None) for name in names) if i is not None)

    def tower(self, model: nn.Module) -> nn.Module | None:
        """The vision tower."""
        return None

    def projector(self, model: nn.Module) -> nn.Module:
        """What turns tower features into embeddings of the language model."""
        raise NotImplementedError

    def tokens_per_image(self, model: nn.Module) -> int | None:
        """Visual tokens of every image where the checkpoint takes one resolution only."""
        return None

    def attention_blocks(self, model: nn.Module) -> list[int]:
        """Blocks whose attention sees the whole image, up to the one that produces the features."""
        return []

    def attention_module(self, model: nn.Module, block: int) -> nn.Module:
        """Attention of one tower block."""
        raise NotImplementedError

    def tower_blocks(self, model: nn.Module) -> list[TowerBlock]:
        """Blocks up to the feature block, where tokens can be reduced inside the tower; [] where they cannot."""
        return []

    def grids(self, model: nn.Module, call: TowerCall) -> list[Grid]:
        """Token grid of every image of the call."""
        raise NotImplementedError

    def grids_of(self, model: nn.Module, counts: list[int], inputs: dict[str, Any]) -> list[Grid | None]:
        """Token grids when the tower did not run: from the token counts and the arguments of `forward`."""
        raise NotImplementedError

    def split(self, model: nn.Module, call: TowerCall, rows: Tensor, grids: list[Grid]) -> list[Tensor]:
        """What the projector read or gave, as one (N, D) tensor per image in reading order."""
        raise NotImplementedError

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        """(K, Dv) merged features of tokens to (K, D) embeddings."""
        raise NotImplementedError

    def cls_rows(self, model: nn.Module, call: TowerCall, block: int, grids: list[Grid]) -> list[Tensor]:
        """(H, N) fp32 attention row of [CLS] per image, or its surrogate."""
        raise NotImplementedError

    def keys(self, model: nn.Module, call: TowerCall, block: int, grids: list[Grid]) -> list[Tensor]:
        """(N, d) head-mean keys per image."""
        raise NotImplementedError

    def resize(
        self, model: nn.Module, inputs: dict[str, Any], choose: Any
    ) -> tuple[dict[str, Any], list[Tensor], list[Grid]]:
        """The arguments of a tower call with every image resized.

        Args:
            inputs: arguments of the tower, by name.
            choose: function (h, w) -> (h', w') on token grids.

        Returns:
            the new arguments; per image the (N,) index of the new token nearest to each original one; new grids.
        """
        raise NotImplementedError


def nearest_tokens(old: Grid, new: Grid, device: torch.device) -> Tensor:
    """(h*w,) int64: for every token of the grid `old` the token of the grid `new` that covers its centre."""

    def axis(n: int, m: int) -> Tensor:
        return ((torch.arange(n, device=device) * 2 + 1) * m) // (2 * n)

    return (axis(old[0], new[0])[:, None] * new[1] + axis(old[1], new[1])[None]).flatten()
