"""Docstrings are read by the command line and the documentation, so that what they have to say is looked for here."""

from dataclasses import dataclass

import pytest

import hf_compress
from hf_compress import docstrings

SPECS = hf_compress.methods().values()


@dataclass
class Base:
    """Something that others are made of.

    Args:
        shared: by all.
    """

    shared: int = 0


@dataclass
class Example(Base):
    """First line.

    It keeps K tokens, e.g. some. The code takes another order, we do not. A third sentence.

    Source: "A Title: With a Part", CVPR 2025, arXiv:2401.00001, with code. There a step is taken twice. Cost: O(N * D),
    1.5 times that of others. Beyond that nothing.

    Args:
        one, two: of the same kind; three: of another,
            over two lines.
        four: "a" or "b".

    Raises:
        ValueError: never.
    """

    one: int = 1
    two: int = 2
    three: int = 3
    four: str = "a"


def test_parts_of_a_docstring():
    assert docstrings.summary(Example) == "First line."
    assert docstrings.title(Example) == "A Title: With a Part"
    assert docstrings.cost(Example) == "O(N * D), 1.5 times that of others."
    assert docstrings.differs(Example) == [
        "The code takes another order, we do not.",
        "With code.",
        "There a step is taken twice.",
    ]
    assert docstrings.sections(Example)["Raises"] == "ValueError: never."
    found = docstrings.knobs(Example)
    assert found["one"] == found["two"] == "of the same kind; three: of another, over two lines."
    assert (
        found["three"] == "of another, over two lines."
        and found["four"] == '"a" or "b".'
        and found["shared"] == "by all."
    )


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_method_says_what_a_person_asks(spec):
    """Its cost, the title of its paper, when to take it, and what every knob means."""
    assert spec.cost, f'{spec.name}: write "Cost: ..." into its docstring'
    assert spec.when and spec.summary.endswith(".")
    assert bool(spec.title) == (spec.paper != "control"), f'{spec.name}: write Source: "title", arXiv:...'
    assert spec.paper == "control" or spec.paper in spec.cls.__doc__
    silent = [name for name, meaning in spec.meanings.items() if not meaning]
    assert not silent, f"{spec.name}: say in Args what {silent} mean"
