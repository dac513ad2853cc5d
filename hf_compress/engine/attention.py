"""The one probe through which attention is read: a few query rows against keys, never an L x L map.

A tapped module stays on its own kernel (sdpa, eager, flash) unless the reader has the output already: the tap only
leaves references to the rotated queries and keys behind, and only when somebody asked for them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_compress.tensors.attention import Record

TAP = "_hf_compress_tap"
NAME = "hf_compress"


class Call(NamedTuple):
    """One attention call: queries (B, Hq, q, d), keys and values (B, Hkv, S, d), rotated, with all that is cached."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    mask: Tensor | None = None  # (B or 1, 1 or Hq, q, S), as the kernel takes it
    kwargs: dict[str, Any] = {}  # what else it is given
    module: Any = None
    run: Any = None  # the kernel of the layer

    def over(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, q, Hq, d), and weights if it gives any: the layer's own kernel over other rows.

        Keys and values have Hkv heads, or all Hq.
        """
        module = self.module
        if key.shape[1] == query.shape[1] != self.key.shape[1]:
            module = Ungrouped(module)
        out: tuple[Tensor, Tensor | None] = self.run(module, query, key, value, mask, **self.kwargs)
        return out

    def record(self) -> Record:
        """What is kept of it."""
        return self.query.detach(), self.key.detach(), self.scaling


class Ungrouped:
    """An attention module as its kernel sees it where every query head has keys of its own."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


Weighted = tuple[Tensor, Tensor | None]  # an output, and the weights behind it
Sink = Callable[[Any, Call], Tensor | Weighted | Call | None]


class Tap:
    """What stands between one attention module and its kernel.

    Args:
        base: the module's own config, which goes on deciding the kernel.
        sink: called with (key, `Call`) at every attention call; `key` names the module. It may return the output of
            the attention, (B, q, Hq, d), with its weights if it has any, and the kernel is not run then; or the call
            that it is to be run on.
    """

    def __init__(self, base: Any, sink: Sink, key: Any):
        self.base, self.sink, self.key = base, sink, key


def _tapped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    tap: Tap = module.__dict__[TAP]
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    run = ALL_ATTENTION_FUNCTIONS.get_interface(tap.base._attn_implementation, eager)
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    done = tap.sink(tap.key, Call(query, key, value, scaling, attention_mask, kwargs, module, run))
    if isinstance(done, Call):
        query, key, value, attention_mask = done.query, done.key, done.value, done.mask
    elif isinstance(done, tuple):
        return done
    elif done is not None:
        return done, None
    return run(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, _tapped)


def tap(module: nn.Module, sink: Sink, key: Any) -> None:
    """Read the attention of `module` from now on. Only this module sees the renamed kernel; masks do not change.

    Raises:
        ValueError: another model that has it is compressed, or measured.
    """
    if TAP in module.__dict__:
        raise ValueError(
            f"model: a {type(module).__name__} is shared with another model that is compressed (or measured) and reads "
            "its attention; decompress() that first, or give each a copy of its own"
        )
    base = module.config
    view = copy.copy(base)
    view._attn_implementation_internal = NAME
    module.__dict__[TAP] = Tap(base, sink, key)
    module.config = view


def untap(module: nn.Module) -> None:
    """Undo `tap`."""
    module.config = module.__dict__.pop(TAP).base
