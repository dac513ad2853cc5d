"""`hf-compress bench`: what compression costs and gains, as ratios to native runs. Heavy imports stay inside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_compress import command

if TYPE_CHECKING:
    from hf_compress.bench.models import Subject

app = command.new("Compressed runs against native runs of equal length, as ratios.")

MODELS = "Comma-separated: demo, mid, qwen, text, wide, tiny, tiny_qwen, tiny_text, or paths or hub names of models."
Models = Annotated[str, typer.Option("--model", help=MODELS)]
Methods = Annotated[str, typer.Option(help="Comma-separated: name, name:knob=value, stage; default: all that fit.")]
Ratios = Annotated[str, typer.Option(help="Fractions removed, comma-separated.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed rounds; medians are taken over them.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch; default: torch's own.")]
Clock = Annotated[str, typer.Option(help="wall, or cpu: CPU time, for one thread on a shared machine.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; default: the model's own.")]
Json = Annotated[Path | None, typer.Option("--json", help="Add the run, with hardware and versions, to this file.")]
Length = Annotated[int | None, typer.Option(min=8, help="Tokens of the prompt, for text models.")]


@app.callback()
def main() -> None:
    """Compressed runs against native runs of equal length, as ratios."""


class Bench:
    """What the commands share: the settings of a run, where its rows go, what is printed.

    Raises:
        BadParameter: a setting is wrong.
    """

    def __init__(self, path: Path | None, threads: int | None, clock: str, device: str = "cpu", dtype: str = ""):
        import torch
        from rich.console import Console

        from hf_compress.bench.results import File
        from hf_compress.bench.timing import CLOCKS, record

        if threads is not None:
            torch.set_num_threads(threads)
        if clock not in CLOCKS or (clock == "cpu" and (torch.get_num_threads() > 1 or device != "cpu")):
            raise typer.BadParameter(f"--clock {clock!r}: choose wall, or cpu together with --threads 1 on the CPU")
        self.console, self.clock, self.device, self.dtype = Console(), clock, device, dtype
        try:
            torch.device(device)
            self.file = File(path)
        except (RuntimeError, ValueError) as error:
            raise typer.BadParameter(str(error)) from error
        self.record = record(device) | {"clock": clock}
        if device.startswith("cuda"):  # cuDNN plans anew for every length: a growing cache would time its planning
            torch.backends.cuda.enable_cudnn_sdp(False)
            self.record["sdpa"] = "without cuDNN"
        self.console.print(", ".join(f"{k} {v}" for k, v in self.record.items()))

    def subjects(self, names: str, length: int | None = None) -> Iterable[Subject]:
        """The models, one after the other."""
        from hf_compress.bench.models import SUBJECTS, TEXT, load

        for name in names.split(","):
            try:
                sized = length if name in TEXT or name not in SUBJECTS else None
                yield load(name, device=self.device, dtype=self.dtype or None, length=sized)
            except (OSError, ValueError) as error:
                known = ", ".join(SUBJECTS)
                raise typer.BadParameter(f"--model {name!r}: {error}; or choose of {known}") from error

    def run(
        self, what: str, subject: Subject, parts: Iterable[Sequence[Any]], *, more: bool = False, **about: Any
    ) -> list[Any]:
        """Collect rows part by part into the file, then print them. With `more` every part replaces the one before."""
        from hf_compress.bench.results import table, title

        run = self.file.begin(what, self.record, subject=subject.about(), **about)
        rows: list[Any] = []
        for part in parts:
            rows = list(part) if more else [*rows, *part]
            run["rows"] = [row.as_dict() for row in rows]
            self.file.save()
        table(what, run["rows"], title(run)).print(self.console)
        return rows


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--ratios {text!r}: pass numbers between 0 and 1, like .5,.75") from error


def _counts(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise typer.BadParameter(f"{option} {text!r}: pass whole numbers of 1 or more, comma-separated")
    return [int(part) for part in parts]


def _methods(text: str, subject: Subject, *stages: str) -> list[str]:
    """The named methods, or all of these stages (of a named one) that the model of the subject can have."""
    from hf_compress import registry
    from hf_compress.patches.registry import adapter_for

    adapter = adapter_for(subject.model)

    def fits(spec: registry.Spec) -> bool:
        return spec.stage in stages and spec.stage in adapter.stages and spec.needs <= adapter.gives

    if not text:
        return [name for name, spec in registry.methods().items() if fits(spec)]
    names: list[str] = []
    for part in text.split(","):  # a comma also separates the knobs of one method
        if "=" in part and ":" not in part and names:
            names[-1] += f",{part}"
        elif part in stages:
            names += [name for name, spec in registry.methods(part).items() if fits(spec)]
        else:
            names.append(part)
    try:
        wrong = [n for n in names if not fits(registry.get(n.partition(":")[0]))]
    except ValueError as error:
        raise typer.BadParameter(f"--methods: {error}") from error
    if wrong:
        model = type(subject.model).__name__
        raise typer.BadParameter(
            f"--methods {wrong}: not on {model}, or not for this measurement ({', '.join(stages)})"
        )
    return names


@app.command()
def parity(
    model: Models = "demo,mid",
    methods: Methods = "",
    ratios: Ratios = ".5,.75,.89",
    rounds: Rounds = 12,
    threads: Threads = None,
    clock: Clock = "wall",
    device: Device = "cpu",
    dtype: Dtype = "",
    length: Length = None,
    decode: Annotated[bool, typer.Option(help="Time decode steps too.")] = True,
    path: Json = None,
) -> None:
    """Prefill and decode step of every method over native ones of equal length; the vision tower is in neither."""
    wanted, bench = _numbers(ratios), Bench(path, threads, clock, device, dtype)
    from hf_compress.bench.limits import OWN, SCORING
    from hf_compress.bench.parity import LIMITS, measure

    for subject in bench.subjects(model, length):
        names = _methods(methods, subject, "vision", "decoder", "cache")
        parts = (measure(subject, name, wanted, rounds=rounds, decode=decode, clock=clock) for name in names)
        bench.run("parity", subject, parts, rounds=rounds, limits=LIMITS | {"scoring": SCORING | OWN})


@app.command()
def cache(
    model: Models = "text",
    methods: Methods = "",
    ratios: Ratios = ".5,.8",
    rounds: Rounds = 5,
    steps: Annotated[int, typer.Option(min=1, help="Timed rounds of decode steps.")] = 40,
    batch: Annotated[str, typer.Option(help="Batch sizes of the decode steps, comma-separated.")] = "1,8",
    threads: Threads = None,
    clock: Clock = "wall",
    device: Device = "cpu",
    dtype: Dtype = "",
    length: Length = None,
    path: Json = None,
) -> None:
    """Cache methods: what the prompt pays, a decode step over a native one of equal length, bytes over the promise."""
    wanted, bench = _numbers(ratios), Bench(path, threads, clock, device, dtype)
    from hf_compress.bench.cache import BYTES, STEP, measure
    from hf_compress.bench.limits import OWN, SCORING

    sizes = _counts("--batch", batch)
    for subject in bench.subjects(model, length):
        pairs = [(m, r) for m in _methods(methods, subject, "cache") for r in wanted]
        parts = measure(subject, pairs, rounds=rounds, steps=steps, batches=sizes, clock=clock)
        limits = {"scoring": {"cache": SCORING["cache"]} | OWN, "step": STEP, "bytes": BYTES}
        bench.run("cache", subject, parts, rounds=rounds, steps=steps, limits=limits)


@app.command()
def peak(
    model: Models = "mid,qwen,text",
    methods: Methods = "",
    ratios: Ratios = ".7",
    threads: Threads = None,
    device: Device = "cpu",
    dtype: Dtype = "",
    length: Length = None,
    path: Json = None,
) -> None:
    """Peak memory of a compressed prefill over a native one of equal length and over the full one."""
    wanted, bench = _numbers(ratios), Bench(path, threads, "wall", device, dtype)
    from hf_compress.bench.peak import LIMITS, STATES, measure

    for subject in bench.subjects(model, length):
        names = _methods(methods, subject, "vision", "decoder", "cache")
        bench.run("peak", subject, measure(subject, names, wanted), limits=LIMITS | {"vision": STATES})


@app.command()
def batch(
    model: Models = "mid,qwen,text",
    methods: Methods = "",
    ratios: Ratios = ".7",
    rounds: Rounds = 3,
    size: Annotated[int, typer.Option(min=2, help="Samples of the batch.")] = 4,
    threads: Threads = None,
    clock: Clock = "wall",
    device: Device = "cpu",
    dtype: Dtype = "",
    length: Length = None,
    path: Json = None,
) -> None:
    """A padded batch against its samples one by one: kept sets, logits, time."""
    wanted, bench = _numbers(ratios), Bench(path, threads, clock, device, dtype)
    from hf_compress.bench.batch import CLOSE, SAME, TIME, measure

    for subject in bench.subjects(model, length):
        names = _methods(methods, subject, "vision", "decoder", "cache")
        parts = (measure(subject, name, wanted, batch=size, rounds=rounds, clock=clock) for name in names)
        limits = {"same": SAME, "logits": CLOSE[subject.model.dtype], "time": TIME}
        bench.run("batch", subject, parts, rounds=rounds, limits=limits)


@app.command()
def train(
    model: Models = "mid,qwen",
    methods: Methods = "",
    ratios: Ratios = ".7",
    rounds: Rounds = 6,
    threads: Threads = None,
    clock: Clock = "wall",
    device: Device = "cpu",
    dtype: Dtype = "",
    path: Json = None,
) -> None:
    """Forward and backward with compressed tokens over a natively short step with the same labels, and their memory."""
    wanted, bench = _numbers(ratios), Bench(path, threads, clock, device, dtype)
    from hf_compress.bench.train import LIMITS, MOST, measure

    for subject in bench.subjects(model):
        names = _methods(methods, subject, "vision", "decoder")
        parts = (measure(subject, name, wanted, rounds=rounds, clock=clock) for name in names)
        bench.run("train", subject, parts, rounds=rounds, limits=LIMITS | {"peak": MOST})


@app.command()
def growth(
    stages: Annotated[str, typer.Option(help="llava and qwen: vision methods of these; cache.")] = "llava,qwen,cache",
    methods: Methods = "",
    ratio: Annotated[float, typer.Option(help="Fraction removed.")] = 0.75,
    sizes: Annotated[str, typer.Option(help="Tokens, comma-separated; squares for vision. Default: up to 16384.")] = "",
    rounds: Rounds = 2,
    threads: Threads = None,
    clock: Clock = "wall",
    path: Json = None,
    picture: Annotated[Path | None, typer.Option(help="Write the curves of all stages to this file (png).")] = None,
) -> None:
    """Time and peak memory of the decision alone against the number of tokens."""
    bench = Bench(path, threads, clock)
    from hf_compress.bench.growth import MEMORY, SIZES, measure, subject_for
    from hf_compress.bench.growth import picture as draw

    rows: list[Any] = []
    for stage in stages.split(","):
        if stage not in ("llava", "qwen", "cache"):
            raise typer.BadParameter(f"--stages {stage!r}: choose of llava, qwen, cache")
        kind = "cache" if stage == "cache" else "vision"
        wanted = _counts("--sizes", sizes) if sizes else list(SIZES[stage])
        subject = subject_for(kind, stage, wanted[0])
        names = _methods(methods, subject, kind)
        parts = measure(names, sizes=wanted, architecture=stage, ratio=ratio, rounds=rounds, clock=clock)
        rows += bench.run("growth", subject, parts, more=True, rounds=rounds, limits={"memory": MEMORY})
        if picture is not None:
            draw([row.as_dict() for row in rows], picture)


@app.command("all")
def everything(
    path: Annotated[Path, typer.Option("--json", help="File of results.")],
    threads: Threads = None,
    clock: Clock = "wall",
    device: Device = "cpu",
    dtype: Dtype = "",
    model: Annotated[str, typer.Option(help="One model for all; default: the random models of each command.")] = "",
    quick: Annotated[bool, typer.Option(help="Tiny models, one round: shows that all commands run.")] = False,
) -> None:
    """All measurements into one file, a picture and a page beside it."""
    common: dict[str, Any] = {"threads": threads, "path": path}
    where = common | {"device": device, "dtype": dtype}
    few: dict[str, Any] = {"rounds": 1} if quick else {}
    sees, reads = ("tiny,tiny_qwen", "tiny_text") if quick else (model or "mid,qwen", model or "text")
    for names, stages in ((sees, "vision,decoder"), (reads, "cache")):
        if stages == "cache":
            cache(model=names, clock=clock, **where, **few)
        else:
            parity(model=names, methods=stages, clock=clock, **where, **few)
            train(model=names, methods=stages, clock=clock, **where, **few)
        peak(model=names, methods=stages, **where)
        batch(model=names, methods=stages, clock=clock, **where, **few)
    growth(sizes="36,64,144" if quick else "", clock=clock, picture=path.with_suffix(".png"), **common, **few)
    show(path, path.with_suffix(".md"))


@app.command("table")
def show(
    path: Annotated[Path, typer.Argument(help="A file of results.")],
    markdown: Annotated[Path | None, typer.Option(help="Write the newest runs as a page to this file.")] = None,
) -> None:
    """Print a file of results; with --markdown also write its newest runs as a page."""
    from rich.console import Console

    from hf_compress.bench.results import page, read, tables

    runs = read(path)
    console = Console()
    for table in tables(runs):
        table.print(console)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(page(runs, f"hf-compress bench table {path} --markdown {markdown}"), encoding="utf-8")


if __name__ == "__main__":
    app()
