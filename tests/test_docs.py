"""The documentation: snippets run, links lead somewhere, the site builds, and public names say what they are."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
HOME = "https://github.com/hf-compress/hf-compress/"

RUN = """
import pathlib, re, sys, traceback
for name in sys.argv[1:]:
    blocks = re.findall(r"```python\\n(.*?)```", pathlib.Path(name).read_text(encoding="utf-8"), re.DOTALL)
    try:
        exec(compile("\\n".join(blocks), name, "exec"), {"__name__": name})
    except BaseException:
        traceback.print_exc()
        sys.exit(f"{name} failed")
    print("ran", name)
"""


def test_snippets_run(tmp_path):
    """The Python blocks of each page in order, as one program; all pages in one process, each in a namespace."""
    pages = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
    assert len(pages) >= 8
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", RUN, *map(str, pages)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ran ") == len(pages)
    for answer, right in re.findall(r"(?:ASSISTANT:)? ?([^\n:|]*) \| right: (.*)", done.stdout):
        assert answer.strip() == right.strip()
    assert "divprune(ratio=0.5) + fastv(ratio=0.3, layer=1) + snapkv(ratio=0.5, window=16)" in done.stdout
    assert "restored: fastervlm(ratio=0.75)" in done.stdout
    assert "[196, 196, 98, 98, 98, 98]" in done.stdout  # FastV's own budget


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Within the site relative ones; to other files of the repository by its address, as the site has no such pages."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path = target.partition("#")[0]
        if target.startswith(HOME):
            kind, branch, inside = path.removeprefix(HOME).split("/", 2)
            assert kind == ("raw" if inside.endswith(".png") else "blob") and branch == "main"
            assert (ROOT / inside).exists(), target
        elif path and not path.startswith("http"):
            assert (page.parent / path).resolve().exists(), target
            assert "docs" not in page.parts or (ROOT / "docs") in (page.parent / path).resolve().parents, target


def test_the_site_builds_without_warnings(tmp_path):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "site").rglob("index.html"))) == len(PAGES)
    reference = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert all(name in reference for name, _ in documented())
    example = (tmp_path / "site" / "adding-a-method" / "index.html").read_text(encoding="utf-8")
    assert "FirstSeen" in example  # from CONTRIBUTING.md
    assert (tmp_path / "site" / "engine.svg").exists()


def documented():
    """(name, object) of everything that the reference names."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for place, members in re.findall(r"^::: ([\w.]+)(?:\n    options:\n      members: \[(.*)\])?", text, re.MULTILINE):
        module, _, name = place.rpartition(".")
        holder = getattr(importlib.import_module(module), name, None) or importlib.import_module(place)
        if inspect.isclass(holder):
            yield name, holder
        for member in filter(None, members.split(", ")):
            yield member, inspect.getattr_static(holder, member)


def public():
    """(name, object) of these and of what their classes define."""
    for name, found in documented():
        yield name, found
        for part, value in vars(found).items() if inspect.isclass(found) else ():
            if not part.startswith("_") and (inspect.isfunction(value) or isinstance(value, property | classmethod)):
                yield f"{name}.{part}", value


@pytest.mark.parametrize(("name", "found"), [pytest.param(*one, id=one[0]) for one in public()])
def test_a_public_name_says_what_it_is(name, found):
    """It has a docstring, its own or that of what it overrides, in which every parameter of a function stands."""
    function = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    owner = dict(documented()).get(name.partition(".")[0])
    said = inspect.getdoc(function) or (inspect.getdoc(getattr(owner, name.rpartition(".")[2])) if "." in name else "")
    assert said and said.strip(), f"{name} has no docstring"
    if inspect.isfunction(function) and "." not in name:
        for parameter in inspect.signature(function).parameters.keys() - {"self"}:
            assert re.search(rf"\b{parameter}\b", said), f"{name}: say what {parameter} is"


def test_everything_that_is_exported_is_in_the_reference():
    """Names of the package and of the folders that users import from."""
    import hf_compress

    names = {name for name, _ in documented()}
    for module in (hf_compress, *map(importlib.import_module, ("hf_compress.show", "hf_compress.train"))):
        for name in module.__all__:
            value = getattr(module, name)
            assert name in names or inspect.ismodule(value), f"docs/api.md lacks {module.__name__}.{name}"
    methods = {name for name, _ in public() if "." not in name}
    assert {"VisionMethod", "DecoderMethod", "CacheMethod", "PromptMethod", "Architecture"} <= methods


def test_how_to_cite_names_this_version():
    import hf_compress

    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {hf_compress.__version__}\n" in text and "cff-version: 1.2.0" in text
