"""Reducing tokens inside the vision tower, between the attention and the MLP of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.engine.attention import Call
from hf_compress.engine.reduction import Reduction
from hf_compress.engine.stage import Budgeted
from hf_compress.engine.state import State
from hf_compress.engine.undo import UndoLog
from hf_compress.engine.vision import image_budget
from hf_compress.patches.base import DEEPEST, Architecture, TowerBlock
from hf_compress.signals import Assignment
from hf_compress.tensors.ambient import own_precision
from hf_compress.tensors.merge import first_members


@dataclass
class BlockView:
    """The `Block` that a method sees."""

    index: int
    steps: int
    has_cls: bool
    hidden: Tensor
    sizes: Tensor
    keys: Tensor


class BlockStep:
    """Hooks of one block.

    A block computes y = x + MLP(norm(x)), x being its residual stream after attention. The norm is given the reduced
    x, the output of the MLP is copied back to every member of its group, and y is reduced as x was: that is reduced x
    + MLP(norm(reduced x)), without replacing any code of the block.
    """

    def __init__(self, reducer: TowerReducer, index: int):
        self.reducer, self.index = reducer, index

    def _now(self) -> Reduction | None:
        now = self.reducer.state.reduction
        return None if now is None or self.index >= now.steps else now

    @torch.compiler.disable
    def bias(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Proportional attention: ln(size) on the logits of every key."""
        now = self._now()
        if now is None or now.sizes is None:
            return None
        mask = now.sizes.log()[:, None, None, :].to(args[0].dtype)
        return (args[0], mask, *args[2:]), {k: v for k, v in kwargs.items() if k != "attention_mask"}

    @torch.compiler.disable
    def record(self, key: Any, call: Call) -> None:
        """Called by the tap on the block's attention."""
        now = self._now()
        if now is not None:
            now.keys = call.key.detach().mean(1)

    @torch.compiler.disable
    def reduce(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The residual stream after attention, reduced."""
        now, x = self._now(), args[0]
        if now is None or now.keys is None:
            return None
        has_cls = self.reducer.adapter.has_cls
        sizes = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device) if now.sizes is None else now.sizes
        view = BlockView(self.index, now.steps, has_cls, x.detach(), sizes, now.keys)
        patches = (x if now.groups is None else now.groups).shape[1] - int(has_cls)
        with torch.no_grad():
            now.step = own_precision(self.reducer.stage.method.reduce)(view, self.reducer.keep(patches))
        if now.step is not None and now.step.valid is not None:
            raise ValueError(
                f"method={self.reducer.stage.name!r}: images that run side by side in the tower keep equal counts; "
                "answer without `valid`, or act on the output"
            )
        return None if now.step is None else ((now.step.apply(x), *args[1:]), kwargs)

    @torch.compiler.disable
    def spread(self, mlp: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
        """Every member of a group receives the group's MLP output."""
        now = self._now()
        if now is None or now.step is None:
            return None
        local = Reduction()
        local.apply(now.step, self._present(now))
        return local.spread(out)

    def _present(self, now: Reduction) -> int:
        assert now.keys is not None
        return now.keys.shape[1]

    @torch.compiler.disable
    def merge(self, block: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """The block's output, reduced as its residual stream was."""
        now = self._now()
        if now is None or now.step is None:
            return None
        step, now.step = now.step, None
        now.apply(step, self._present(now))
        return (step.apply(out[0]), *out[1:]) if isinstance(out, tuple) else step.apply(out)


class TowerReducer:
    """Lets a `TowerMethod` act after the attention of each block up to the feature block.

    At the exit of the tower every original row is copied from its group, so that projectors and placeholder counts
    stay valid; the copies are cut at the entry of the language model.
    """

    def __init__(self, model: nn.Module, adapter: Architecture, state: State, stage: Budgeted):
        self.model, self.adapter, self.state, self.stage = model, adapter, state, stage

    def install(self, log: UndoLog) -> None:
        """Register the hooks where the tower can be entered, on every block that a call can want."""
        tower, blocks = self.adapter.tower(self.model), self.adapter.tower_blocks(self.model, DEEPEST)
        if tower is None or not blocks:
            return
        log.pre_hook(tower, self.enter)
        log.hook(tower, self.leave)
        for i, parts in enumerate(blocks):
            self._install_block(log, parts, BlockStep(self, i))

    def keep(self, patches: int) -> int:
        """How many of so many patches stay."""
        return image_budget(patches, self.stage.ratio, self.stage.keep)

    def _install_block(self, log: UndoLog, parts: TowerBlock, step: BlockStep) -> None:
        log.pre_hook(parts.block, step.bias)
        log.tap(parts.attention, step.record, step.index)
        log.pre_hook(parts.norm, step.reduce)
        log.hook(parts.mlp, step.spread)
        log.hook(parts.block, step.merge, first=True)  # before transformers records the block's output

    @torch.compiler.disable
    def enter(self, tower: nn.Module, args: Any, kwargs: Any) -> None:
        """A new run of the tower; one that encodes nothing for the language model is not touched.

        Raises:
            ValueError: the tower will recompute its blocks in backward, without the tokens of this run.
        """
        if tower.training and any(getattr(m, "gradient_checkpointing", False) for m in tower.modules()):
            raise ValueError(
                "where='tower': gradient checkpointing recomputes the blocks of the vision tower, in which tokens were "
                "merged; compress with where='output', or switch checkpointing off for the tower"
            )
        call = self.state.call
        steps = 0 if call is None else len(self.adapter.tower_blocks(self.model, call.inputs))
        self.state.reduction = Reduction(steps)

    @torch.compiler.disable
    def leave(self, tower: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """Copy groups back to all their members, and note which token stands for which."""
        now, call = self.state.reduction, self.state.call
        self.state.reduction = None
        if now is None or now.groups is None or call is None:
            return None
        out.last_hidden_state = now.spread(out.last_hidden_state)
        if getattr(out, "hidden_states", None) is not None:
            out.hidden_states = tuple(h if h is None else now.spread(h) for h in out.hidden_states)
        groups = now.groups[:, int(self.adapter.has_cls) :] - int(self.adapter.has_cls)
        rows = int(groups.max()) + 1  # of every image; tokens that vanished (-1) are counted behind them
        kept = first_members(groups % (rows + 1), rows + 1)[:, :rows].sort(dim=1).values
        call.fixed = [Assignment(first[None], group[None]) for first, group in zip(kept, groups)]
        return out
