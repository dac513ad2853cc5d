"""What the commands of `hf-compress` have in common: output that any terminal can show, mistakes told in one line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from hf_compress.plugin import load
from hf_compress.screen import one_line, readable


class Commands(TyperGroup):
    """Commands whose wrong values and broken paths end with one line and exit status 2, not with a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        readable()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # whoever read the output has seen enough
            raise
        except (ValueError, OSError, ImportError) as error:
            typer.echo(f"Error: {one_line(error)}", err=True)
            raise typer.Exit(2) from error


def plugins(paths: list[Path] | None) -> list[Path] | None:
    """What `--plugin` calls: the files are read before the names of methods are looked at."""
    for path in paths or ():
        try:
            load(path)
        except ValueError as error:
            raise typer.BadParameter(one_line(error), param_hint="--plugin") from error
    return paths


def new(help: str, **options: Any) -> typer.Typer:
    """An application of such commands; its help is plain text, which wraps at any width."""
    return typer.Typer(
        cls=Commands, help=help, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, **options
    )


def quiet(model: str = "demo:") -> None:
    """No progress bars of other packages inside ours, and none at all where no terminal shows them.

    Fetching and reading the weights of a `model` that does not ship with the package takes long: their bars stay.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; not every bar has a switch of its own
    import datasets
    import transformers

    datasets.disable_progress_bars()
    if model.startswith("demo:") or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # those of the hub, too
