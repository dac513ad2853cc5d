"""Commands that use a model on something of the user's own: a picture, a file, a conversation."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_compress.command import quiet

Model = Annotated[
    str, typer.Option(help="demo:llava, demo:qwen, demo:video, demo:recall, demo:facts, a folder, or a hub name.")
]
Method = Annotated[str, typer.Option(help="A name; + composes, : sets a knob: fastv:layer=1+snapkv; none: bare.")]
Ratio = Annotated[float, typer.Option(help="Fraction removed, 0 <= ratio < 1.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ... Default: an accelerator where there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, ... Default: of the checkpoint.")]


def loaded(model: str, method: str, ratio: float, device: str, dtype: str) -> tuple[Any, Any]:
    """The compressed model and its processor.

    Raises:
        ValueError: what `config_of` raises, the device or dtype is none, the model cannot be loaded, or the method
            cannot act on it.
    """
    from hf_compress.evaluate.models import check_place, config_of, load_model

    config = config_of(model, method, ratio)  # what is wrong is said before anything is loaded
    quiet(model)
    from hf_compress.evaluate.processes import default_device, join_processes

    check_place(device or None, dtype or None)
    found, processor = load_model(model, device or default_device(join_processes()), dtype or None)
    if config is not None:
        found.compress(config)
    return found, processor


def picture(path: Path) -> Any:
    """A picture as a person sees it.

    Raises:
        ValueError: it cannot be read.
    """
    from hf_compress.pictures import content, decode

    raw = content(path)
    try:
        return decode(raw)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def words(path: Path) -> str:
    """A text in UTF-8.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"file={str(path)!r} is no text in UTF-8 ({error})") from error
    except OSError as error:
        raise ValueError(f"file={str(path)!r} cannot be read ({error.strerror})") from error


def check_free(host: str, port: int) -> None:
    """Raises ValueError where nothing can listen at a port."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise ValueError(f"port={port} of host={host!r} is not to be had ({error.strerror}); name another") from error


def show(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    model: Model = "demo:llava",
    method: Method = "fastervlm",
    ratio: Ratio = 0.75,
    question: Annotated[str, typer.Option(help="The text behind the picture; some methods follow it.")] = "describe",
    layers: Annotated[bool, typer.Option("--layers", help="A panel for every set of tokens that layers see.")] = False,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("kept.png"),
    device: Device = "",
    dtype: Dtype = "",
) -> None:
    """Draw which visual tokens of a picture a method keeps, merges and drops."""
    if out.suffix.lower() != ".png":
        raise typer.BadParameter(f"{out} is no name of a PNG, which is what is written", param_hint="--out")
    shown = picture(image)
    from hf_compress.evaluate.models import check_pictures, config_of
    from hf_compress.saving import prepare, replaced

    if config_of(model, method, ratio) is None:
        raise typer.BadParameter("none keeps everything; name a method", param_hint="--method")
    prepare(out.parent)
    found, processor = loaded(model, method, ratio, device, dtype)
    check_pictures(model, processor)
    import torch

    from hf_compress.evaluate.prompts import encode_rows

    with torch.inference_mode():
        found(**encode_rows(processor, [0], [question], [shown]).inputs.to(found.device), logits_to_keep=1)
    drawn = found.compression.show(shown, processor, layers=layers)
    with replaced(out) as new:
        drawn.save(new, "png")
    last = found.compression.last
    typer.echo(f"{found.compression.config.summary()}: {sum(map(sum, last.visual_tokens))} visual tokens, ", nl=False)
    typer.echo(f"{sum(map(sum, last.visual_left))} enter the language model; wrote {out}")


def chat(
    image: Annotated[list[Path] | None, typer.Option(help="A picture to talk about; repeatable.")] = None,
    file: Annotated[Path | None, typer.Option(help="A text to talk about.")] = None,
    model: Model = "demo:llava",
    method: Annotated[
        str, typer.Option(help="As of show. Default: divprune for pictures, kvzip for a text: questions come later.")
    ] = "",
    ratio: Ratio = 0.75,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 256,
    device: Device = "",
    dtype: Dtype = "",
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON a turn.")] = False,
) -> None:
    """Talk about a picture or a text with a compressed model: a line a question, an empty one or Ctrl-D ends.

    What a method has dropped in the first turn stays dropped. Tokens and time stand behind every answer.
    """
    if bool(image) == bool(file):
        raise typer.BadParameter("name what to talk about: pictures, or one text", param_hint="--image / --file")
    about = [picture(path) for path in image] if image else words(file)  # type: ignore[arg-type]
    method = method or ("divprune" if image else "kvzip")
    found, processor = loaded(model, method, ratio, device, dtype)
    from hf_compress.chat import Chat
    from hf_compress.evaluate.models import check_pictures

    if image:
        check_pictures(model, processor)

    talk, interactive = Chat(found, processor, about, max_new_tokens), sys.stdin.isatty() and not as_json
    name = "uncompressed" if found.compression is None else found.compression.config.summary()
    typer.echo(f"{type(found).__name__}, {name}", err=True)
    while question := _question(interactive):
        turn = talk.ask(question, None if as_json else lambda text: typer.echo(text, nl=False))
        if as_json:
            typer.echo(json.dumps({"question": question, **asdict(turn)}))
        else:
            typer.echo("")
            typer.echo(f"  [{turn}]", err=True)


def serve(
    model: Model = "demo:llava",
    method: Method = "divprune",
    ratio: Ratio = 0.75,
    host: Annotated[str, typer.Option(help="Where it listens.")] = "localhost",
    port: Annotated[int, typer.Option(help="Where it listens.", min=0, max=65535)] = 8000,
    device: Device = "",
    dtype: Dtype = "",
) -> None:
    """Serve a compressed model by the server of transformers: /v1/chat/completions and the like, until Ctrl-C.

    Needs `pip install "hf-compress[serve]"`. Clients name the model as it is named here, a folder by its last part.
    """
    from hf_compress.evaluate.models import config_of

    config = config_of(model, method, ratio)
    check_free(host, port)
    import os
    from tempfile import TemporaryDirectory

    from hf_compress.serve import check_installed, dressed, place_of, server

    check_installed()  # before anything is fetched
    checkpoint = place_of(model)
    with TemporaryDirectory() as folder:
        name = checkpoint.name if Path(model).is_dir() else model
        dressed(checkpoint, Path(folder) / name, config)
        os.chdir(folder)  # so that the name of the folder is the one of the model
        how = "uncompressed" if config is None else config.summary()
        typer.echo(f"{name}, {how}, at http://{host}:{port}/v1", err=True)
        server(Path(name), host=host, port=port, device=device or "auto", dtype=dtype or "auto")


def app(
    model: Model = "demo:llava",
    image: Annotated[Path | None, typer.Option(help="The picture to begin with. Default: a scene of the demo.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 64,
    host: Annotated[str, typer.Option(help="Where it listens.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Where it listens. Default: the first free one from 7860 on.")
    ] = None,
    device: Device = "",
    dtype: Dtype = "",
) -> None:
    """A page in the browser: a picture, a question, a method, a ratio; both answers, tokens and time side by side.

    Needs `pip install "hf-compress[app]"`.
    """
    from hf_compress.app import Studio, gradio, page

    gradio()  # what keeps it from opening is said before anything is loaded
    if port is not None:
        check_free(host, port)
    shown, question = (picture(image), "What is in this picture?") if image else (None, "")
    found, processor = loaded(model, "none", 0.0, device, dtype)
    if shown is None:
        from hf_compress.demo.dataset import load_scenes

        row = load_scenes("test", images=2, questions=1)[1]
        shown, question = row["image"], row["question"]
    opened = page(Studio(model, found, processor, max_new_tokens), shown, question)
    _, address, _ = opened.launch(
        server_name=host, server_port=port, show_error=True, quiet=True, prevent_thread_lock=True
    )
    typer.echo(f"{model} at {address}", err=True)
    opened.block_thread()


def _question(interactive: bool) -> str:
    """The next line of the user; "" at the end."""
    if interactive:
        typer.echo("> ", nl=False)
    return sys.stdin.readline().strip()
