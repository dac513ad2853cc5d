"""Padded batches as one row without padding, in which the model keeps the samples apart."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_compress.api import bare
from hf_compress.patches.registry import adapter_for


class Packer:
    """A padded batch to a batch of one row, as transformers reads packed samples: position ids that start anew.

    Args:
        model: whose way of counting positions it is.

    Raises:
        ValueError: it is no model that is supported, or layers of it keep a state, which would go over from one sample
            to the next.
    """

    def __init__(self, model: Any):
        self.model = bare(model)
        try:
            self.adapter = adapter_for(self.model)
        except ValueError as error:
            raise ValueError(f"pack_for={type(model).__name__}: {error}") from error
        if self.adapter.states:
            raise ValueError(
                f"pack_for={type(self.model).__name__}: some of its layers keep a state, which would go over from one "
                "conversation to the next; pad them instead"
            )

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What has a value for every token (B, L) becomes (1, N); images stay in their order.

        Raises:
            ValueError: images see themselves both ways in this model, which it does not do sample by sample.
        """
        ids, real = batch["input_ids"], batch["attention_mask"].bool()
        self._check_sight(ids, batch.get("token_type_ids"))
        out: dict[str, Any] = {"position_ids": self._positions(batch, real), "use_cache": False}
        shown = batch.get("pixel_attention_mask")  # (B, images, ...): rows with fewer images are filled up
        for name, value in batch.items():
            if name == "attention_mask":
                continue
            if torch.is_tensor(value) and value.shape == ids.shape:
                out[name] = value[real][None]
            elif shown is not None and torch.is_tensor(value) and value.shape[:2] == shown.shape[:2]:
                out[name] = value.flatten(0, 1)[shown.flatten(0, 1).flatten(1).any(1)][None]
            else:
                out[name] = value
        return out

    def _positions(self, batch: Mapping[str, Any], real: Tensor) -> Tensor:
        """(1, N), or of rotations on several axes (4, 1, N), the first counting tokens."""
        text = (real.long().cumsum(1) - 1)[real][None]
        if self.adapter.positions != "original":
            return text
        counts = next(m for m in (self.model, self.model.model) if hasattr(m, "get_rope_index")).get_rope_index
        known = inspect.signature(counts).parameters
        axes, _ = counts(**{name: value for name, value in batch.items() if name in known})
        return torch.cat([text[None], axes[:, real][:, None]])

    def _check_sight(self, ids: Tensor, types: Any) -> None:
        if not torch.is_tensor(types):
            return
        visual = torch.isin(ids, torch.tensor(list(self.adapter.placeholders(self.model.config).values())))
        if bool(types[visual].any()):
            raise ValueError(
                f"pack_for={type(self.model).__name__}: its images see themselves both ways, and in a packed row those "
                "of other conversations too; pad the conversations instead"
            )
