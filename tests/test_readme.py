import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_compress
from hf_compress.readme import BOARDS, PAGES, STARTS, grouped, main, markdown, render, start_rows
from hf_compress.registry import KINDS, register

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_tables_are_current(capsys):
    assert main(["--check", "--folder", str(ROOT)]) == 0, "run `make readme`"


def test_stale_tables_are_found_and_rewritten(tmp_path, capsys):
    for name in ("README.md", "docs", "benchmarks/leaderboard.csv", BOARDS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (shutil.copytree if name == "docs" else shutil.copy)(ROOT / name, tmp_path / name)
    stale = tmp_path / "docs" / "methods.md"
    stale.write_text(stale.read_text(encoding="utf-8").replace("| `fastervlm` |", "| `fastvlm` |"), encoding="utf-8")
    assert main(["--check", "--folder", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("docs/methods.md: stale")
    assert main(["--folder", str(tmp_path)]) == 0
    for name in (*PAGES, BOARDS):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8")


def test_markers_must_be_there(tmp_path, capsys):
    with pytest.raises(ValueError, match="methods:begin"):
        render("# nothing", {"methods": ""})
    with pytest.raises(SystemExit) as end:
        main(["--folder", str(tmp_path)])
    assert end.value.code == 2 and "README.md does not exist" in capsys.readouterr().err


def test_starts_come_from_the_leaderboard():
    row = {"model": "demo:llava", "data": "demo:scenes", "protocol": "one-turn", "accuracy": "0.5"}
    with pytest.raises(ValueError, match=r"leaderboard\.csv has no accuracy of"):
        start_rows([row | {"method": "none", "ratio": ""}])
    assert all(start.method in hf_compress.methods() for start in STARTS)


def test_markdown_links_papers_and_escapes():
    table = markdown(("a", "b"), [["x, y", "arXiv:2412.01818 | z"]])
    assert table.splitlines()[-1] == "| `x`, `y` | [2412.01818](https://arxiv.org/abs/2412.01818) \\| z |"


HUB = {"llava-hf/llava-1.5-7b-hf": "llava", "Qwen/Qwen2.5-VL-3B-Instruct": "qwen"}  # and what stands in for it
BEFORE = """
import transformers
from hf_compress.demo.dataset import load_scenes
from hf_compress.demo.qwen_processor import ImageOnlyProcessor

load_scenes("test", images=1, questions=1)[0]["image"].resize((300, 300)).save("photo.jpg")
real = transformers.AutoProcessor.from_pretrained
transformers.AutoProcessor.from_pretrained = lambda name: (  # that of Qwen needs torchvision
    ImageOnlyProcessor.from_pretrained(name, backend="pil") if "qwen" in name else real(name, backend="pil")
)
"""


def test_code_blocks_run_up_to_the_download(tmp_path):
    """All Python blocks in order, as one program, with the models of the package where a hub is named."""
    text = README.read_text(encoding="utf-8")
    for name, demo in HUB.items():
        assert text.count(f'"{name}"') == 1
        text = text.replace(f'"{name}"', repr(str(ROOT / "hf_compress" / "demo" / demo)))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    program = [sys.executable, "-c", "\n".join([BEFORE, *blocks])]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "compressed by fastervlm(ratio=0.75)" in done.stdout and "visual tokens: 196 -> 49" in done.stdout
    assert "compressed by visionzip(ratio=0.75) + snapkv(ratio=0.5)" in done.stdout
    assert (tmp_path / "kept.png").stat().st_size > 10_000


def test_links_point_to_files():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_a_newcomer_reads_it_in_five_minutes():
    prose = re.sub(r"```.*?```|\]\([^)]*\)", " ", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(prose.split()) < 1000


def test_every_method_has_a_kind_that_is_explained():
    """No method of the package stands apart, and no kind is empty but for those that only methods of one's own have."""
    for spec in hf_compress.methods().values():
        assert spec.kind in KINDS[spec.stage], f"{spec.name}: name a kind of {list(KINDS[spec.stage])} in `register`"
    text = grouped(hf_compress.methods().values())
    for stage, kinds in KINDS.items():
        for kind, sentence in kinds.items():
            used = any((s.stage, s.kind) == (stage, kind) for s in hf_compress.methods().values())
            assert (f"## {stage}: {kind}\n\n{sentence}\n" in text) == used
    with pytest.raises(ValueError, match=r"kind='nice' is not one of \('control', 'saliency'"):
        register("other", stage="vision", paper="control", kind="nice")
