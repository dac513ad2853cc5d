"""What stands before `generate`: refusals that only its arguments show, chunks, and static caches."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from hf_compress.engine import contrast
from hf_compress.engine.draft import check_call
from hf_compress.engine.inputs import check_ids, check_one_sample
from hf_compress.engine.instead import Instead
from hf_compress.engine.rewrite import shorten, whole_ids
from hf_compress.engine.state import Contrasting, Drafting, Run
from hf_compress.patches.versions import cache_of, renamed

ASSISTED = ("prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit", "use_mtp", "custom_generate")
STATIC = ("static", "sliding_window", "hybrid", "hybrid_chunked")


class Prepare(Instead):
    """Instance attribute `prepare_inputs_for_generation`: generate() calls it before each of its own forwards.

    Other forwards during a generate(), those of a logits processor for instance, are calls like any other.
    """

    @torch.compiler.disable(recursive=False)
    def call(self, *args: Any, **kwargs: Any) -> Any:
        out = self.original(*args, **kwargs)
        self.context.state.prepared = self.context.state.run
        return out


class Generate(Instead):
    """Instance attribute `generate` of a compressed model.

    Raises (on call):
        ValueError: the arguments ask for something that the installed methods cannot do; the message says what works.
    """

    def call(self, *args: Any, **kwargs: Any) -> Any:
        context, state = self.context, self.context.state
        kwargs = renamed(kwargs, context.cache_names[0])
        given = self.named(args, kwargs)
        context.settle(context.model.training)
        if isinstance(state.beside, Drafting):
            return self._checking(given, state.beside)
        if state.beside is not None:
            return self._contrasting(given, state.beside)
        self._refuse(given)
        check_one_sample(context, given)
        ids: Any = given.get("input_ids") if given.get("inputs") is None else given["inputs"]
        ids = ids if torch.is_tensor(ids) else None
        with state.scope():
            state.forward = state.prepared = None
            state.run = run = Run(
                rows=None if ids is None else ids.shape[1], tentative=self._assisted(given) is not None
            )
            if self._option(given, "is_assistant"):
                self._draft(run)
            if context.vision_method is not None and _static(self._option(given, "cache_implementation"), given):
                return self._rewritten(given, ids)
            if context.vision_method is not None and self._option(given, "prefill_chunk_size"):
                run.chunked, run.mask = ids, given.get("attention_mask")
            return self.original(*args, **kwargs)

    def _checking(self, given: dict[str, Any], drafting: Drafting) -> Any:
        """As in a bare model that is given the drafts of the compression as candidates."""
        check_call(given, self._option, self._assisted(given))
        with self.context.state.scope() as state:
            state.forward = state.prepared = None
            state.run = Run(bare=True, drafting=drafting)
            return self.original(**{**given, "prompt_lookup_num_tokens": drafting.tokens})

    def _contrasting(self, given: dict[str, Any], knobs: Contrasting) -> Any:
        """As in a bare model whose logits the compressed one speaks against."""
        contrast.check_call(given, self._option, self._assisted(given))
        ids: Any = given.get("input_ids") if given.get("inputs") is None else given["inputs"]
        negative = contrast.Negative(self.context, knobs, ids.shape[1] if torch.is_tensor(ids) else None)
        processors = LogitsProcessorList([negative, *(given.get("logits_processor") or ())])
        with self.context.state.scope() as state:
            state.forward = state.prepared = None
            state.run = Run(bare=True, negative=negative)
            return self.original(**{**given, "logits_processor": processors})

    def _draft(self, run: Run) -> None:
        """This generate() proposes candidates to another one."""
        run.draft = run.tentative = True
        if run.rows:  # where no candidate is accepted, the last row of the prompt is taken back too
            run.rows -= 1

    def _option(self, given: dict[str, Any], name: str) -> Any:
        """A generation option: from the arguments, the `generation_config` passed, or the model's own."""
        if given.get(name) is not None:
            return given[name]
        config = given.get("generation_config") or self.context.model.generation_config
        return getattr(config, name, None)

    def _assisted(self, given: dict[str, Any]) -> str | None:
        """The argument that asks for assisted decoding, if one does."""
        return next((name for name in ASSISTED if self._option(given, name)), None)

    def _refuse(self, given: dict[str, Any]) -> None:
        stages = self.context.stages
        later = stages.get("decoder") or stages.get("cache") or stages.get("prompt")
        passes = self.context.vision_method is not None and self.context.vision_method.passes
        if later is None and (self.context.probe.looks or passes):  # what it reads, or hides, is of the whole prompt
            later = stages["vision"]
        kind, cache = self._option(given, "cache_implementation"), cache_of(given)
        if kind not in (None, "dynamic", "dynamic_full") or _static(None, given):
            named = f"cache_implementation={kind!r}" if kind else f"past_key_values={type(cache).__name__}"
            if not _static(kind, given):
                raise ValueError(
                    f"{named} keeps entries in layers of its own, which are offloaded or quantized whole, and cannot "
                    "hold compressed layers; use a dynamic cache, or decompress() for this call"
                )
            if later is not None:
                raise ValueError(
                    f"{named} takes whole prompts and stores every layer at full length, so method={later.name!r} "
                    "cannot act; use a dynamic cache, or vision methods that read no layer of the language model"
                )
        if (size := self._option(given, "prefill_chunk_size")) and later is not None:
            raise ValueError(
                f"prefill_chunk_size={size}: method={later.name!r} decides by the whole prompt, which a chunk does not "
                "show; generate without chunks, or use vision methods that read no layer of the language model"
            )
        if size and self.context.step is not None and stages["vision"].ratio != 0:  # a chunk may begin inside an image
            raise ValueError(
                f"prefill_chunk_size={size}: positions={self.context.step} counts the tokens of whole images; generate "
                "without chunks, or use positions='auto'"
            )
        self._refuse_candidates(given)

    def _refuse_candidates(self, given: dict[str, Any]) -> None:
        """Assisted decoding must give what decoding token by token gives."""
        context, assisted, cache = self.context, self._assisted(given), cache_of(given)
        acts = any(stage.ratio != 0 for stage in context.stages.values())
        if assisted and acts and cache is not None and cache.get_seq_length():
            raise ValueError(
                f"{assisted}: transformers feeds the whole conversation again behind a cache that holds tokens, and "
                "what comes out is not what greedy decoding gives; continue with past_key_values alone, or start anew"
            )
        if assisted == "assistant_early_exit" and context.by_layer:
            raise ValueError(
                f"assistant_early_exit: {context.name} compresses all layers together, so the first ones cannot draft "
                "alone; use prompt_lookup_num_tokens or assistant_model"
            )
        if (assisted or self._option(given, "is_assistant")) and context.idles:
            raise ValueError(
                f"{assisted or 'assistant_model'}: method={context.stages['decoder'].name!r} runs other layers for "
                "each token, so tokens cannot be checked together, nor taken back; generate without candidates"
            )
        method, policy = context.cache_method, context.policy
        if method is None or policy is None or policy.ratio == 0:
            return
        name = context.stages["cache"].name
        held, stepwise = method.policy == "hold", policy.stepwise
        if assisted and stepwise:
            remedy = "compress with policy='grow'" if held else "generate without candidates"
            raise ValueError(
                f"{assisted}: method={name!r} chooses or packs entries anew while decoding, so tokens checked together "
                f"would find another cache than one by one; {remedy}"
            )
        if self._option(given, "is_assistant") and (held or stepwise):
            remedy = "compress the assistant with policy='grow'" if held else "leave the assistant bare"
            raise ValueError(
                f"assistant_model: method={name!r} drops or packs entries of the assistant while it decodes, so those "
                f"of rejected candidates cannot be taken back; {remedy}"
            )

    # -- static caches ------------------------------------------------------------------------------------------------
    def _rewritten(self, given: dict[str, Any], ids: Tensor) -> Any:
        """The same decision applied to the prompt itself: the language model sees an ordinary short prompt.

        Static caches are sized and compiled for whole prompts, so here `input_ids`, masks and positions are shortened
        and the features handed over ready-made; the caller's prompt is put back into what is returned.
        """
        context = self.context
        check_ids(context, dict(given, input_ids=None if given.get("inputs_embeds") is not None else ids))
        if ids is None:
            return self.original(**given)
        if (cache := cache_of(given)) is not None and cache.get_seq_length():
            raise ValueError("past_key_values: a static cache that already holds tokens cannot be continued compressed")
        if any(self._option(given, name) not in (None, 1) for name in ("num_beams", "num_return_sequences")):
            raise ValueError(
                "a static cache with vision compression generates one sequence per prompt; use num_beams=1"
            )
        short = shorten(context, given, ids)
        for limit, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if (length := self._option(given, limit)) and not self._option(given, new):
                short[limit], short[new] = None, max(int(limit == "max_length"), length - ids.shape[1])
        width = short["input_ids"].shape[1]
        whole_ids(short, ids, width)
        assert context.state.run is not None
        context.state.run.bare, context.state.encoded = True, {}
        out = self.original(**short)
        sequences = out if torch.is_tensor(out) else out.sequences
        whole = torch.cat([ids.to(sequences.device), sequences[:, width:]], 1)
        if torch.is_tensor(out):
            return whole
        out = copy.copy(out)
        out.sequences = whole
        return out


def _static(kind: Any, given: dict[str, Any]) -> bool:
    cache = cache_of(given)
    return kind in STATIC or "Static" in type(cache).__name__
