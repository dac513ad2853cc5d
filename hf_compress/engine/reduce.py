"""Reducing tokens inside the vision tower, between the attention and the MLP of its blocks."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.engine.answers import check_shape
from hf_compress.engine.attention import Call
from hf_compress.engine.block import BlockView
from hf_compress.engine.reach import acting
from hf_compress.engine.reduction import Reduction, Rows, Step, make_step
from hf_compress.engine.stage import Budgeted
from hf_compress.engine.state import State
from hf_compress.engine.trained import module_of
from hf_compress.engine.undo import UndoLog
from hf_compress.engine.vision import crop_budgets
from hf_compress.methods.base import TowerMethod
from hf_compress.patches.base import DEEPEST, Architecture, Grid, TowerBlock, TowerCall
from hf_compress.signals import Assignment
from hf_compress.tensors.ambient import own_precision
from hf_compress.tensors.merge import first_members

KERNELS = ("sdpa", "eager")  # of attention that take a bias


@dataclass
class AtEntry:
    """The `Patches` that a method sees."""

    pixels: Tensor
    grid: Grid


class BlockStep:
    """Hooks of one block.

    A block computes y = x + MLP(norm(x)), x being its residual stream after attention. The norm is given the reduced
    x, the output of the MLP is copied back to every member of its group, and y is reduced as x was: that is reduced x
    + MLP(norm(reduced x)), without replacing any code of the block.
    """

    def __init__(self, reducer: TowerReducer, index: int):
        self.reducer, self.index = reducer, index

    @property
    def _now(self) -> Reduction | None:
        return self.reducer.state.reduction

    @torch.compiler.disable
    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What else the block takes per row, cut to the rows that are left."""
        if not self.index:
            args = (self.reducer.begin(args[0]), *args[1:])
        now = self._now
        if now is None:
            return None
        now.calls = []
        if now.source is not None:
            self.reducer.adapter.cut_block(kwargs, now.source)
        return args, kwargs

    @torch.compiler.disable
    def attend(self, key: Any, call: Call) -> Call | None:
        """Called by the tap on the block's attention: ln(size) on the logits of every key (proportional attention)."""
        now = self._now
        if now is None:
            return None
        first = sum(len(c.key) * c.key.shape[2] for c in now.calls)
        now.calls.append(call)
        bias = self.reducer.bias(now, first, call.key.shape)
        return None if bias is None else call._replace(mask=bias.to(call.query.dtype))

    @torch.compiler.disable
    def reduce(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The residual stream after attention, reduced."""
        now, x = self._now, args[0]
        if now is None or self.index not in now.blocks:
            return None
        self.reducer.decide(now, self.index, x.flatten(0, -2))
        return None if now.step is None else ((now.reshape(now.step.apply(x.flatten(0, -2)), x), *args[1:]), kwargs)

    @torch.compiler.disable
    def spread(self, mlp: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
        """Every member of a group receives the group's MLP output."""
        now = self._now
        if now is None or now.step is None:
            return None
        return now.reshape(now.step.spread(out.flatten(0, -2)), out)

    @torch.compiler.disable
    def after(self, block: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """The block's output, reduced as its residual stream was."""
        now = self._now
        if now is None:
            return None
        step, now.step, now.calls = now.step, None, []
        if step is None:
            now.passed.append(now.into)
            return None
        now.take(step)
        now.passed.append(now.into)
        x = out[0] if isinstance(out, tuple) else out
        x = now.reshape(step.apply(x.flatten(0, -2)), x)
        return (x, *out[1:]) if isinstance(out, tuple) else x


class TowerReducer:
    """Lets a `TowerMethod` act after the attention of each block up to the feature block.

    At the exit of the tower every original row is copied from its group, so that projectors and placeholder counts
    stay valid; the copies are cut at the entry of the language model.
    """

    def __init__(self, model: nn.Module, adapter: Architecture, state: State, stage: Budgeted):
        self.model, self.adapter, self.state, self.stage = model, adapter, state, stage

    def install(self, log: UndoLog) -> None:
        """Register the hooks where the tower can be entered, on every block that a call can want."""
        tower = self.adapter.tower(self.model)
        assert tower is not None
        log.pre_hook(tower, self.enter)
        log.hook(tower, self.leave)
        for i, parts in enumerate(self.adapter.tower_blocks(self.model, DEEPEST)):
            self._install_block(log, parts, BlockStep(self, i))
        for merger in self.adapter.tower_mergers(self.model):
            log.hook(merger, self.spread)

    def _install_block(self, log: UndoLog, parts: TowerBlock, step: BlockStep) -> None:
        log.pre_hook(parts.block, step.before)
        log.tap(parts.attention, step.attend, step.index)
        log.pre_hook(parts.norm, step.reduce)
        log.hook(parts.mlp, step.spread)
        log.hook(parts.block, step.after, first=True)  # before transformers records the block's output

    @torch.compiler.disable
    def enter(self, tower: nn.Module, args: Any, kwargs: Any) -> None:
        """A new run of the tower.

        Raises:
            ValueError: the tower will recompute its blocks in backward, without the tokens of this run.
        """
        if tower.training and any(getattr(m, "gradient_checkpointing", False) for m in tower.modules()):
            raise ValueError(
                "where='tower': gradient checkpointing recomputes the blocks of the vision tower, in which tokens were "
                "merged; compress with where='output', or switch checkpointing off for the tower"
            )
        self.state.reduction = None

    def begin(self, x: Tensor) -> Tensor:
        """What of the rows `x` enters the first block; a run that encodes nothing for the language model is left."""
        call, adapter = self.state.call, self.adapter
        if call is None:
            return x
        patches, skip, joined = (
            adapter.packed(self.model, call),
            adapter.cls_tokens(self.model),
            adapter.joined(self.model),
        )
        counts = [x.shape[1]] * len(x) if patches is None else [n // joined for n in patches]
        tokens, per_image = iter(n - skip for n in counts), adapter.crops_per_image(call) or [1] * len(counts)
        keeps = crop_budgets([[next(tokens) for _ in range(n)] for n in per_image], self.stage.ratio, self.stage.keep)
        blocks = acting(self.stage.method, adapter, self.model, call.inputs)
        rows = Rows(skip, joined, counts, patches is not None)
        self.state.reduction = now = Reduction(blocks, [keep for image in keeps for keep in image], rows, x.device)
        if self.stage.method.admits and (step := self._admitted(now, call)) is not None:
            now.take(step)
            now.passed = [now.into]
            return now.reshape(step.apply(x.flatten(0, -2)), x)
        return x

    def _admitted(self, now: Reduction, call: TowerCall) -> Step | None:
        """The tokens that enter the first block, by their pixels."""
        name, rows, places = self.stage.name, now.rows, self._places(now, call)
        pixels = self.adapter.token_pixels(self.model, call)
        grids = self.adapter.grids(self.model, call, [len(mine) for mine in places])
        answers = []
        for crops in rows.alike(now.keeps, grids):
            if (grid := grids[crops[0]]) is None:
                raise ValueError(f"method={name!r} needs the token grid of the images, which these do not tell")
            seen = AtEntry(torch.stack([pixels[crop] for crop in crops]), grid)
            with torch.no_grad():
                stays = own_precision(self.stage.method.admit)(seen, now.keeps[crops[0]])
            if stays.dtype != torch.bool or stays.shape != seen.pixels.shape[:2]:
                raise ValueError(
                    f"method={name!r} admits {stays.dtype} of shape {tuple(stays.shape)}; it must be bool (n, N) = "
                    f"{tuple(seen.pixels.shape[:2])}"
                )
            every = torch.ones(len(crops), rows.counts[crops[0]], dtype=torch.bool, device=now.device)
            answer = Assignment.selection(every.scatter(1, torch.stack([places[crop] for crop in crops]), stays))
            if answer.kept.shape[1] < every.shape[1] or answer.valid is not None:
                answers.append((crops, answer))
        return make_step(rows, answers, now.device)

    def decide(self, now: Reduction, block: int, x: Tensor) -> None:
        """Ask the method how the rows `x` (R, D) of a block become fewer, those with equal counts and notes at once."""
        method, name, answers = self.stage.method, self.stage.name, []
        whole = block in self.adapter.attention_blocks(self.model, DEEPEST)
        module = module_of(self.model, "vision")
        groups = now.rows.alike(now.keeps, [tuple(notes) for notes in now.memory])
        show = functools.partial(BlockView, name, now, now.blocks.index(block), whole, module=module)
        for crops in groups:
            view = show(crops, x.detach())
            with torch.no_grad():
                answer = own_precision(method.reduce)(view, now.keeps[crops[0]])
            size = len(crops), now.rows.counts[crops[0]]
            now.note(name, crops, size[1], view.memory)
            if answer is not None:
                check_shape(answer, name, size)
                answers.append((crops, answer))
        now.step = make_step(now.rows, answers, now.device)
        for crops, answer in answers if type(method).add is not TowerMethod.add else ():
            self._add(now, show(crops, x), answer, crops)

    def _add(self, now: Reduction, view: BlockView, answer: Assignment, crops: list[int]) -> None:
        """What the method adds to the tokens that stay, with gradient.

        Raises:
            ValueError: it is not one vector per token that stays.
        """
        assert now.step is not None
        if (added := self.stage.method.add(view, now.keeps[crops[0]], answer)) is None:
            return
        if added.shape != (wanted := (*answer.kept.shape, view.hidden.shape[-1])):
            raise ValueError(
                f"method={self.stage.name!r} adds vectors of shape {tuple(added.shape)} inside the tower; `add` must "
                f"give one per token that stays, (n, K, D) = {wanted}"
            )
        now.step.add(now.rows, crops, answer, added.to(view.hidden.dtype))
        if (forward := self.state.forward) is not None:
            forward.notes.losses += [loss * (len(crops) / len(now.rows.counts)) for loss in view.losses]

    def bias(self, now: Reduction, first: int, shape: torch.Size) -> Tensor | None:
        """What is added to the logits of the keys (n, H, m, d) from row `first` on.

        Raises:
            ValueError: the kernel of the tower takes no bias.
        """
        bias, tower = now.bias(first, shape), self.adapter.tower(self.model)
        kernel = getattr(getattr(tower, "config", None), "_attn_implementation", KERNELS[0])
        if bias is not None and kernel not in KERNELS:
            raise ValueError(
                f"method={self.stage.name!r}: tokens that stand for several weigh more in the attention of the vision "
                f"tower, which attn_implementation={kernel!r} cannot do; load the model with one of {KERNELS}"
            )
        return bias

    @torch.compiler.disable
    def spread(self, merger: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
        """What joins patches inside the tower gives one row per original token."""
        now = self.state.reduction
        if now is None or now.into is None:
            return None
        joined = now.rows.joined
        return out.index_select(0, now.into[::joined].clamp(min=0) // joined)

    @torch.compiler.disable
    def leave(self, tower: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """Copy groups back to all their members, and note which token stands for which.

        Raises:
            ValueError: the method did not keep what was asked for.
        """
        now, call = self.state.reduction, self.state.call
        self.state.reduction = None
        if now is None or call is None:
            return None
        left = [count - now.rows.skip for count in now.rows.counts]
        if wrong := {(n, keep) for n, keep in zip(left, now.keeps) if keep is not None and n != keep}:
            n, keep = min(wrong)
            raise ValueError(
                f"method={self.stage.name!r} left {n} tokens of an image inside the tower instead of {keep}"
            )
        if now.into is not None:
            out.last_hidden_state = now.spread(out.last_hidden_state, now.into)
            if (states := getattr(out, "hidden_states", None)) is not None:
                pairs = zip(states, now.passed)
                out.hidden_states = tuple(h if h is None or into is None else now.spread(h, into) for h, into in pairs)
        call.fixed = self._fixed(now, call)
        return out

    def _places(self, now: Reduction, call: TowerCall) -> list[Tensor]:
        """(N,) per crop: the place in the tower, among all of the crop, that each token had at the entry.

        Tokens are counted in reading order, places as the tower holds them, [CLS] included.
        """
        first = now.first
        rows = torch.arange(first.starts[-1], device=now.device)
        at = rows.view(1, -1) if first.packed else rows.view(len(first.counts), -1)[:, first.skip :]
        tokens = self.adapter.per_token(self.model, call, at[..., None])
        return [
            (mine[:, 0, 0] - start - first.skip) // first.joined + first.skip
            for mine, start in zip(tokens, first.starts)
        ]

    def _fixed(self, now: Reduction, call: TowerCall) -> list[Assignment]:
        """Per crop which of its tokens stay, in reading order, and which others went into them."""
        first, rows, out = now.first, now.rows, []
        crops = zip(self._places(now, call), first.starts, rows.starts, rows.counts)
        for place, began, start, count in crops:
            groups, K = place - first.skip, count - first.skip
            if now.into is not None:
                went = now.into[began + first.skip + groups * first.joined]
                groups = torch.where(went < 0, -1, (went - start - first.skip) // first.joined)
            kept = first_members(groups[None] % (K + 1), K + 1)[:, :K].sort(dim=1)
            out.append(Assignment(kept.values, groups[None]))
        return out
