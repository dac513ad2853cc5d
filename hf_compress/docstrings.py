"""What docstrings say, in parts: sections, and of a method its cost, its paper and its knobs. No heavy import."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields

SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields")
SENTENCE = re.compile(r"(?<=[.;)])(?<!e\.g\.)\s+(?=[A-Z\"`])")
ABOUT = re.compile(r"\b(codes?|papers?|releases?d?|published|authors'?|original|kvpress)\b", re.IGNORECASE)


def sections(of: object) -> dict[str, str]:
    """The docstring of a class or a function by section, dedented; "" holds the prose before the first of them."""
    out: dict[str, list[str]] = {"": []}
    name = ""
    for line in (inspect.getdoc(of) or "").splitlines():
        head = re.fullmatch(r"(\w+):", line)
        if head and head[1] in SECTIONS:
            name = head[1]
            out[name] = []
        else:
            out[name].append(line)
    return {name: inspect.cleandoc("\n".join(["", *lines])) for name, lines in out.items()}


def entries(text: str) -> dict[str, str]:
    """`name: text` of a section, in one line each; names that share a text each have it."""
    out: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines():
        head = re.match(r"(\w+(?:, \w+)*): (.*)", line)
        if head:
            names = head[1].split(", ")
            out |= dict.fromkeys(names, head[2])
        else:
            out |= {name: f"{out[name]} {line.strip()}".strip() for name in names}
    for shared in dict.fromkeys(out.values()):  # names that follow within the text of another
        for part in shared.split("; ")[1:]:
            if found := re.match(r"(\w+): (.*)", part):
                out.setdefault(found[1], found[2])
    return out


def summary(of: object) -> str:
    """First line of the docstring."""
    return (inspect.getdoc(of) or "").partition("\n")[0]


def cost(method: type) -> str:
    """The sentence that says what a method costs, without the word; "" if there is none."""
    found = re.search(r"\bCost:? (.+?\.)(?=\s|$)", " ".join(sections(method)[""].split()))
    return found[1] if found else ""


def title(method: type) -> str:
    """The title of the paper that a method follows; "" of a control."""
    text = " ".join(sections(method)[""].split())
    found = re.search(r'Source: "(.+?),?"', text) or re.search(r"Source: (.+?)(?:, [A-Z][\w ]*\d{4})?, arXiv:", text)
    return found[1] if found else ""


def differs(method: type) -> list[str]:
    """What a docstring says of the paper and of its code, and of what is done otherwise here."""
    out = []
    for paragraph in re.split(r"\n\s*\n", sections(method)[""]):
        text = " ".join(paragraph.split())
        source = text.startswith("Source: ")
        if source:  # all of it is about the paper, up to the cost
            text = re.sub(r"^Source: .*?arXiv:\d{4}\.\d{4,5}[,;.]? ?", "", text).partition("Cost")[0]
        said = [s for s in SENTENCE.split(text) if s and (source or ABOUT.search(s)) and not s.startswith("Cost")]
        out += [s[0].upper() + s[1:] for s in map(str.strip, said)]
    return out


def knobs(method: type) -> dict[str, str]:
    """What every argument of a method means: by its own docstring, or by that of the class it has it from."""
    known: dict[str, str] = {}
    for cls in method.__mro__:
        if cls.__doc__ and cls.__module__ != "builtins":
            known = entries(sections(cls).get("Args", "")) | known
    return {f.name: known.get(f.name, "") for f in fields(method)}  # type: ignore[arg-type]
