"""What all hooks of one compression know of the model that they stand on."""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import nn

from hf_compress.config import Schedule
from hf_compress.engine.distill import Distill
from hf_compress.engine.evict import CachePolicy
from hf_compress.engine.plans import Plans
from hf_compress.engine.probe import Probe
from hf_compress.engine.recorder import Recorder
from hf_compress.engine.stage import Budgeted
from hf_compress.engine.state import State
from hf_compress.engine.trained import module_of
from hf_compress.engine.visual import VisualPrompt
from hf_compress.methods.base import CacheMethod, DecoderMethod, PromptMethod, VisionMethod
from hf_compress.methods.knobs import Step, step_of
from hf_compress.patches import versions
from hf_compress.patches.base import Architecture


class Context:
    """The model in its parts, the methods that act on it, and the state of the call that is running.

    Attributes:
        name: of the compression, as reports and errors give it.
        stages: the methods with their budgets, in the order in which a forward meets them.
        decoder, layers: the language model.
        outermost: stands before the forward of the model and knows its `original`.
        installed: the hooks act. Whoever wrapped one of our attributes goes on calling it after `decompress`.
        recorder: of the last prompt, None before the first.
        proved: what the first prompt has shown, see `engine.effect`.
        trained: stages whose modules are known to be trained, see `engine.trained`.
        distill: the compressed model learns from the uncompressed one, see `engine.teacher`; None: it does not.
        lent: a stage, its budget in training mode, and the one that was asked for; None: it has but one.
        cache_names: what the model and its language model call the KV cache.
        decoder_names: parameters of the language model, in order.
    """

    def __init__(self, model: nn.Module, adapter: Architecture, stages: dict[str, Budgeted], name: str):
        self.model, self.adapter, self.stages, self.name = model, adapter, stages, name
        self.decoder = adapter.decoder(model)
        self.layers = list(adapter.layers(self.decoder))
        self.state = State()
        self.installed = False
        self.outermost: Any = None
        self.recorder: Recorder | None = None
        self.proved: set[str] = set()
        self.trained: set[str] = set()
        self.distill: Distill | None = None
        self.lent: tuple[Budgeted, Budgeted, Budgeted] | None = None
        self.plans: Plans = {}
        self.vision_method: VisionMethod | None = stages["vision"].method if "vision" in stages else None
        self.decoder_method: DecoderMethod | None = stages["decoder"].method if "decoder" in stages else None
        self.prompt_method: PromptMethod | None = stages["prompt"].method if "prompt" in stages else None
        self.cache_method: CacheMethod | None = stages["cache"].method if "cache" in stages else None
        self.policy: CachePolicy | None = None
        if (stage := stages.get("cache")) is not None:
            bounded = [adapter.window(self.decoder, i) is not None for i in range(len(self.layers))]
            acts = [i for i, sliding in enumerate(bounded) if not sliding]
            module = functools.partial(module_of, model, "cache")
            self.policy = CachePolicy(stage.method, stage.ratio, stage.keep, acts, len(self.layers), module)
            self.policy.levels = None if stage.schedule is None else stage.schedule.levels
        self.probe = Probe(stages, self.layers, self.policy)
        visual = bool(self.vision_method or self.decoder_method) and bool(adapter.placeholders(model.config))
        self.visual = VisualPrompt(model, adapter, self.state, stages.get("vision"), visual)
        self.cache_names = versions.cache_name(model), versions.cache_name(self.decoder)
        self.decoder_names = versions.parameters(self.decoder)

    def reschedule(self, schedule: Schedule, name: str) -> None:
        """Another schedule in place of the one of its stage; from now on the compression has this `name`."""
        self.stages[schedule.stage].schedule, self.name = schedule, name
        self.plans.clear()
        if schedule.stage == "cache" and self.policy is not None:
            self.policy.levels = schedule.levels

    def lend(self, where: str | None = None, stage: Budgeted | None = None) -> None:
        """The budget of another `stage` for calls in training mode, None: none; one lent before is taken back."""
        self.settle(training=False)
        self.lent = None
        if where is not None and stage is not None:
            self.lent = (own := self.stages[where]), stage, copy.copy(own)

    def settle(self, training: bool) -> None:
        """A call begins: its stages have the budget that is lent to it, or those that were asked for."""
        if self.lent is None:
            return
        own, lent, asked = self.lent
        wanted = lent if training else asked
        if (own.ratio, own.keep) != (wanted.ratio, wanted.keep):
            own.ratio, own.keep = wanted.ratio, wanted.keep
            self.plans.clear()

    def rebudget(self, where: str, stage: Budgeted, name: str) -> None:
        """The budget of another `stage` for the method that is there; from now on the compression has this `name`."""
        self.lend()
        self.stages[where].ratio, self.stages[where].keep, self.name = stage.ratio, stage.keep, name
        self.plans.clear()

    @property
    def renumber(self) -> bool:
        """Whether tokens after a cut take consecutive positions."""
        method = self.vision_method or self.prompt_method
        wanted = method.positions if method else "original"
        return (self.adapter.positions if wanted == "auto" else wanted) not in ("original", "auto")

    @property
    def step(self) -> Step | None:
        """How visual tokens lie after a cut; None: whole positions apart."""
        return step_of(self.vision_method.positions) if self.vision_method else None

    @property
    def cuts(self) -> bool:
        """Whether rows may go before the language model."""
        return bool(self.vision_method or self.prompt_method)

    @property
    def by_layer(self) -> bool:
        """Whether layers can hold different rows (or measure windows over gaps and fillers), each with its own mask."""
        if self.decoder_method or self.cache_method or not self.cuts:
            return bool(self.decoder_method or self.cache_method)  # asked at every step, and windows take long
        if self.vision_method is not None and self.vision_method.passes:
            return True
        return any(self.adapter.window(self.decoder, i) for i in range(len(self.layers)))

    @property
    def idles(self) -> bool:
        """Whether generated tokens do not go through all layers."""
        return self.decoder_method is not None and self.decoder_method.idles and self.stages["decoder"].ratio != 0

    def uses_cache(self, inputs: dict[str, Any]) -> bool:
        """Whether a call with these inputs fills a cache."""
        asked = inputs.get("use_cache")
        return self.decoder.config.use_cache if asked is None else asked
