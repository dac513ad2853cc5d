"""Around the vision tower: recording a run, and resizing the images before it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.engine.attention import Call
from hf_compress.engine.encoded import Encoded
from hf_compress.engine.reach import enters
from hf_compress.engine.stage import Budgeted
from hf_compress.engine.state import State
from hf_compress.engine.undo import UndoLog
from hf_compress.engine.vision import check_tower, image_budget
from hf_compress.methods.base import PixelMethod
from hf_compress.patches.base import DEEPEST, Architecture, Grid, TowerCall
from hf_compress.signals import Assignment

SAMPLE = 64  # numbers per crop by which it is known again


class Encode:
    """Instance attribute `get_image_features` (or videos) that notes what was encoded; same signature."""

    def __init__(self, recorder: TowerRecorder, modality: str):
        self.recorder, self.modality = recorder, modality
        self.__name__ = f"get_{modality}_features"

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._bound())  # computed, not stored: signatures cannot be pickled

    def _bound(self) -> Any:
        base = self.recorder.model.base_model
        return getattr(type(base), self.__name__).__get__(base)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder, state = self.recorder, self.recorder.state
        if state.call is not None or state.off:  # encoding videos by way of images
            return self._bound()(*args, **kwargs)
        asked = kwargs.pop("return_dict", None)
        call = recorder.begin(named(self.__signature__, args, kwargs))
        try:
            out = self._bound()(*args, **kwargs, return_dict=True)
        finally:
            state.call = state.reduction = None
        images = recorder.adapter.images(recorder.model, self.modality, out, call.inputs)
        units = recorder.adapter.units(recorder.model, self.modality, images, call.inputs)
        state.encoded[self.modality] = Encoded(call, images, units, out.pooler_output, self.modality)
        named_parts = getattr(recorder.model.base_model.config, "return_dict", True) if asked is None else asked
        return out if named_parts else out.to_tuple()


class TowerRecorder:
    """Hooks on encoder, tower and projector that leave an `Encoded` in the state of the thread after every run.

    Args:
        stage: the vision stage, or None where only later stages need to know which rows are visual.
    """

    def __init__(self, model: nn.Module, adapter: Architecture, state: State, stage: Budgeted | None):
        self.model, self.adapter, self.state, self.stage = model, adapter, state, stage
        method = None if stage is None else stage.method
        self.resize = method if isinstance(method, PixelMethod) and adapter.resizable else None

    def __deepcopy__(self, memo: dict[int, Any]) -> TowerRecorder:
        """Goes along with a copy of the model; a copy of one module (peft's `modules_to_save`) reports here too."""
        if id(self.model) not in memo:
            return self
        memo[id(self)] = new = object.__new__(type(self))
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def install(self, log: UndoLog) -> None:
        """Register the hooks, on every block whose attention a call can want."""
        base = self.model.base_model
        for modality in self.adapter.modalities:
            if hasattr(base, f"get_{modality}_features"):
                log.attribute(base, f"get_{modality}_features", Encode(self, modality))
        log.pre_hook(self.adapter.projector(self.model), self.before_projector)
        for adapter in self.adapter.by_tower(self.model):
            tower = adapter.tower(self.model)
            assert tower is not None
            log.pre_hook(tower, self.enter)
            log.hook(tower, self.leave)
            blocks = self.adapter.attention_blocks(self.model, DEEPEST)
            what = {what for _, what in self._reads(blocks)}
            for block in blocks:
                if what - {"hidden"}:
                    log.tap(adapter.attention_module(self.model, block), self.record, block)
                if "hidden" in what:
                    log.hook(adapter.hidden_module(self.model, block), HiddenStates(self, block), first=True)

    def begin(self, inputs: dict[str, Any]) -> TowerCall:
        """A call with these arguments.

        Raises:
            ValueError: they ask for features that the adapter or the method does not know.
        """
        self.adapter.check(self.model, inputs)
        if self.stage is not None:
            check_tower(self.stage, self.adapter, self.model, inputs)
        blocks = self.adapter.attention_blocks(self.model, inputs)
        self.state.call = call = TowerCall(inputs, blocks=blocks, reads={read: [] for read in self._reads(blocks)})
        return call

    def _reads(self, blocks: Sequence[int]) -> set[tuple[int, str]]:
        """(block, what) of all that the method reads."""
        if self.stage is None or enters(self.stage.method, self.adapter, self.model):
            return set()  # a method inside the tower is shown the blocks themselves
        reads = {read for read in self.stage.method.reads(len(blocks)) if not read.every}
        return {(blocks[-1 - read.at], read.what) for read in reads if read.where == "tower" and read.at < len(blocks)}

    @torch.compiler.disable
    def enter(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note the arguments; resize the images if a method wants that."""
        call = self.state.call
        if call is None:
            return None
        call.tower = named(inspect.signature(tower.forward), args, kwargs)
        call.sample = sample(call.tower)
        if self.resize is None:
            return None
        call.tower, nearest = self.adapter.resize(self.model, call.tower, self._smaller)
        call.fixed = [representatives(near) for near in nearest]
        return (), call.tower

    def _smaller(self, grid: Grid, frames: int = 1) -> Grid:
        assert self.resize is not None
        assert self.stage is not None
        n = grid[0] * grid[1]
        keep = max(1, image_budget(n * frames, self.stage.ratio, self.stage.keep) // frames)
        return grid if keep == n else self.resize.resize(grid, keep)

    @torch.compiler.disable
    def record(self, block: int, call: Call) -> None:
        """Called by the taps."""
        reads = {} if self.state.call is None else self.state.call.reads
        if (block, "attention") in reads:
            reads[block, "attention"].append(call.record())
        for what, states in (("key", call.key), ("value", call.value)):
            if (block, what) in reads:
                reads[block, what].append(states.detach())

    @torch.compiler.disable
    def before_projector(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps what the projector reads."""
        if (call := self.state.call) is None:
            return
        read = args[0] if args else next(iter(kwargs.values()))
        if call.features is None:
            call.features = read
        else:
            call.further.append(read)

    @torch.compiler.disable
    def leave(self, tower: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """Spread the features of resized images over the placeholders of the original ones."""
        call = self.state.call
        if self.resize is None or call is None or call.fixed is None:
            return None
        nearest = [a.groups[0] for a in call.fixed if a.groups is not None]
        starts = accumulate((a.kept.shape[1] for a in call.fixed), initial=0)
        self.adapter.spread(out, torch.cat([near + start for near, start in zip(nearest, starts)]))
        return out


class HiddenStates:
    """Hook that keeps what one block of the tower gives."""

    def __init__(self, recorder: TowerRecorder, block: int):
        self.recorder, self.block = recorder, block

    @torch.compiler.disable
    def __call__(self, block: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        call = self.recorder.state.call
        if call is not None and (self.block, "hidden") in call.reads:
            call.reads[self.block, "hidden"].append((out[0] if isinstance(out, tuple) else out).detach())


def sample(tower: dict[str, Any]) -> tuple[Tensor, int] | None:
    """`TowerCall.sample` of the arguments of a tower."""
    pixels = next((t for t in tower.values() if torch.is_tensor(t) and t.is_floating_point()), None)
    if pixels is None:
        return None
    if pixels.ndim == 2:  # rows of patches
        return pixels[:, 0].clone(), pixels.shape[1]
    crops = pixels.flatten(1)
    return crops[:, :: max(1, crops.shape[1] // SAMPLE)][:, :SAMPLE].clone(), crops.shape[1]


def named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, those of `**kwargs` among them."""
    bound = signature.bind(*args, **kwargs).arguments
    for name, p in signature.parameters.items():
        if p.kind is p.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return bound


def representatives(nearest: Tensor) -> Assignment:
    """Per new token the original token that stands for it: the middle one of those it covers, in reading order."""
    order, sizes = nearest.argsort(stable=True), torch.bincount(nearest)
    middle = sizes.cumsum(0) - sizes + sizes // 2
    return Assignment(order[middle].sort().values[None], nearest[None])
