"""One compression of one model: the hooks that join the stages, in the order in which a forward meets them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf_compress import kernels
from hf_compress.config import CompressionConfig
from hf_compress.engine import packing
from hf_compress.engine.attention import Call
from hf_compress.engine.cache import CachePolicy
from hf_compress.engine.decoder import Plans, schedule
from hf_compress.engine.effect import check_prompt, check_signatures
from hf_compress.engine.entry import at_every_row, cut, layout_of, whole
from hf_compress.engine.generate import Generate, Prepare
from hf_compress.engine.inputs import check_apart
from hf_compress.engine.layers import AttentionExit, LayerEntry
from hf_compress.engine.outermost import Outermost
from hf_compress.engine.prompt import Placement, VisualPrompt
from hf_compress.engine.reduce import TowerReducer
from hf_compress.engine.repeat import repeat_prompt
from hf_compress.engine.state import Forward, Stage, State
from hf_compress.engine.tower import TowerRecorder
from hf_compress.engine.undo import UndoLog
from hf_compress.methods.base import CacheMethod, DecoderMethod, TowerMethod, VisionMethod
from hf_compress.patches import versions
from hf_compress.patches.base import Architecture
from hf_compress.report import LastRun, Recorder, Report
from hf_compress.stores import adopt


class Compression:
    """What `model.compression` is: reports on the last call, and the hooks that do the work.

    Attributes:
        config: what was asked for, JSON-serialisable.
    """

    def __init__(self, model: nn.Module, adapter: Architecture, stages: dict[str, Stage], config: CompressionConfig):
        self.model, self.adapter, self.stages, self.config = model, adapter, stages, config
        self.decoder = adapter.decoder(model)
        self.layers = list(adapter.layers(self.decoder))
        self.state = State()
        self.recorder: Recorder | None = None
        self.owner = config.summary()
        self.vision: VisionMethod | None = stages["vision"].method if "vision" in stages else None
        self.drops: DecoderMethod | None = stages["decoder"].method if "decoder" in stages else None
        self.evicts: CacheMethod | None = stages["cache"].method if "cache" in stages else None
        self.policy: CachePolicy | None = None
        self.prompt = VisualPrompt(model, adapter, self.state, stages.get("vision"), bool(self.vision or self.drops))
        self._plans: Plans = {}
        self.installed = False
        self._decoder_names = versions.parameters(self.decoder)
        self.cache_names = versions.cache_name(model), versions.cache_name(self.decoder)  # what each of them calls it
        self.proved: set[str] = set()  # what the first prompt has shown: that "rows" and "cache" are as planned
        self._log = UndoLog()

    @property
    def renumber(self) -> bool:
        """Whether tokens after a cut take consecutive positions."""
        wanted = self.vision.positions if self.vision else "original"
        return (self.adapter.positions if wanted == "auto" else wanted) == "renumber"

    @property
    def by_layer(self) -> bool:
        """Whether layers can hold different rows (or measure windows over gaps and fillers), each with its own mask."""
        if self.drops or self.evicts or not self.vision:
            return bool(self.drops or self.evicts)  # asked at every step, and windows take long to look up
        return any(self.adapter.window(self.decoder, i) for i in range(len(self.layers)))

    # -- installation ---------------------------------------------------------------------------------------------
    def install(self) -> None:
        """Register every hook; undone as a whole if one fails."""
        log = self._log
        check_signatures(self)
        try:
            if hasattr(self.model, "generate"):
                log.attribute(self.model, "generate", Generate(self, "generate"))
                name = "prepare_inputs_for_generation"
                log.attribute(self.model, name, Prepare(self, name))
            log.attribute(self.model, "forward", Outermost(self, "forward"))
            log.pre_hook(self.decoder, self.enter_decoder)
            log.hook(self.decoder, self.leave_decoder)
            self._install_tower(log)
            if self.by_layer:
                for i, layer in enumerate(self.layers):
                    log.pre_hook(layer, LayerEntry(self, i))
            self._install_cache(log)
            for i in sorted(self._read_layers()):
                log.tap(self.layers[i].self_attn, self.record, i)
        except BaseException:
            log.undo()
            raise
        self.installed = True

    def _install_tower(self, log: UndoLog) -> None:
        wanted = self.prompt.images or (self.evicts is not None and self.evicts.draws)
        if not wanted or self.adapter.tower(self.model) is None:
            return
        stage = self.stages.get("vision")
        TowerRecorder(self.model, self.adapter, self.state, stage).install(log)
        if stage is not None and isinstance(stage.method, TowerMethod) and stage.method.inside:
            TowerReducer(self.model, self.adapter, self.state, stage).install(log)

    def _install_cache(self, log: UndoLog) -> None:
        if "cache" not in self.stages:
            return
        stage = self.stages["cache"]
        self.policy = CachePolicy(stage.method, stage.ratio, stage.keep, self._evicting_layers(), len(self.layers))
        for i in self._evicting_layers():
            log.hook(self.layers[i].self_attn, AttentionExit(self, i))

    def _evicting_layers(self) -> list[int]:
        """Layers that a cache method acts on: sliding ones are bounded already."""
        if self.evicts is None:
            return []
        return [i for i in range(len(self.layers)) if self.adapter.window(self.decoder, i) is None]

    def _read_layers(self) -> set[int]:
        """Decoder layers whose queries and keys somebody may read."""
        layers = set()
        packed = self.policy is not None and self.policy.store is not None and kernels.available()
        if self.evicts is not None and (packed or self.evicts.reads or self.evicts.passes or self.evicts.ragged):
            layers |= set(self._evicting_layers())
        if self.drops is not None and self.drops.source == "own":
            layers |= {i - 1 for i in self.drops.boundaries(len(self.layers))}
        return layers

    def _wanted(self, now: Forward) -> frozenset[int]:
        """Those of them that will be read in this forward."""
        if now.repeat is not None:
            return frozenset(self._evicting_layers())
        layers = {i - 1 for i in now.plan} if self.drops is not None and self.drops.source == "own" else set()
        if (
            self.evicts is not None
            and self.evicts.reads
            and now.cache is not None
            and (not now.past or self.evicts.running)
        ):
            assert self.policy is not None
            layers |= set(self.policy.layers)
        return frozenset(layers)

    def uninstall(self) -> None:
        """Leave the model as it was."""
        self.installed = False  # whoever wrapped one of our attributes goes on calling it
        self._log.undo()

    @property
    def last(self) -> LastRun | None:
        """What the last prompt was reduced to, None before the first."""
        return None if self.recorder is None else self.recorder.run()

    def __repr__(self) -> str:
        return f"{type(self.model).__name__} compressed by {self.owner}"

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    def report(self) -> Report:
        """Requested and realised budgets of the last prompt: tokens, FLOPs and KV bytes, per layer."""
        return Report(self)

    def show(self, images: Any, processor: Any = None, **options: Any) -> Any:
        """A picture of what the last prompt kept of the user's own photos: see `hf_compress.show.photos.show`."""
        from hf_compress.show.photos import show

        return show(self, images, processor, **options)

    def uses_cache(self, inputs: dict[str, Any]) -> bool:
        """Whether a call with these inputs fills a cache."""
        asked = inputs.get("use_cache")
        return self.decoder.config.use_cache if asked is None else asked

    # -- the language model -----------------------------------------------------------------------------------------
    @torch.compiler.disable
    def enter_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Cut the prompt, settle the layout, announce it to the cache."""
        if self.state.bypass:
            return None
        now = self.state.forward
        if now is None:
            raise RuntimeError(
                f"{type(decoder).__name__} was called directly; call the compressed model itself "
                f"({type(self.model).__name__}), or decompress() it first"
            )
        kw = {**dict(zip(self._decoder_names, args)), **versions.renamed(kwargs, self.cache_names[1])}
        ids, x = kw.pop("input_ids", None), kw.get("inputs_embeds")
        x = kw["inputs_embeds"] = decoder.get_input_embeddings()(ids) if x is None else x
        kw.update({k: t.to(x.device) for k, t in kw.items() if torch.is_tensor(t)})  # device maps move them later
        self._open_cache(now, kw)
        mask = kw.get("attention_mask")
        now.ready_made = isinstance(mask, dict) or (torch.is_tensor(mask) and mask.ndim == 4)
        B, q = now.size = x.shape[0], x.shape[1]
        now.packing = packing.find(now, kw, self.decoder.config, self.adapter.positions == "original")
        before = layout_of(now.cache) if now.past else None
        none = torch.zeros(B, dtype=torch.int64, device=x.device)
        removed, images = (none, none) if before is None else (before.removed, before.images)
        if self.policy is not None and self.policy.draws and now.cache is not None and not now.past:
            now.content = self.prompt.content(now, x)
        found = self.prompt.locate(now, x, images) if q > 1 else None
        if found is not None:
            check_apart(self, now)
            images = torch.maximum(images, found.image.amax(1) + 1)
        rows = now.local = torch.arange(q, device=x.device).expand(B, q)
        valid = None if now.mask is None else now.mask[:, -q:].bool().to(x.device)
        if found is not None and found.changes:
            cut(self, now, kw, valid, removed, images, found)
        else:
            now.layout = whole(now, valid, removed, images, None if found is None else found.image)
            if now.past and self.renumber:
                given = kw.get("position_ids")
                kw["position_ids"] = (now.past + rows if given is None else given) - removed[:, None]
        now.entered, now.positions = now.layout, kw.get("position_ids")
        for layer in now.cache.layers if now.cache is not None else ():
            layer.announce(now.layout)
        if found is not None:
            self._plan(now, found)
        now.wanted = self._wanted(now)
        if self.evicts is not None and self.evicts.passes and not now.past:
            now.embeds = kw["inputs_embeds"].detach(), now.layout
        if now.of_prompt and now.repeat is None:
            real = torch.ones_like(rows, dtype=torch.bool) if valid is None else valid
            book = None if found is None else found.book
            now.recorder = Recorder(book, real, len(self.layers), now.cache)
        return (), kw

    def _open_cache(self, now: Forward, kw: dict[str, Any]) -> None:
        """Our layers in the cache that came along, or in a new one if the call will use one."""
        cache, config = versions.cache_of(kw), self.decoder.config
        if cache is None and self.uses_cache(kw) and not versions.checkpoints(self.decoder):
            cache = kw[self.cache_names[1]] = DynamicCache(config=config)
        if cache is not None:
            adopt(cache, config, self.owner)
            now.cache, now.past = cache, cache.get_seq_length()

    def _plan(self, now: Forward, found: Placement) -> None:
        """Visual rows per sample and layer, for the decoder stage."""
        if self.drops is None:
            return
        assert found.book is not None
        visual = now.visual_rows(now.layout)
        samples = [1] * now.size[0] if now.packing is None else now.packing.counts
        images = [mine.count(i) for mine, n in zip(found.book.sample, samples) for i in range(n)]
        first = self.adapter.min_drop_layer(self.model)
        now.plan = schedule(self.stages["decoder"], len(self.layers), visual, images, first, self._plans)

    @torch.compiler.disable
    def record(self, layer: int, call: Call) -> Tensor | None:
        """Called by the taps of the decoder layers; reads entries that lie end to end or packed itself."""
        now = self.state.forward
        if now is None:
            return None
        if layer in now.wanted:
            now.records[layer] = call.record()
        held = now.cache.layers[layer] if now.cache is not None else None
        if held is None:
            return None
        if held.in_place:
            return held.attend(call.query, call.scaling)
        if self.policy is None or self.model.training or (now.ready_made and not now.past):
            return None
        return self.policy.attend(held, now.layout.to(call.key.device), call)

    @torch.compiler.disable
    def leave_decoder(self, decoder: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """Back to the caller's length: a removed row repeats its last surviving predecessor."""
        now = self.state.forward
        if now is None or self.state.bypass or now.repeat is not None:
            return None
        if len(self.proved) < 2 and not now.past:
            check_prompt(self, now, out)
        if self.policy is not None and self.policy.method.passes and now.cache is not None and not now.past:
            repeat_prompt(self, now)
        if now.cache is not None and now.lasting:
            for layer in now.cache.layers:
                layer.bound()
        if now.recorder is not None:
            now.recorder.finish(now)
        if not now.moved:  # as many rows may still stand elsewhere than the caller's
            return None
        asked = now.inputs.get("logits_to_keep")
        if isinstance(asked, int) and asked == 1:  # so does generate(): the head reads no row but the last
            full = out[0][:, -1:].expand(-1, now.size[1], -1)
        else:
            full = at_every_row(out[0], now.layout, now)
        if isinstance(out, tuple):
            return (full, *(self._per_layer(part, now) for part in out[1:]))
        out.last_hidden_state = full
        if getattr(out, "hidden_states", None) is not None:
            out.hidden_states = self._per_layer(out.hidden_states, now)
        return out

    def _per_layer(self, part: Any, now: Forward) -> Any:
        """Hidden states of all layers at the caller's length; anything else as it is."""
        if not isinstance(part, tuple) or len(part) != len(self.layers) + 1:
            return part
        layouts = [now.entered, *(now.held or [now.layout] * len(self.layers))]
        states = zip(part, layouts)  # None where a layer was not asked for; attentions (four dimensions) stay short
        return tuple(at_every_row(x, at, now) if torch.is_tensor(x) and x.ndim == 3 else x for x, at in states)
