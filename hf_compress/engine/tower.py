"""Around the vision tower: recording a run, and resizing the images before it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.engine.state import State
from hf_compress.engine.undo import UndoLog
from hf_compress.engine.vision import Encoded, image_budget
from hf_compress.methods.base import PixelMethod
from hf_compress.patches.base import Architecture, Grid, TowerCall
from hf_compress.signals import Assignment


class TowerRecorder:
    """Hooks on tower and projector that leave an `Encoded` in the state of the thread after every run.

    Args:
        blocks: attention blocks to record.
        resize: a method that chooses a smaller grid per image, or None.
        budget: (ratio, keep) of the vision stage.
    """

    def __init__(
        self, model: nn.Module, adapter: Architecture, state: State, budget: tuple[Any, Any], resize: PixelMethod | None
    ):
        self.model, self.adapter, self.state, self.budget, self.resize = model, adapter, state, budget, resize

    def install(self, log: UndoLog, blocks: list[int]) -> None:
        """Register the hooks; `blocks` are the attention blocks whose queries and keys are wanted."""
        tower = self.adapter.tower(self.model)
        assert tower is not None
        log.pre_hook(tower, self.enter)
        log.hook(tower, self.leave)
        log.pre_hook(self.adapter.projector(self.model), self.before_projector)
        log.hook(self.adapter.projector(self.model), self.after_projector)
        for block in blocks:
            log.tap(self.adapter.attention_module(self.model, block), self.record, block)

    @torch.compiler.disable
    def enter(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A new run begins: everything that an older one left is gone."""
        inputs = named(tower, args, kwargs)
        self.state.encoded = Encoded(TowerCall(inputs, None, None, {}), [], [])
        if self.resize is None:
            return None

        def choose(grid: Grid) -> Grid:
            n = grid[0] * grid[1]
            k = image_budget(n, *self.budget)
            return grid if k == n else self.resize.resize(grid, k)  # type: ignore[union-attr]

        changed, nearest, _ = self.adapter.resize(self.model, inputs, choose)
        self.state.encoded.call = TowerCall(changed, None, None, {})
        self.state.encoded.fixed = [representatives(near) for near in nearest]
        return (), changed

    @torch.compiler.disable
    def record(self, block: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Called by the taps."""
        encoded = self.state.encoded
        if encoded is not None and encoded.call is not None:
            encoded.call.attention.setdefault(block, []).append((query.detach(), key.detach(), scaling))

    @torch.compiler.disable
    def before_projector(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps what the projector reads; merged features come through here too and are not kept."""
        call = self._open_call()
        if call is not None and call.features is None:
            call.features = args[0]

    @torch.compiler.disable
    def after_projector(self, module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
        """Keeps what the projector gives, as one tensor per image."""
        call = self._open_call()
        if call is None:
            return
        call.embeddings = out
        encoded = self.state.encoded
        assert encoded is not None
        grids = self.adapter.grids(self.model, call)
        encoded.embeddings, encoded.grids = self.adapter.split(self.model, call, out, grids), grids
        if self.resize is not None and encoded.fixed is not None:
            encoded.embeddings = [e[a.groups[0]] for e, a in zip(encoded.embeddings, encoded.fixed)]  # type: ignore[index]
            encoded.grids = [None] * len(encoded.embeddings)

    def _open_call(self) -> TowerCall | None:
        encoded = self.state.encoded
        if encoded is None or encoded.call is None or encoded.call.embeddings is not None:
            return None
        return encoded.call

    @torch.compiler.disable
    def leave(self, tower: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """Spread the features of resized images over the placeholders of the original ones."""
        encoded = self.state.encoded
        if self.resize is None or encoded is None or encoded.fixed is None:
            return None
        out.pooler_output = torch.cat(list(encoded.embeddings))
        return out


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, `**kwargs` of the signature flattened."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    for name, p in inspect.signature(module.forward).parameters.items():
        if p.kind is p.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return bound


def representatives(nearest: Tensor) -> Assignment:
    """Per new token the original token that stands for it: the middle one of those it covers, in reading order."""
    order, sizes = nearest.argsort(stable=True), torch.bincount(nearest)
    middle = sizes.cumsum(0) - sizes + sizes // 2
    return Assignment(order[middle].sort().values[None], nearest[None])
