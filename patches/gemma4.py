"""Gemma 4: images of any shape as rows of patches, a square of which is one token; layers share keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.patches.base import Grid, TowerCall, Unit
from hf_compress.patches.encoder import EncoderLayers


class Gemma4(EncoderLayers):
    """The tower averages k x k patches to one token, places them by their positions and drops what is padding; signals
    of a token: mean over its patches. Tokens also have inputs per layer, which go with them, and the later layers read
    keys and values of earlier ones. Images only."""

    model_types = ("gemma4",)
    stages = ("vision",)
    without = "its later layers read the keys and values of earlier ones, and tokens have inputs for every layer"
    around = frozenset({"gemma4_text"})
    gives = frozenset({"visual", "cls", "places"})
    tower_signals = "attention received in the last block, mean over the patches of a token"

    def earlier_layer(self, decoder: nn.Module, layer: int) -> int | None:
        kinds, shared = decoder.config.layer_types, decoder.config.num_kv_shared_layers
        own = len(kinds) - (shared or 0)
        return None if layer < own else max(i for i in range(own) if kinds[i] == kinds[layer])

    def cut_extras(self, kw: dict[str, Any], keep: Tensor, rows: Tensor, alive: Tensor) -> None:
        if (inputs := kw.get("per_layer_inputs")) is not None:
            at = rows.to(inputs.device)[:, :, None, None]
            kw["per_layer_inputs"] = inputs.gather(1, at.expand(-1, -1, *inputs.shape[2:]))

    def projector(self, model: nn.Module) -> nn.Module:
        return model.base_model.embed_vision

    def _grid(self, model: nn.Module, places: Tensor) -> Grid:
        """(h, w) in tokens of an image whose patches have the places (P, 2), x before y, -1 on padding."""
        w, h = (places.amax(0) + 1) // model.config.vision_config.pooling_kernel_size
        return int(h), int(w)

    def units(self, model: nn.Module, modality: str, images: list[Tensor], inputs: dict[str, Any]) -> list[Unit]:
        places = inputs.get("image_position_ids")
        grids: list[Grid | None] = [None] * len(images)
        if places is not None and len(places) == len(images):
            found = [self._grid(model, mine) for mine in places]
            if [h * w for h, w in found] == [len(x) for x in images]:
                grids = list(found)
        return [Unit(i, grids[i], torch.arange(len(x), device=x.device), i) for i, x in enumerate(images)]

    def real(self, call: TowerCall) -> Tensor:
        return (call.tower["pixel_position_ids"] >= 0).all(-1)

    def per_token(self, model: nn.Module, call: TowerCall, x: Tensor) -> list[Tensor]:
        k, out = model.config.vision_config.pooling_kernel_size, []
        for patches, places, real in zip(x, call.tower["pixel_position_ids"], self.real(call)):
            _, w = self._grid(model, places)
            token = places[real, 0] // k + w * (places[real, 1] // k)
            out.append(patches[real][token.argsort(stable=True)].unflatten(0, (-1, k * k)))
        return out

    def pixels(self, model: nn.Module, call: TowerCall) -> list[Tensor]:
        return [x[real] for x, real in zip(call.tower["pixel_values"], self.real(call))]

    def features(self, model: nn.Module, call: TowerCall) -> list[Tensor]:
        assert call.features is not None
        sizes = self.real(call).sum(1) // model.config.vision_config.pooling_kernel_size**2
        return list(call.features.split(sizes.tolist()))
