"""Lossless decoding: the compressed model proposes tokens, the same model uncompressed checks them.

The parameters are shared; each of the two has a cache of its own, and only that of the drafts is compressed. The
assistants of transformers cannot do it: they are never shown the picture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.generation import candidate_generator as host
from transformers.generation.candidate_generator import CandidateGenerator

from hf_compress.engine.context import Context
from hf_compress.engine.instead import Instead
from hf_compress.engine.paired import Option, check_caches, check_features, own_cache
from hf_compress.engine.state import Drafting, Run
from hf_compress.methods.base import check_count
from hf_compress.stores import held_layers

MAKER = "_get_candidate_generator"  # what generate() of transformers asks for its candidates


def drafting(context: Context, tokens: int) -> contextlib.AbstractContextManager[Drafting]:
    """Inside the block generate() gives what the uncompressed model gives; the compression proposes `tokens` a time.

    Raises:
        ValueError: `tokens` is no count, or the methods change what both of them read.
    """
    check_count("tokens", tokens)
    _check_methods(context)
    return _drafting(context, tokens)


@contextlib.contextmanager
def _drafting(context: Context, tokens: int) -> Iterator[Drafting]:
    state = context.state
    before, state.beside = state.beside, (counts := Drafting(tokens))
    try:
        yield counts
    finally:
        state.beside = before


def _check_methods(context: Context) -> None:
    policy = context.policy
    if not hasattr(type(context.model), MAKER) or context.adapter.states:
        raise ValueError(f"drafting: {type(context.model).__name__} cannot decode by candidates")
    check_features(context, "drafting")
    if context.idles:
        raise ValueError(
            f"drafting: method={context.stages['decoder'].name!r} runs other layers for each token, so drafts that are "
            "rejected cannot be taken back; use another decoder method"
        )
    method = context.cache_method
    if method is not None and policy is not None and policy.ratio != 0:
        held, name = method.policy == "hold", context.stages["cache"].name
        if held or policy.steps.stepwise:
            remedy = "compress with policy='grow'" if held else "use another cache method"
            raise ValueError(
                f"drafting: method={name!r} drops or packs entries while decoding, so drafts that are rejected cannot "
                f"be taken back; {remedy}"
            )


def check_call(given: dict[str, Any], option: Option, assisted: str | None) -> None:
    """Raises ValueError if a generate() with these arguments cannot be checked token by token."""
    ids: Any = given.get("input_ids") if given.get("inputs") is None else given["inputs"]
    if not torch.is_tensor(ids):
        raise ValueError("drafting: pass input_ids; what is drafted and checked are ids")
    rows = len(ids) * (option(given, "num_return_sequences") or 1)
    if rows != 1 or (option(given, "num_beams") or 1) != 1:
        raise ValueError(
            f"drafting: of {rows} sequences with num_beams={option(given, 'num_beams') or 1} each accepts another "
            "number of drafts, which transformers does not decode together; generate one sequence at a time"
        )
    check_caches(given, option, assisted, "drafting")


class Candidates(Instead):
    """Instance attribute in place of what makes the candidates of assisted decoding: ours while drafting."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        state = self.context.state
        if state.run is None or state.run.drafting is None:
            return self.original(*args, **kwargs)
        given = self.named(args, kwargs)
        names = ("input_ids", "generation_config", "logits_processor", "model_kwargs")
        return Drafts(self.context, state.run.drafting, *(given[name] for name in names))


class Drafts(CandidateGenerator):
    """Greedy continuations by the compressed model, with a cache that follows what was accepted."""

    def __init__(
        self,
        context: Context,
        counts: Drafting,
        prompt: Tensor,
        config: Any,
        processors: Any,
        arguments: dict[str, Any],
    ):
        self.context, self.counts, self.processors = context, counts, processors
        self.most, self.ends = config.max_length, getattr(config, "_eos_token_tensor", None)
        self.run = Run(rows=prompt.shape[1], tentative=True)
        self.cache = own_cache(context)
        for layer in held_layers(self.cache):
            layer.slack = counts.tokens
        self.arguments = {**arguments, "use_cache": True, context.cache_names[0]: self.cache}

    @torch.no_grad()
    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """(1, L) ids so far to (1, L + n), with up to `tokens` drafted ones."""
        counts, length, out = self.counts, input_ids.shape[1], input_ids
        counts.forwards += 1
        if length == self.run.rows:  # checked alone: a prompt that sees both ways would see the drafts too
            return input_ids, None
        if (behind := self.cache.get_seq_length() - (length - 1)) > 0:
            self.cache.crop(-behind)
        with self.context.state.scope() as state:
            for _ in range(min(counts.tokens, self.most - length - 1)):
                state.run, state.forward = self.run, None
                token = self._next(out)
                out = torch.cat([out, token], 1)
                if self.ends is not None and bool(torch.isin(token, self.ends.to(token.device)).all()):
                    break
        counts.drafted += out.shape[1] - length
        return out, None

    def _next(self, ids: Tensor) -> Tensor:
        """(1, 1): what the compressed model says after `ids`."""
        model, length, seen = self.context.model, ids.shape[1], self.cache.get_seq_length()
        arguments = dict(self.arguments)
        for prepare in (host._prepare_attention_mask, host._prepare_position_ids):
            arguments = prepare(arguments, length, False)
        arguments = host._prepare_token_type_ids(arguments, length)
        inputs = model.prepare_inputs_for_generation(
            ids, next_sequence_length=length - seen if seen else None, is_first_iteration=not seen, **arguments
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = 1
        scores = model(**inputs).logits[:, -1].to(ids.device, torch.float32)
        return self.processors(ids, scores).argmax(-1, keepdim=True)

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Counts what was accepted."""
        self.counts.accepted += int(num_matches)
