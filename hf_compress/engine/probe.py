"""What the methods of a compression read of the language model: where taps stand, and what is recorded when."""

from __future__ import annotations

from torch import nn

from hf_compress import kernels
from hf_compress.engine.evict import CachePolicy
from hf_compress.engine.stage import Budgeted
from hf_compress.engine.state import Forward
from hf_compress.signals import AGAIN, CONTENT, Read


class Probe:
    """The reads of all stages, asked once; they never depend on the budget.

    Attributes:
        reads: what is read, of the language model.
        taps: decoder layers whose attention is tapped.
        changes: decoder layers of which somebody reads how they change rows.
        content: somebody needs a number for what each prompt holds.
        again: the entries of a prompt are scored by forwards that feed it again.
        ahead: methods of the stages before the language model read of it, by a forward of its own that stops behind the
            deepest of the `ahead_layers`; looks: one of the vision stage does.
    """

    def __init__(self, stages: dict[str, Budgeted], layers: list[nn.Module], policy: CachePolicy | None):
        self._policy, depth = policy, len(layers)
        by_stage = {name: stage.method.reads(depth) for name, stage in stages.items()}
        by_stage["vision"] = {read for read in by_stage.get("vision", ()) if read.where == "layer"}
        self.reads: set[Read] = set().union(*by_stage.values())
        self.content, self.again = CONTENT in self.reads, AGAIN in self.reads
        self.looks = bool(by_stage["vision"])
        ahead = by_stage.pop("vision") | by_stage.pop("prompt", set())
        self.ahead, self.ahead_layers = bool(ahead), frozenset(r.at for r in ahead if r.what == "attention")
        here = set().union(*by_stage.values())
        self.changes = frozenset(r.at for r in here if r.what == "changes")
        self._rows = {r.at for r in here if r.what == "attention"}  # of single layers, for the one behind
        acting = stages.get("decoder")
        self._backs = range(1 + (0 if acting is None else acting.method.back))
        every = any(r.every for r in self.reads)
        attends = False  # itself, or reads less than everything
        if policy is not None:
            in_place = policy.method.ragged or (policy.store is not None and kernels.available())
            attends = in_place or policy.attends
        self.taps = self._rows | self.ahead_layers
        if acting is not None and acting.method.picks:
            self.taps |= set(acting.method.boundaries(depth))
        if policy is not None and (every or attends):
            self.taps |= set(policy.layers)
        self._prompt = every and not self.again

    def wanted(self, now: Forward) -> frozenset[int]:
        """The layers whose queries and keys will be read in this forward."""
        policy, given = self._policy, now.given
        if given.reread is not None:
            return frozenset(() if policy is None else policy.layers)
        layers = self._rows & {i - 1 - back for i in now.notes.plan for back in self._backs}
        if self._prompt and policy is not None and given.cache is not None and (not given.past or policy.steps.running):
            layers |= set(policy.layers)
        return frozenset(layers)
