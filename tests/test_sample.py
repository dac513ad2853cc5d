"""The sample of the matrices that `make test` runs (tests/conftest.py)."""

from collections import Counter

from tests.conftest import CASES, sample

PAIRS = {f"{m}-{a}": {"method": m, "name": a} for m in range(100) for a in range(40)}


def test_a_test_runs_so_many_cases():
    kept = sample(PAIRS, Counter())
    assert len(kept) == CASES
    assert len({PAIRS[name]["method"] for name in kept} | {-1}) > CASES / 2  # new values, not the same again
    few = {name: PAIRS[name] for name in ("0-0", "0-1", "1-0", "1-1")}
    assert len(sample(few, Counter())) in (2, 3)  # what is left brings nothing new


def test_tests_of_a_file_share_all_values():
    met, names = Counter(), [f"test_{i}" for i in range(12)]
    for test in names:
        sample({f"{test}[{name}]": params for name, params in PAIRS.items()}, met)
    assert all(met["method", repr(m)] for m in range(100)) and all(met["name", repr(a)] for a in range(40))
    again = Counter()
    for test in names:
        sample({f"{test}[{name}]": params for name, params in PAIRS.items()}, again)
    assert again == met
