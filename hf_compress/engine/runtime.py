"""One compression of one model: the hooks that join the stages, in the order in which a forward meets them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from os import PathLike
from typing import Any

from torch import nn

from hf_compress import card
from hf_compress.checks import check_schedule
from hf_compress.config import CompressionConfig, Schedule, plain
from hf_compress.engine.among import check_among
from hf_compress.engine.context import Context
from hf_compress.engine.contrast import contrasting
from hf_compress.engine.draft import MAKER, Candidates, drafting
from hf_compress.engine.effect import check_signatures
from hf_compress.engine.forward import LanguageModel, check_alone
from hf_compress.engine.freezing import check_trainable, freeze
from hf_compress.engine.generate import Generate, Prepare
from hf_compress.engine.idle import Idle, check_idle
from hf_compress.engine.layers import AttentionExit, LayerEntry, PartExit
from hf_compress.engine.outermost import Outermost
from hf_compress.engine.reach import enters
from hf_compress.engine.recorder import LastRun
from hf_compress.engine.reduce import TowerReducer
from hf_compress.engine.seams import LayerExit, MlpGate
from hf_compress.engine.stage import Budgeted
from hf_compress.engine.state import Contrasting, Drafting
from hf_compress.engine.tower import TowerRecorder
from hf_compress.engine.trained import NAME, build
from hf_compress.engine.undo import UndoLog
from hf_compress.patches.base import Architecture
from hf_compress.report import Report
from hf_compress.staging import stages_of
from hf_compress.weights import Weights, export


class Compression:
    """What `model.compression` is: reports on the last call, and the hooks that do the work.

    Attributes:
        config: what was asked for, JSON-serialisable.
        context: what the hooks know of the model.
    """

    def __init__(self, model: nn.Module, adapter: Architecture, stages: dict[str, Budgeted], config: CompressionConfig):
        self.config = config
        self.context = Context(model, adapter, stages, config.summary())
        self._log = UndoLog()
        self._board: Any = None

    def install(self, weights: Weights | None = None, trainable: str | None = None) -> None:
        """Register every hook, and what the methods train; undone as a whole if anything fails.

        Args:
            weights: of what they train, None: new ones.
            trainable: the parts that are trained, all others are frozen; None: as it is.
        """
        context, log = self.context, self._log
        check_alone(context.decoder)
        check_signatures(context)
        self._check_beside(context.stages)
        compressor = build(context.model, context.adapter, context.stages, context.decoder.get_input_embeddings())
        if weights is not None:
            weights.fill(compressor, context.model)
        check_trainable(trainable, context.model, context.adapter, compressor is not None)
        try:
            if compressor is not None:
                log.child(context.model, NAME, compressor)
            freeze(trainable, context.model, context.adapter, log)
            if hasattr(context.model, "generate"):
                log.attribute(context.model, "generate", Generate(context, "generate"))
                name = "prepare_inputs_for_generation"
                log.attribute(context.model, name, Prepare(context, name))
            if hasattr(context.model, MAKER):
                log.attribute(context.model, MAKER, Candidates(context, MAKER))
            context.outermost = Outermost(context, "forward")
            log.attribute(context.model, "forward", context.outermost)
            hooks = LanguageModel(context)
            log.pre_hook(context.decoder, hooks.enter)
            log.hook(context.decoder, hooks.leave)
            self._install_tower()
            if context.by_layer:
                for i, layer in enumerate(context.layers):
                    log.pre_hook(layer, LayerEntry(context, i))
            method = context.decoder_method
            waits = method.boundaries(len(context.layers)) if method is not None and method.waits else ()
            for i in waits:
                log.hook(context.layers[i], LayerExit(context, i), first=True)
                if method is not None and method.gates == "mlp":
                    log.hook(context.adapter.last_part(context.layers[i]), MlpGate(context, i))
            for i in waits if method is not None and method.idles else ():
                log.attribute(context.layers[i], "forward", Idle(context, i))
            for i in context.policy.layers if context.policy is not None else ():
                log.hook(context.layers[i].self_attn, AttentionExit(context, i))
            for i in sorted(context.probe.changes):
                for part in context.adapter.parts(context.layers[i]):
                    log.hook(part, PartExit(context, i))
            for i in sorted(context.probe.taps):
                log.tap(context.layers[i].self_attn, hooks.record, i)
        except BaseException:
            log.undo()
            raise
        context.installed = True

    def _install_tower(self) -> None:
        context = self.context
        wanted = context.visual.images or context.probe.content
        if not wanted or context.adapter.tower(context.model) is None:
            return
        stage = context.stages.get("vision")
        TowerRecorder(context.model, context.adapter, context.state, stage).install(self._log)
        if stage is not None and enters(stage.method, context.adapter, context.model):
            TowerReducer(context.model, context.adapter, context.state, stage).install(self._log)

    def uninstall(self) -> None:
        """Leave the model as it was."""
        self.context.installed = False
        self._log.undo()

    def reschedule(self, schedule: Schedule | dict[str, Any] | str | PathLike[str]) -> None:
        """Other budgets of the layers, for calls from now on; hooks stay as they are, so that a search costs nothing.

        Raises:
            ValueError: nothing was compressed with a schedule of that unit, or it does not fit; the old one stays.
        """
        new, context = Schedule.of(schedule), self.context
        old = context.stages.get(new.stage)
        if old is None or old.schedule is None:
            raise ValueError(f"schedule={new}: {context.name} has no schedule in {new.unit}; compress with schedule=")
        check_schedule(context.model, context.adapter, Budgeted(old.name, old.method, None, None, new))
        methods = [replace(m, schedule=new) if m.method == old.name else m for m in self.config.methods]
        self.config = replace(self.config, methods=methods)
        context.reschedule(new, self.config.summary())

    def set_budget(self, ratio: float | None = None, *, keep: int | None = None, method: str | None = None) -> None:
        """Another budget of one method, for calls from now on; hooks and what the method trains stay as they are.

        Costs the checks of `compress`, and nothing in later calls.

        Args:
            ratio, keep: as of `compress`; exactly one. ratio=0: the method does nothing.
            method: whose budget, where there are several.

        Raises:
            ValueError: the budget cannot be reached, or the method cannot vary: it acts on the cache, in several
                stages, or follows a schedule of layers. The old budget stays.
        """
        self.config, where, stage = self._varied(ratio, keep, method)
        self.context.rebudget(where, stage, self.config.summary())

    def lend(self, ratio: float | None = None, *, keep: int | None = None, method: str | None = None) -> None:
        """Another budget for calls in training mode alone, until `take_back`; others, and `config`, know nothing of it.

        A forward that fails takes it back, as `set_budget` does.

        Args:
            ratio, keep: as of `compress`; exactly one.
            method: whose budget, where there are several.

        Raises:
            ValueError: as of `set_budget`; what was lent before stays.
        """
        _, where, stage = self._varied(ratio, keep, method)
        self.context.lend(where, stage)

    def take_back(self) -> None:
        """Calls in training mode have the budget that was asked for again; does nothing where none was lent."""
        self.context.lend()

    def _varied(self, ratio: Any, keep: Any, method: str | None) -> tuple[CompressionConfig, str, Budgeted]:
        """The config with another budget, the stage that it is of, and its method with it; see `set_budget`."""
        names, context = [m.method for m in self.config.methods], self.context
        if method is None and len(names) > 1:
            raise ValueError(f"method=None: {context.name} has several budgets; name one of {names}")
        if method is not None and method not in names:
            raise ValueError(f"method={method!r} is none of {names}")
        name = names[0] if method is None else method
        old, acts = self.config.methods[names.index(name)], _acting(context.stages, name)
        if acts not in (["vision"], ["prompt"], ["decoder"]) or old.schedule is not None:
            why = f"acts in the stages {acts}" if old.schedule is None else "follows a schedule of layers"
            raise ValueError(
                f"method={name!r} {why}, so its budget cannot vary while the model is compressed; decompress() and "
                "compress() anew, or use a method that acts in the vision, the prompt or the decoder stage alone"
            )
        new = replace(old, ratio=plain(ratio), keep=plain(keep))
        config = replace(self.config, methods=[new if m is old else m for m in self.config.methods])
        stages = stages_of(config, context.model, context.adapter)
        if (other := _acting(stages, name)) != acts:
            raise ValueError(
                f"{new.summary()} acts in the stages {other}, and was installed as {old.summary()} in {acts} alone; "
                "decompress() and compress() anew"
            )
        self._check_beside(stages)
        return config, acts[0], stages[acts[0]]

    def _check_beside(self, stages: dict[str, Budgeted]) -> None:
        """Raises ValueError if the decoder method cannot act beside the cache method, with the budgets of `stages`."""
        if "decoder" in stages:
            check_idle(self.context, stages["decoder"].ratio)
            check_among(self.context, stages["decoder"].ratio)

    def drafting(self, tokens: int = 5) -> AbstractContextManager[Drafting]:
        """Inside `with model.compression.drafting():` generate() gives the token ids of the uncompressed model.

        The compressed model drafts up to `tokens` tokens into a cache of its own; the uncompressed one checks them in
        one forward and keeps those that it would have said. Greedy or sampled, one sequence at a time. Logits differ
        by the rounding of rows that are computed together. What the block gives counts drafted and accepted tokens.

        Raises:
            ValueError: a method acts on pixels or inside the tower, or drops or packs entries while decoding; in
                generate(): more than one sequence, candidates of another kind, a cache that holds tokens.
        """
        return drafting(self.context, plain(tokens))

    def contrasting(self, alpha: float = 2.0, beta: float = 0.1) -> AbstractContextManager[Contrasting]:
        """Inside `with model.compression.contrasting():` the uncompressed model speaks against the compressed one.

        generate() decodes with (1 + alpha) * l - alpha * l', l being the logits of the uncompressed model and l' those
        of the compressed one, which sees less of the prompt and goes on from the same tokens with a cache of its own.
        Tokens less than `beta` times as probable as the best one of l are out. Any method can be the negative; the
        defaults are those of `damro` for LLaVA-1.5 (arXiv:2410.04514). Greedy or sampled, batches too; two forwards a
        token. Processors that the generation config asks for see l, those that are passed, and what samples, the rest.

        Raises:
            ValueError: `alpha` is not a number of at least 0, `beta` not one above 0 and at most 1; a method acts on
                pixels or inside the tower; in generate(): beams, candidates, a cache that holds tokens, is no dynamic
                one or is filled in chunks.
        """
        return contrasting(self.context, plain(alpha), plain(beta))

    def save(self, folder: str | PathLike[str]) -> None:
        """Write what the methods train, and nothing else, into a folder: `compress(..., weights=folder)` reads it.

        Checkpoints of the whole model (`save_pretrained`, `Trainer`) hold it too.

        Raises:
            ValueError: the methods train nothing, or the folder cannot be written.
        """
        export(self.context.model, self.config, folder)

    def measured(self, results: Any) -> None:
        """Let the model card state what this compression loses: `push_to_hub` writes it from then on.

        Args:
            results: of a sweep (`hf_compress.evaluate.sweep`, or the folder of `hf-compress eval`) that judged the same
                methods at the same ratios and knobs.

        Raises:
            ValueError: it did not, or the folder holds no results.
        """
        self._board = card.judged(self.config, results)

    def card(self) -> str:
        """The section of a model card on this compression, as Markdown: methods, budgets, measured loss, command."""
        return card.section(self.config, self._board)

    @property
    def last(self) -> LastRun | None:
        """What the last prompt was reduced to, None before the first."""
        return None if self.context.recorder is None else self.context.recorder.run()

    def __repr__(self) -> str:
        return f"{type(self.context.model).__name__} compressed by {self.context.name}"

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    def report(self) -> Report:
        """Requested and realised budgets of the last prompt: tokens, FLOPs and KV bytes, per layer."""
        return Report(repr(self), self.context)

    def show(self, images: Any, processor: Any = None, **options: Any) -> Any:
        """A picture of what the last prompt kept of the user's own photos; `.save("kept.png")` writes it.

        What is kept is as it was, what was merged is outlined in its mean colour, what was dropped is pale.

        Args:
            images: the photo of a sample, or all of them in the order of the prompt: PIL images, or arrays.
            processor: what made the inputs; by default what is saved beside the checkpoint.
            options: `layers=True` (a panel for every set of tokens that layers see; else what reaches the last one),
                `sample` (the row of the batch), `video=True` (`images` are the frames of its one video), `dim` (how
                far dropped cells fade, 0 to 1).

        Raises:
            ValueError: see `hf_compress.show.photos.show`.
        """
        from hf_compress.show.photos import show

        return show(self.context, images, processor, **options)

    def show_cache(self, sample: int = 0) -> Any:
        """A picture of which entries of the KV cache the last prompt left, by layer, head and place in the prompt.

        Args:
            sample: which row of the batch.

        Raises:
            ValueError: see `hf_compress.show.entries.show_cache`.
        """
        from hf_compress.show.entries import show_cache

        return show_cache(self.context, sample)


def _acting(stages: dict[str, Budgeted], name: str) -> list[str]:
    """The stages in which a method acts."""
    return [stage for stage, one in stages.items() if one.name == name]
