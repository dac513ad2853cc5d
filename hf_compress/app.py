"""A page to try methods on a picture of one's own: what stays, both answers, tokens and time, side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_compress.api import compressed
from hf_compress.chat import Chat, Turn
from hf_compress.evaluate.judge import everything
from hf_compress.evaluate.models import check_pictures, config_of
from hf_compress.pictures import as_seen

COLUMNS = ["", "uncompressed", "compressed"]
MODEL = "model"  # one at a time has it: a click, or a page that opens


def gradio() -> Any:
    """The module.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import gradio as module
    except ImportError as error:
        raise ValueError("gradio is not installed; pip install 'hf-compress[app]'") from error
    return module


@dataclass
class Studio:
    """A model that answers bare and compressed.

    Attributes:
        name: of the model, as it was loaded.
        model, processor: not compressed, and not changed.
        max_new_tokens: of an answer.

    Raises:
        ValueError: the model reads no pictures.
    """

    name: str
    model: Any
    processor: Any
    max_new_tokens: int = 64
    _warm: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_pictures(self.name, self.processor)

    def methods(self) -> list[str]:
        """Those that can act on the model as they are, none before one whose name its own contains.

        A list that is filtered by what is typed offers the first that contains it: "fastv" is not to be "fastvid".
        """
        names = everything(self.model, None)[0]
        return sorted(names, key=lambda name: sum(other in name for other in names))

    def compare(self, image: Any, question: str, method: str, ratio: float) -> tuple[Any, str, str, list[list[str]]]:
        """The picture of what stays, both answers, and what they took; `COLUMNS`.

        Args:
            image: a PIL image; question: about it.
            method, ratio: see `hf_compress.compress`; methods are named as on the command line.

        Raises:
            ValueError: there is no image or no question, or the method refuses.
        """
        if image is None:
            raise ValueError("image: choose a picture first")
        if (config := config_of(self.name, method, float(ratio))) is None:
            raise ValueError(f"method={method!r} compresses nothing; choose one that does")
        image = as_seen(image)
        if not self._warm:  # whatever a process does for the first time is not to count as the model's
            self._ask(image, question, 1)
            self._warm = True
        bare = self._ask(image, question)
        with compressed(self.model, config):
            found = self._ask(image, question)
            compression = self.model.compression
            acts = set(compression.context.stages)
            cache_only = acts == {"cache"}
            picture = compression.show_cache() if cache_only else compression.show(image, self.processor)
            full = compression.last.full_cache_bytes
        visual = f"{found.visual} -> {found.kept}" if found.visual else "-"
        rows = [
            ["method", "-", config.summary()],
            ["visual tokens that enter", str(found.visual or "-"), visual],
            ["bytes of the cache", _bytes(full), _bytes(found.kv_bytes)],
            ["first token, s", f"{bare.first:.3f}", f"{found.first:.3f}"],
            ["all tokens, s", f"{bare.total:.3f}", f"{found.total:.3f}"],
            ["tokens of the answer", str(bare.length), str(found.length)],
        ]
        return picture, bare.answer, found.answer, rows

    def _ask(self, image: Any, question: str, most: int | None = None) -> Turn:
        return Chat(self.model, self.processor, [image], most or self.max_new_tokens).ask(question)


def _bytes(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def page(studio: Studio, image: Any = None, question: str = "What is in this picture?") -> Any:
    """The page, a `gradio.Blocks`; where there is an image to begin with it opens with the result for it.

    Raises:
        ValueError: gradio is not installed.
    """
    ui = gradio()

    def compare(*values: Any) -> Any:
        try:
            return studio.compare(*values)
        except (ValueError, NotImplementedError) as error:  # what a method refuses is no failure of the page
            raise ui.Error(str(error), print_exception=False) from error

    with ui.Blocks(title="hf-compress", analytics_enabled=False) as found:
        ui.Markdown(f"# hf-compress\n`{studio.name}`, uncompressed beside compressed, by the same question.")
        with ui.Row():
            with ui.Column(scale=1):
                shown = ui.Image(image, type="pil", image_mode=None, label="picture", height=260)
                asked = ui.Textbox(question, label="question")
                names = studio.methods()
                first = "divprune" if "divprune" in names else names[0]
                method = ui.Dropdown(names, value=first, label="method", allow_custom_value=True)
                ratio = ui.Slider(0, 0.98, 0.75, step=0.01, label="ratio: fraction removed")
                button = ui.Button("Ask both", variant="primary")
            with ui.Column(scale=2):
                kept = ui.Image(type="pil", label="what stays", show_label=False, buttons=["download", "fullscreen"])
                with ui.Row():
                    bare = ui.Textbox(label="uncompressed says")
                    short = ui.Textbox(label="compressed says")
                table = ui.Dataframe(headers=COLUMNS, label="what it took", wrap=True)
        inputs, outputs = [shown, asked, method, ratio], [kept, bare, short, table]
        button.click(compare, inputs, outputs, api_name="compare", concurrency_id=MODEL)
        if image is not None:
            found.load(compare, inputs, outputs, concurrency_id=MODEL)
    return found
