import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_compress
from hf_compress.readme import grouped, main, markdown, render
from hf_compress.registry import KINDS, register

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_tables_are_current(capsys):
    assert main(["--check", "--path", str(README)]) == 0, "run `make readme`"


def test_stale_tables_are_found_and_rewritten(tmp_path, capsys):
    stale = tmp_path / "README.md"
    stale.write_text(README.read_text(encoding="utf-8").replace("| `fastervlm` |", "| `fastvlm` |"), encoding="utf-8")
    assert main(["--check", "--path", str(stale)]) == 1 and "stale" in capsys.readouterr().err
    assert main(["--path", str(stale)]) == 0
    assert stale.read_text(encoding="utf-8") == README.read_text(encoding="utf-8")


def test_markers_must_be_there(tmp_path, capsys):
    with pytest.raises(ValueError, match="methods:begin"):
        render("# nothing")
    with pytest.raises(SystemExit) as end:
        main(["--path", str(tmp_path / "none.md")])
    assert end.value.code == 2


def test_markdown_links_papers_and_escapes():
    table = markdown(("a", "b"), [["x, y", "arXiv:2412.01818 | z"]])
    assert table.splitlines()[-1] == "| `x`, `y` | [2412.01818](https://arxiv.org/abs/2412.01818) \\| z |"


def test_code_blocks_run(tmp_path):
    """All Python blocks in order, as one program, in a process of its own: one of them registers a method."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    program = [sys.executable, "-c", "\n".join(blocks)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    answer, right = re.search(r"ASSISTANT: ?(.*) \| right: (.*)", done.stdout).groups()
    assert answer.strip() == right.strip()
    assert "divprune(ratio=0.5) + fastv(ratio=0.3, layer=1) + snapkv(ratio=0.5, window=16)" in done.stdout
    assert "restored: fastervlm(ratio=0.75)" in done.stdout


def test_links_point_to_files():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_every_method_has_a_kind_that_is_explained():
    """No method of the package stands apart, and no kind is empty but for those that only methods of one's own have."""
    for spec in hf_compress.methods().values():
        assert spec.kind in KINDS[spec.stage], f"{spec.name}: name a kind of {list(KINDS[spec.stage])} in `register`"
    text = grouped(hf_compress.methods().values())
    for stage, kinds in KINDS.items():
        for kind, sentence in kinds.items():
            used = any((s.stage, s.kind) == (stage, kind) for s in hf_compress.methods().values())
            assert (f"**{stage}: {kind}.** {sentence}" in text) == used
    with pytest.raises(ValueError, match=r"kind='nice' is not one of \('control', 'saliency'"):
        register("other", stage="vision", paper="control", kind="nice")
