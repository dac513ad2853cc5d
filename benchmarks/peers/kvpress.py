"""Side by side with kvpress, each in its own environment, on one random LLaMA; run from the root of the repository.

python -m benchmarks.peers.kvpress --out benchmarks/results/2026-01-31-kvpress
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers.cases import CASES
from benchmarks.peers.compare import agreement, summary, table
from hf_compress.bench.timing import Candidate, Ratio, interleave, record

PEER = "kvpress==0.5.5"
STEPS = 16  # tokens that are decoded in one timed run
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf-compress" / "peers"


def environment(folder: Path) -> Path:
    """The interpreter of an environment with kvpress and the torch that runs here, made where there is none yet."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / "complete"
    if not done.exists():
        print(f"making an environment for {PEER} in {folder}")
        venv.create(folder, with_pip=True, clear=True)
        same = torch.__version__.partition("+")[0]
        pip = [str(python), "-m", "pip", "install", "--quiet", f"torch=={same}", PEER]
        subprocess.run(pip, check=True)
        done.touch()
    return python


def make_model(folder: Path, length: int, prompts: int, hidden: int = 512) -> None:
    """A random LLaMA (hidden size 512, 4 layers, 8 heads of 64, 4 KV heads) and random prompts, always the same.

    Weights are three times as large as a fresh model has them: attention is then peaked, and few scores are so close
    that rounding decides.
    """
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        initializer_range=0.06,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    ids = [
        torch.randint(3, 1000, (length,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(prompts)
    ]
    (folder / "prompts.json").write_text(json.dumps(ids))


class Worker:
    """A side of the comparison, driven from here."""

    def __init__(self, python: Path | str, side: str, folder: Path):
        single = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE")}
        self.process = subprocess.Popen(
            [str(python), "-m", "benchmarks.peers.worker", side, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | single,
        )

    def ask(self, name: str, *arguments: Any) -> Any:
        """What the method `name` of `worker.Side` answers."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"the worker ended while it was asked for {name}{arguments}; its error is above")
        return json.loads(answer)

    def close(self) -> None:
        """Let it end."""
        self.process.communicate()


def selections(workers: dict[str, Worker], ratio: float, case: int, prompts: int) -> dict[str, Any]:
    """Agreement and bytes of one case at one ratio."""
    found, held = [], {}
    for prompt in range(prompts):
        workers["theirs"].ask("reference", prompt, case)
        kept = {}
        for side, worker in workers.items():
            worker.ask("select", case, ratio)
            worker.ask("prefill", prompt)
            kept[side], held[side] = worker.ask("kept")
        found.append(agreement(kept["ours"], kept["theirs"]))
    return summary(found) | {"held": held}


def overheads(
    workers: dict[str, Worker], names: list[tuple[int, float]], length: int, rounds: int
) -> dict[tuple[str, str, tuple[int, float]], Ratio]:
    """Over the bare model of the same environment, by ("prefill" or "step", side, (case, ratio)); CPU time.

    All take turns, and right beside each stands the bare run that it is compared with: of a step the one whose prompt
    was as short as what the method keeps.
    """

    def clock() -> float:
        return sum(worker.ask("clock") for worker in workers.values())

    def candidate(worker: Worker, what: str, choice: tuple[Any, ...], rows: int) -> Candidate:
        def before() -> None:
            worker.ask("select", *choice)
            if what == "step":
                worker.ask("prefill", 0, rows)
            worker.ask("collect")

        return Candidate(
            (lambda: worker.ask("steps", STEPS)) if what == "step" else lambda: worker.ask("prefill", 0), before
        )

    candidates = {}
    for side, worker in workers.items():
        for name in names:
            kept = round(length * (1 - name[1]))
            for what, rows in (("prefill", length), ("step", kept)):
                candidates[what, side, name, "bare"] = candidate(worker, what, (None,), rows)
                candidates[what, side, name, "ours"] = candidate(worker, what, name, length)
    seconds = interleave(candidates, rounds=rounds, warmup=1, clock=clock)
    keys = [key[:3] for key in candidates if key[3] == "bare"]
    return {key: Ratio.of(seconds[(*key, "ours")], seconds[(*key, "bare")]) for key in keys}


def measure(
    workers: dict[str, Worker], names: list[tuple[int, float]], length: int, prompts: int, rounds: int
) -> dict[str, Any]:
    """Everything, as it goes into the JSON file; `names` are numbers of cases, and ratios."""
    bare, full = {}, {}
    for side, worker in workers.items():
        worker.ask("select", None)
        worker.ask("prefill", 0)
        bare[side], full[side] = worker.ask("keys"), worker.ask("storages")
    times = overheads(workers, names, length, rounds)
    rows = []
    for number, ratio in names:
        case = CASES[number]
        row = {"case": case.name, "ratio": ratio, "why": case.why} | selections(workers, ratio, number, prompts)
        held = row.pop("held")
        row["bytes"] = {side: held[side] / full[side] for side in workers}
        for what in ("prefill", "step"):
            row[what] = {side: asdict(times[what, side, (number, ratio)]) for side in workers}
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    versions = {side: worker.ask("versions") for side, worker in workers.items()}
    hardware = record("cpu") | {"threads": 1}  # of the workers
    return {"record": hardware, "versions": versions, "bare_keys": bare, "full_bytes": full, "rows": rows}


def markdown(found: dict[str, Any], settings: str) -> str:
    """The page that goes with the JSON file."""
    theirs, where = found["versions"]["theirs"], found["record"]
    whys = {row["case"]: row["why"] for row in found["rows"] if row["why"]}
    return "\n".join(
        [
            f"# Side by side with kvpress {theirs['kvpress']}",
            "",
            f"Random LLaMA, {settings}; {where['cpu']}, one thread, CPU time, torch {theirs['torch']}; transformers "
            f"{found['versions']['ours']['transformers']} here, {theirs['transformers']} there. "
            "`benchmarks/peers/README.md` says how it was made and what the columns are.",
            "",
            table(found["rows"]),
            "",
            *(f"- {name}: {why}." for name, why in whys.items()),
            "",
        ]
    )


def main(
    out: Annotated[Path, typer.Option(help="Results: this name with .json and .md.")],
    ratios: Annotated[str, typer.Option(help="Fractions removed, comma-separated.")] = "0.5,0.75",
    cases: Annotated[str, typer.Option(help="Names of cases, comma-separated; all of cases.py by default.")] = "",
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1024,
    prompts: Annotated[int, typer.Option(help="Prompts whose kept entries are compared; the first is timed.")] = 3,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 15,
    env: Annotated[Path, typer.Option(help="Where the environment of kvpress is kept.")] = CACHE / PEER,
) -> None:
    """Kept entries, resident bytes and time of the same methods here and in kvpress."""
    known = [case.name for case in CASES]
    wanted = cases.split(",") if cases else known
    if unknown := sorted(set(wanted) - set(known)):
        raise typer.BadParameter(f"--cases: {unknown} are none of {known}")
    names = [(known.index(name), float(ratio)) for name in wanted for ratio in ratios.split(",")]
    python = environment(env)
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), length, prompts)
        workers = {"ours": Worker(sys.executable, "ours", Path(name)), "theirs": Worker(python, "theirs", Path(name))}
        try:
            found = measure(workers, names, length, prompts, rounds)
        finally:
            for worker in workers.values():
                worker.close()
    settings = f"{length} tokens, {prompts} prompts, {rounds} rounds"
    found |= {"date": datetime.date.today().isoformat(), "settings": settings}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(found, settings))


if __name__ == "__main__":
    typer.run(main)
