"""Methods that pick tokens which differ from each other: the numbers of their cards, and slow references."""

from __future__ import annotations

import pytest

from hf_compress.methods.vision.scope_cov import ScopeCov
from tests.methods.test_vision_methods import f6, some
from tests.test_diversity import slow_coverage


# ---- scope_cov
def test_scope_cov_card():
    kept = lambda k, alpha=1.0: ScopeCov(alpha=alpha).assign(f6(), k).kept[0].tolist()
    order = lambda alpha: [(set(kept(k, alpha)) - set(kept(k - 1, alpha) if k > 1 else [])).pop() for k in range(1, 5)]
    assert order(1) == [1, 5, 0, 4] and order(0) == [4, 3, 5, 0] and order(2) == [0, 1, 5, 4]
    assert kept(4) == [0, 1, 4, 5]


@pytest.mark.parametrize("alpha", [0.5, 1, 3.0])
def test_scope_cov_against_loops(alpha):
    images = some(5, 6, n=3)
    for keep in (1, 4, 15, 29):
        found = ScopeCov(alpha=alpha).assign(images, keep).kept.tolist()
        for mine, x, row in zip(found, images.embeddings_, images.rows[0].mean(1)):
            assert mine == sorted(slow_coverage(x, row**alpha, keep))


# ---- knobs
@pytest.mark.parametrize(
    "cls,knob,bad", [(ScopeCov, "alpha", -1), (ScopeCov, "alpha", "1"), (ScopeCov, "alpha", float("inf"))]
)
def test_bad_knobs_are_refused(cls, knob, bad):
    with pytest.raises(ValueError, match=f"{knob}="):
        cls(**{knob: bad})
