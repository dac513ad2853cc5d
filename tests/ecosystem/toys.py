"""A method that trains a module, for the tests of what becomes of it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from hf_compress import registry
from hf_compress.methods.base import DecoderMethod, VisionMethod
from hf_compress.signals import Assignment
from hf_compress.tensors.select import spaced


class Pool(nn.Module):
    """Each kept token reads all tokens of its image: (n, K, D) and (n, N, D) to (n, K, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(heads, width))
        self.out = nn.Linear(width, width)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, kept, tokens):
        share = ((kept + self.query.mean(0)) @ tokens.mT * self.scale).softmax(-1)
        return kept + self.out(share @ tokens)


@dataclass
class Resampler(VisionMethod):
    """Evenly spaced tokens that a trained module fills from all of them."""

    heads: int = 2
    price: float = 0.0  # of long vectors, in the loss

    def module(self, model):
        return Pool(model.config.get_text_config().hidden_size, self.heads)

    def assign(self, tokens, keep):
        index = torch.tensor(spaced(tokens.count, keep), device=tokens.device)
        return Assignment(index.repeat(len(tokens), 1))

    def make(self, tokens, assignment):
        out = tokens.module(assignment.pick(tokens.embeddings), tokens.embeddings)
        if self.price:
            tokens.losses.append(self.price * out.square().mean())
        return out


@dataclass
class Router(DecoderMethod):
    """Half of the visual rows wait in layers 1 and 3; those that do not come out as far changed as a router says."""

    waits = True

    def boundaries(self, layers):
        return (1, 3)

    def plan(self, layers, tokens, ratio):
        return {layer: tokens // 2 for layer in (1, 3)}

    def module(self, model):
        return nn.Linear(model.config.get_text_config().hidden_size, 1)

    def gate(self, view, answer):
        gate = view.module(view.hidden)[..., 0].sigmoid()
        view.losses.append(gate.mean())
        return gate


@contextlib.contextmanager
def registered(stage: str = "vision", **classes: type):
    """The methods are known by these names inside the block."""
    before = dict(registry.methods())
    try:
        for name, cls in classes.items():
            registry.register(name, stage=stage, paper="control", needs={"visual"})(cls)
        yield
    finally:
        for name in classes:
            registry._METHODS.pop(name)
        assert dict(registry.methods()) == before
