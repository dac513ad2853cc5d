"""The cache stage at the end of the prompt: score, budget, evict, pack."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_compress import budget
from hf_compress.engine.attention import Call
from hf_compress.engine.entries import Sight, StoredView, on_host
from hf_compress.engine.hold import Steps
from hf_compress.engine.rotary import Rotary
from hf_compress.engine.trained import Module, untrained
from hf_compress.layout import Layout, small
from hf_compress.methods.base import CacheMethod
from hf_compress.signals import COLUMNS
from hf_compress.stores import HeldLayer
from hf_compress.stores.quota import Quota
from hf_compress.stores.shared import check_same_rows
from hf_compress.tensors.ambient import own_precision
from hf_compress.tensors.attention import Record, attention_and_sums
from hf_compress.tensors.select import best_slots, protect


class Plan(NamedTuple):
    """What one layer is to keep."""

    view: StoredView
    score: Tensor  # (B, Hkv, S), masks applied
    counts: Tensor  # (B,) entries per head, on the host
    room: Tensor  # (B,) entries per head that it may hold, more than there are where rows are shorter


class CachePolicy:
    """One cache method with its budget, applied to the layers of whatever cache arrives.

    Args:
        layers: the decoder layers that it acts on.
        total: number of decoder layers.
        module: gives what the method trains, as it is now.

    Attributes:
        levels: entries per head of each decoder layer, where a schedule says so.
        place: of each layer that it acts on, how many of these come before it and how many there are.
        reader: how attention looks at what is stored; None: at everything.
        steps: what it does once the prompt has been read.
    """

    def __init__(
        self,
        method: CacheMethod,
        ratio: Fraction | None,
        keep: int | None,
        layers: list[int],
        total: int,
        module: Module = untrained,
    ):
        self.module = module
        self.method, self.ratio, self.keep, self.layers, self.total = method, ratio, keep, layers, total
        self.levels: Sequence[int] | None = None
        self._groups = {group[-1]: group for group in method.groups(layers)}
        self.place = {layer: (i, len(layers)) for i, layer in enumerate(layers)}
        self._sums = COLUMNS in method.reads(total) and ratio != 0
        self._holding = method.holding()
        self.store = None if ratio == 0 else method.packing()
        self.reader = None if ratio == 0 else method.reader()
        self.steps = Steps(method, self.store, self.place, total, module)

    @property
    def attends(self) -> bool:
        """Whether its reader comes between attention and its kernel."""
        return self.reader is not None and (self.reader.looks or self.reader.chooses or self.reader.attends)

    @property
    def stepwise(self) -> bool:
        """Whether tokens fed together find or read other entries than one by one, so that candidates cannot be checked.

        So it is where entries go while decoding by more than their order, are packed then, or are not all read.
        """
        return self.steps.stepwise or self.attends

    @torch.no_grad()
    @own_precision
    def after_prompt(
        self,
        cache: Any,
        layer: int,
        prompt: Layout,
        record: Record | None,
        rotary: Rotary | None,
        content: Tensor | None = None,
        waiting: dict[int, StoredView] | None = None,
        scores: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        """Evict and pack at the end of the prompt; attention has used all keys and values of this pass.

        Args:
            waiting: layers that are complete and whose group is not, to which this one may be added.
            scores: (B, Hkv, S) what further forwards have found.
            sums: (B, Hkv, S) what the entries received, where attention gave it on its way.
        """
        if self.ratio == 0:
            return
        held, waiting = cache.layers[layer], {} if waiting is None else waiting
        lengths = _onto(held.keys.device, on_host(prompt))
        place, module = self.place[layer], self.module
        view = StoredView(held, layer, self.total, lengths, prompt, record, rotary, place, content, module)
        view.scores, view.sums = scores, sums
        waiting[layer], holding = view, self._holding
        if holding is not None and holding.relative:
            assert rotary is not None
            held.unturn(rotary)
        if holding is not None and holding.running:
            view.scores, view.votes = holding.begin(view), holding.votes(view)
            if self.method.policy == "hold":
                found = {"scores": view.scores, "votes": view.votes}
                held.side |= {name: t for name, t in found.items() if t is not None}
        if group := self._groups.get(layer):
            views: Sequence[StoredView] = [waiting.pop(i) for i in group]
            if self.method.ranks():
                self._evict(views)
            if self.store is not None:
                self.store.settle([view.held for view in views], views)

    def after_passes(self, cache: Any, scores: dict[int, Tensor]) -> None:
        """Evict the prompt in all layers, when further forwards have scored the entries of each, (B, Hkv, S)."""
        waiting: dict[int, StoredView] = {}
        for i, score in scores.items():
            self.after_prompt(cache, i, cache.layers[i].layout, None, None, None, waiting, score)

    def _evict(self, views: Sequence[StoredView]) -> None:
        plans = [plan for view in views if (plan := self._plan(view)) is not None]
        for plan, counts in zip(plans, self._heads(plans)):
            (view, score, _, room), held = plan, plan.view.held
            slots, fillers = best_slots(score, view.valid, counts)
            if counts.ndim == 2:  # a row shorter than its budget has room left
                budget = counts + (room - view.prompt_lengths).clamp(min=0)[:, None]
                held.quota = Quota.of(budget, held.keys.device)
            n = slots.shape[-1]
            real = None if fillers is None else torch.arange(n, device=slots.device) >= fillers[..., None]
            held.select(slots, fillers, self.method.merge(view, slots, real))
            held.settle(counts, None if self._holding is None else self._holding.cursor(view))

    def _plan(self, view: StoredView) -> Plan | None:
        """None: everything stays."""
        method, held, home, lengths = self.method, view.held, view.valid.device, view.prompt_lengths
        outside = method.outside(view)
        fixed = 0 if outside is None else (outside & view.valid).sum(-1).amax(1).cpu()
        if self.levels is None:
            mean = self._mean(held, lengths, fixed)
            counts = method.layer_budget(mean, lengths - fixed, view.layer, self.total) + fixed
        else:
            counts = entries(lengths, None, self.levels[view.layer]) + fixed
        view.budget = _onto(home, counts)[:, None, None]
        always = method.protected(view)
        if always is not None:
            counts = torch.maximum(counts, (always & view.valid).sum(-1).amax(1).cpu())
            view.budget = _onto(home, counts)[:, None, None]
        held.quota = Quota.of(counts, held.keys.device)
        room, holding = counts, self._holding
        counts = torch.minimum(room, lengths) if holding is None else holding.fit(view, room, lengths)
        if not bool((counts < lengths).any()):
            return None
        if (score := method.score(view)).shape != view.shape:
            raise ValueError(f"score: {tuple(score.shape)} is not (B, Hkv, S) = {tuple(view.shape)}")
        return Plan(view, protect(score, outside, always), counts, room)

    def _heads(self, plans: list[Plan]) -> list[Tensor]:
        """Of every layer (B,) or (B, Hkv) entries per head, on the host; a group shares the budget of its last layer.

        Layers of a group may lie on several devices.
        """
        if not plans:
            return []
        check_same_rows([plan.view.held.layout for plan in plans])
        view, home, counts = plans[-1].view, plans[0].score.device, plans[-1].counts
        scores = [plan.score.to(home) for plan in plans]
        each = _onto(home, counts)
        score = scores[0] if len(scores) == 1 else torch.cat(scores, 1)
        heads = self.method.head_budget(score, view.valid.to(home), each)
        if heads.ndim == 1:
            return [counts if heads is each else heads.cpu()] * len(plans)
        return list(heads.cpu().split([score.shape[1] for score in scores], 1))

    def _mean(self, held: HeldLayer, lengths: Tensor, fixed: Tensor | int) -> Tensor:
        """(B,) entries per head that stay of those that the ratio applies to, all but `fixed` of each of `lengths`."""
        among = lengths - fixed
        if self.ratio is None or self.store is None:
            return entries(among, self.ratio, self.keep)
        assert held.layout is not None
        sizes, index = (held.keys.shape[3], held.values.shape[3]), small(len(held.layout)).itemsize
        rows = zip(among.tolist(), (lengths - among).tolist())
        counts = [self.store.entries(n, 1 - self.ratio, sizes, index, outside) for n, outside in rows]
        return torch.tensor(counts, device=lengths.device)

    @own_precision
    def attend(self, held: HeldLayer, queries: Layout, call: Call) -> tuple[Tensor, Tensor] | None:
        """Attention that counts in a score, which is then read only once; None: the kernel's turn.

        That is the attention of a whole prompt whose sums are asked for, and of a single row while a score is running.

        Returns:
            (B, q, Hq, d), and for `after_prompt` sums (B, Hkv, S), or for `Steps.after` the row (B, Hq, 1, S).
        """
        if held.layout is None or held.body:
            return None
        if "scores" in held.side and len(queries) == 1:
            return self.steps.attend(held, queries, call)
        whole = len(queries) == len(held.layout) and self._sums
        learns, exact = torch.is_grad_enabled() and call.query.requires_grad, call.query.dtype == torch.float64
        if not whole or learns or exact or call.query.device.type != "cpu":  # elsewhere kernels beat blocks of rows
            return None
        sight = Sight(queries, queries, held.window)
        return attention_and_sums(
            call.query, call.key, call.value, call.scaling, sight, queries.valid.float(), sight.ends
        )


def _onto(device: torch.device, counts: Tensor) -> Tensor:
    """Counts of the host on a device, without waiting for it."""
    return counts.to(device, non_blocking=True)


def entries(lengths: Tensor, ratio: Fraction | None, keep: int | None) -> Tensor:
    """(B,) entries per head for rows of the given lengths."""
    if keep is not None:
        return torch.full_like(lengths, keep)  # more than there is: nothing goes yet
    counts = [budget.kept(n, ratio or Fraction(0), floor=True) for n in lengths.tolist()]
    return torch.tensor(counts, device=lengths.device)
