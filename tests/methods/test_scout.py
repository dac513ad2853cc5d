"""scout: the numbers of its card, the pattern entry by entry, and what a cache holds of it."""

import random
import re

import pytest

from hf_compress.methods.cache.scout import Scout
from tests.invariants.reference import batch_of, fresh, shared
from tests.methods.test_cache_methods import held_after, valid_rows
from tests.methods.test_cache_patterns import entries


def kept(lengths, budgets, every):
    """Ranks of what stays of each row, by the highest scores."""
    view = entries(lengths, budgets)
    view.shape = (len(lengths), 1, max(lengths))
    score, out = Scout(every=every).score(view)[:, 0], []
    for row, valid, n in zip(score, view.valid[:, 0], budgets):
        ranked = row[valid].argsort(descending=True, stable=True)[:n]
        out.append(sorted(ranked.tolist()))
    return out


def test_card():
    """A window of 1024 beside every tenth of 32768 entries."""
    (found,) = kept([32768], [3276 + 1024], 10)
    assert len(found) / 32768 == pytest.approx(0.131, abs=5e-4)
    assert set(range(9, 32768, 10)) <= set(found) and set(range(32768 - 1024, 32768)) <= set(found)
    assert kept([8], [4], 3) == [[2, 5, 6, 7]]


def test_entry_by_entry():
    rng = random.Random(0)
    for _ in range(200):
        lengths, every = [rng.randint(1, 60) for _ in range(2)], rng.randint(1, 12)
        budgets = [rng.randint(1, n) for n in lengths]
        for n, budget, found in zip(lengths, budgets, kept(lengths, budgets, every)):
            apart = every
            while n // apart > budget * 4 // 5:
                apart += every
            expected = [i for i in range(n) if (i + 1) % apart == 0]
            newest = [i for i in reversed(range(n)) if i not in expected]
            assert found == sorted(expected + newest[: budget - len(expected)])


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_in_a_cache(name):
    """The same entries in every layer and head, padding left out of the count."""
    model, batch = shared(name), batch_of(name)
    held, _ = held_after(model, name, "scout", batch, 1, every=3)
    for b in range(2):
        rows = valid_rows(batch, b)
        (expected,) = kept([len(rows)], [len(rows) // 2], 3)
        for layer in held:
            assert all(head.nonzero()[:, 0].tolist() == [rows[i] for i in expected] for head in layer[b])


def test_knobs():
    with pytest.raises(ValueError, match=re.escape("every=0 must be")):
        fresh("llama").compress("scout", ratio=0.5, every=0)
