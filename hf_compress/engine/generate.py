"""What stands before `generate`: refusals that only its arguments show, chunks, and static caches."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_compress.engine.inputs import check_one_sample
from hf_compress.patches.versions import cache_of, renamed

if TYPE_CHECKING:
    from hf_compress.engine.runtime import Compression

ASSISTED = ("prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit", "custom_generate")


class Generate:
    """Instance attribute `generate` of a compressed model; calls the one of its class.

    Raises (on call):
        ValueError: the arguments ask for something that the installed methods cannot do; the message says what works.
    """

    def __init__(self, owner: Compression):
        self.owner = owner
        self.__name__ = "generate"
        self.inner = owner.model.__dict__.get("generate")  # a wrapper that the user set on the instance

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.owner.model).generate)  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner, state = self.owner, self.owner.state
        kwargs = renamed(kwargs, owner.cache_names[0])
        names = list(self.__signature__.parameters)[1:]
        given = {**dict(zip(names, args)), **kwargs}
        self._refuse(given)
        check_one_sample(owner, given)
        ids: Any = given.get("input_ids") if given.get("inputs") is None else given["inputs"]
        state.prompt_rows = ids.shape[1] if torch.is_tensor(ids) else None
        try:
            if owner.vision is not None and _static(self._option(given, "cache_implementation"), given):
                return self._rewritten(given, ids)
            if owner.vision is not None and self._option(given, "prefill_chunk_size"):
                state.prompt = ids
            return self._generate(*args, **kwargs)
        finally:
            state.prompt, state.encoded, state.bypass, state.forward = None, {}, False, None
            state.prompt_rows = None

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.owner.model).generate(self.owner.model, *args, **kwargs)  # type: ignore[attr-defined]

    def _option(self, given: dict[str, Any], name: str) -> Any:
        """A generation option: from the arguments, the `generation_config` passed, or the model's own."""
        if given.get(name) is not None:
            return given[name]
        config = given.get("generation_config") or self.owner.model.generation_config
        return getattr(config, name, None)

    def _refuse(self, given: dict[str, Any]) -> None:
        stages = self.owner.stages
        later = stages.get("decoder") or stages.get("cache")
        kind = self._option(given, "cache_implementation")
        if kind not in (None, "dynamic", "dynamic_full") or _static(None, given):
            if later is not None:
                raise ValueError(
                    f"cache_implementation={kind or type(cache_of(given)).__name__!r} stores every layer "
                    f"at full length, so method={later.name!r} cannot act; use a dynamic cache, or vision methods only"
                )
            if not _static(kind, given):
                raise ValueError(f"cache_implementation={kind!r} cannot hold compressed layers; use dynamic or static")
        if (size := self._option(given, "prefill_chunk_size")) and later is not None:
            raise ValueError(
                f"prefill_chunk_size={size}: method={later.name!r} decides at the end of the prompt, which a chunk "
                "does not show; generate without chunks, or use vision methods only"
            )
        assisted = next((n for n in ASSISTED if self._option(given, n)), None)
        if assisted and self.owner.evicts is not None and self.owner.evicts.stepwise:
            raise ValueError(
                f"{assisted}: method={stages['cache'].name!r} decides anew at every step, so tokens checked together "
                "would see another cache than one by one; compress with policy='grow'"
            )

    # -- static caches ------------------------------------------------------------------------------------------------
    def _rewritten(self, given: dict[str, Any], ids: Tensor) -> Any:
        """The same decision applied to the prompt itself: the language model sees an ordinary short prompt.

        Static caches are sized and compiled for whole prompts, so here `input_ids`, masks and positions are shortened
        and the features handed over ready-made; the caller's prompt is put back into what is returned.
        """
        owner = self.owner
        if (cache := cache_of(given)) is not None and cache.get_seq_length():
            raise ValueError("past_key_values: a static cache that already holds tokens cannot be continued compressed")
        if any(self._option(given, name) not in (None, 1) for name in ("num_beams", "num_return_sequences")):
            raise ValueError(
                "a static cache with vision compression generates one sequence per prompt; use num_beams=1"
            )
        from hf_compress.engine.rewrite import shorten

        short, keep = shorten(owner, given, ids)
        if (limit := short.pop("max_length", None)) and not self._option(given, "max_new_tokens"):
            short["max_new_tokens"] = max(1, limit - ids.shape[1])
        if short.get("streamer") is not None:
            short["streamer"] = WholePrompt(short["streamer"], ids)
        owner.state.bypass = True
        out = self._generate(**short)
        sequences = out if torch.is_tensor(out) else out.sequences
        whole = torch.cat([ids.to(sequences.device), sequences[:, keep.sum(1).max() :]], 1)
        if torch.is_tensor(out):
            return whole
        out = copy.copy(out)
        out.sequences = whole
        return out


class WholePrompt:
    """A streamer that is shown the caller's prompt in place of the shortened one."""

    def __init__(self, streamer: Any, ids: Tensor):
        self.streamer, self.ids = streamer, ids

    def put(self, value: Tensor) -> None:
        """The first thing generate streams is the prompt."""
        if self.ids is not None:
            value, self.ids = self.ids.cpu(), None  # type: ignore[assignment]
        self.streamer.put(value)

    def end(self) -> None:
        """Passed on."""
        self.streamer.end()


def _static(kind: Any, given: dict[str, Any]) -> bool:
    cache = cache_of(given)
    return kind in ("static", "sliding_window", "hybrid", "hybrid_chunked") or "Static" in type(cache).__name__
