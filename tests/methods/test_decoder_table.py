"""Mean visual tokens over layers at the size of LLaVA-1.5 (576 in 32 layers), against what papers publish."""

from fractions import Fraction

import pytest

from hf_compress.methods.decoder.dart import DART
from hf_compress.methods.decoder.fastv import FastV
from hf_compress.methods.decoder.fitprune import FitPrune
from hf_compress.methods.decoder.holitom_inner import HoliTomInner
from hf_compress.methods.decoder.pyramiddrop import PyramidDrop
from hf_compress.methods.decoder.sparsevlm import SparseVLM
from hf_compress.methods.decoder.transprune import TransPrune

V, T, D, M = 576, 32, 4096, 11008


def mean(method, share):
    """Visual tokens per layer under the plan that removes `share` of them."""
    plan, left, total = method.plan(T, V, Fraction(share)), V, 0
    for layer in range(T):
        left = plan.get(layer, left)
        total += left
    return Fraction(total, T)


def teraflops(method, share):
    """Of visual tokens alone, as papers count: 4 n d^2 + 2 n^2 d + 3 n d m per layer, a multiply-add as one."""
    plan, left, total = method.plan(T, V, Fraction(share)), V, 0
    for layer in range(T):
        left = plan.get(layer, left)
        total += 4 * left * D**2 + 2 * left**2 * D + 3 * left * D * M
    return total / 1e12


@pytest.mark.parametrize(
    ("method", "published"),
    [
        (FastV(), 306),
        (FastV(), 171),
        (FastV(), 103.5),
        (FastV(layer=3), 315),
        (DART(), 306),
        (HoliTomInner(), 315),
        (PyramidDrop(), 270),
        (SparseVLM(), 206.5),
        (SparseVLM(), 145.4),
        (SparseVLM(), 114.1),
        (SparseVLM(), 82.3),
        (TransPrune(), 236.25),
        (FitPrune(), 362.47),
        (FitPrune(), 244.97),
        (FitPrune(), 130.59),
        (FitPrune(), 72.84),
    ],
)
def test_mean_tokens(method, published):
    """A budget of the published mean is met to a token of all layers together, or as near as the plan's steps allow."""
    step = Fraction(max(T - min(method.boundaries(T)), 1), 2 * T)  # half a row behind the earliest cut
    assert abs(mean(method, 1 - Fraction(published) / V) - Fraction(published)) <= step


@pytest.mark.parametrize(
    ("method", "published", "flops"),
    [
        (FastV(), 576, 3.82),
        (FastV(), 306, 2.01),
        (FastV(), 171, 1.12),
        (PyramidDrop(), 270, 1.78),
        (TransPrune(), Fraction(945, 4), 1.56),
    ],
)
def test_teraflops(method, published, flops):
    assert teraflops(method, 1 - Fraction(published, V)) == pytest.approx(flops, abs=0.006)
