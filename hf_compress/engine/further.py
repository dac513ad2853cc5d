"""Further forwards beside the one that the caller asked for, through the model as it is without its compression."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_compress.engine.context import Context
from hf_compress.engine.state import Forward, Given, Notes
from hf_compress.tensors.attention import Record


class Enough(Exception):
    """The deepest layer that somebody reads has been reached."""


@dataclass
class Prompt:
    """A prompt as the language model is given it.

    Attributes:
        x: (B, q, D) what enters it.
        mask: (B, q) bool, False on padding and behind the prompt; position: its position ids, or None; ids: (B, q).
        ready_made: the masks that the model hands to its language model, where it makes them itself.
    """

    x: Tensor
    ids: Tensor
    mask: Tensor
    position: Tensor | None
    ready_made: Any = None

    def arguments(self) -> dict[str, Any]:
        """Of the model; nothing is cached."""
        given = {} if self.position is None else {"position_ids": self.position}
        mask = self.mask.long() if self.ready_made is None else _own(self.ready_made, self.x.shape[1])
        return {"inputs_embeds": self.x, "attention_mask": mask, "use_cache": False, **given}


def _own(masks: Any, rows: int) -> Any:
    """Of masks (B, 1, q, past + q), or of one per kind of layer, what the rows see of each other."""
    if isinstance(masks, dict):
        return {kind: _own(mask, rows) for kind, mask in masks.items()}
    return None if masks is None else masks[..., -rows:]


@contextlib.contextmanager
def aside(context: Context, layers: frozenset[int] = frozenset()) -> Iterator[Forward]:
    """A forward inside goes as in a bare model, but that the `layers` leave their records; stops behind the deepest."""
    one = Forward(Given({}, bare=True), notes=Notes(wanted=layers))
    with context.state.scope(), torch.no_grad():
        context.state.run, context.state.forward = None, one
        with contextlib.suppress(Enough):
            yield one


def records_ahead(context: Context, prompt: Prompt, layers: frozenset[int]) -> dict[int, Record]:
    """Queries and keys of the `layers` over a prompt; the layers behind the deepest are not run."""
    given = prompt.arguments()
    with aside(context, layers) as one:
        context.decoder(**given)
    return one.notes.records


def logits_ahead(context: Context, prompt: Prompt) -> Tensor:
    """(B, q, V) logits of the model over a prompt."""
    with aside(context):
        out = context.outermost.original(**prompt.arguments())
    return out[0] if isinstance(out, tuple) else out.logits
