"""The judge: many methods at many ratios, their controls and the uncompressed model, on the same questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from tqdm import tqdm

from hf_compress import registry
from hf_compress.api import compress, decompress
from hf_compress.evaluate.identity import made_by
from hf_compress.evaluate.metrics import load_metric, score_answers
from hf_compress.evaluate.models import DEMO_KNOBS, check_place, load_model
from hf_compress.evaluate.plan import BARE, RATIOS, Knobs, Run, plan
from hf_compress.evaluate.processes import default_device, join_processes, on_main
from hf_compress.evaluate.prompts import (
    PROTOCOLS,
    Batch,
    encode_rows,
    pictures_of,
    question_tokens,
    reply,
    tokenizer_of,
)
from hf_compress.evaluate.results import Results, collect
from hf_compress.evaluate.store import Records, claimed
from hf_compress.evaluate.tasks import Task, load_task
from hf_compress.evaluate.times import ROWS, time_run
from hf_compress.patches.registry import adapter_for
from hf_compress.pictures import Frames

PEOPLE = 10  # answers per question from which on the default metric is VQA accuracy
LENGTH = 16  # new tokens where the model's generation config says nothing
ALL = "all"  # methods: every one of the registry whose needs the model meets
CHUNK = 32  # batches that are encoded at a time; all methods see them before the next ones are


@dataclass
class Sweep:
    """A model, its questions, what is done to it, and where the answers go."""

    model: Any
    processor: Any
    task: Task
    runs: list[Run]
    records: Records
    protocol: str
    batch_size: int
    max_new_tokens: int

    def chunks(self) -> Iterator[list[list[int]]]:
        """Rows of the batches: the same whatever has been answered, and by however many processes.

        Within a chunk rows of like shape come together, so that little is padded; in two turns the second one feeds as
        many tokens to all rows of a batch.
        """
        size = CHUNK * self.batch_size
        for start in range(0, len(self.task), size):
            rows = list(range(start, min(start + size, len(self.task))))
            shape = dict(zip(rows, self._shapes(rows)))
            batches: list[list[int]] = []
            for row in sorted(rows, key=lambda r: (shape[r], r)):
                fits = batches and len(batches[-1]) < self.batch_size
                if fits and (self.protocol == "one-turn" or shape[batches[-1][0]][0] == shape[row][0]):
                    batches[-1].append(row)
                else:
                    batches.append([row])
            yield batches

    def _shapes(self, rows: list[int]) -> list[tuple[int, ...]]:
        questions, shown = [self.task.questions[r] for r in rows], self.task.shown(rows)
        sizes = [(len(s),) if isinstance(s, str) else sum((_size(p) for p in pictures_of(s)), ()) for s in shown]
        if self.protocol == "two-turn":
            later = question_tokens(self.processor, questions, shown)
            return [(tokens, *size) for tokens, size in zip(later, sizes)]
        asked = tokenizer_of(self.processor)(questions, add_special_tokens=False)["input_ids"]
        return [(*size, len(q)) for q, size in zip(asked, sizes)]

    def encode(self, rows: list[int]) -> Batch:
        """One batch, ready for the model.

        Raises:
            ValueError: the processor does not take one of the rows, which is named.
        """
        questions = [self.task.questions[r] for r in rows]
        try:
            return encode_rows(self.processor, rows, questions, self.task.shown(rows), self.protocol)
        except ValueError as error:
            if len(rows) == 1:
                raise ValueError(f"{self.task.places[rows[0]]} cannot be asked: {error}") from error
            for row in rows:
                self.encode([row])
            raise

    def run(self, timed: bool, state: Any, progress: bool) -> None:
        """Answer everything, and time everything if so wanted; what a method refuses is recorded."""
        hidden = None if progress and state.is_main_process else True  # None: shown on a terminal, quiet when piped
        total = len(self.runs) * len(self.task)
        with tqdm(total=total, unit=" questions", disable=hidden, smoothing=0.05) as bar:
            refused = self.answer_all(state, bar)
        if timed and state.is_main_process:
            with tqdm(total=len(self.runs), unit=" runs", disable=hidden) as bar:
                self.time_all(refused, bar)
        state.wait_for_everyone()

    def answer_all(self, state: Any, progress: Any) -> set[str]:
        """Ask whatever has no answer yet; returns the runs that a method refused."""
        refused: set[str] = set()
        for chunk in self.chunks():
            ready: dict[int, Batch] = {}
            for run in self.runs:
                progress.set_description(run.key.split("|{")[0][:40])
                open_ = [i for i, rows in enumerate(chunk) if self.records.answers.lacking(run.key, rows)]
                if run.key not in refused and open_:
                    reason = self._answer(run, chunk, open_, ready, state)
                    if reason:
                        refused.add(run.key)
                        self.records.reasons.append([{"run": run.key, "reason": reason}])
                progress.update(sum(map(len, chunk)))
        return refused

    def _answer(self, run: Run, chunk: list[list[int]], open_: list[int], ready: dict[int, Batch], state: Any) -> str:
        """One run on the open batches of a chunk, dealt to the processes in turn; "" or why it is refused."""
        reason = ""
        try:
            if run.method != BARE:
                compress(self.model, run.config(), weights=run.weights)
        except ValueError as error:
            return str(error)
        try:
            for step in range(0, len(open_), state.num_processes):
                found: list[dict[str, Any]] = []
                mine = step + state.process_index
                if mine < len(open_):
                    i = open_[mine]
                    if i not in ready:
                        ready[i] = self.encode(chunk[i])
                    try:
                        found = reply(self.model, self.processor, ready[i], self.max_new_tokens)
                    except (ValueError, NotImplementedError) as error:  # a budget that this prompt puts out of reach
                        if run.method == BARE:
                            raise
                        reason = str(error)
                gathered = gather_object([(reason, found)])
                reason = next((why for why, _ in gathered if why), "")
                if reason:
                    return reason
                records = [{"run": run.key, **record} for _, part in gathered for record in part]
                self.records.answers.append(records)
        finally:
            if run.method != BARE:
                decompress(self.model)
        return ""

    def time_all(self, refused: set[str], progress: Any) -> None:
        """Time every run that has no times yet, one seed of each."""
        times = self.records.times
        seen: set[tuple[str, float | None]] = set()
        batch = self.encode(next(self.chunks())[0][:ROWS])
        for run in self.runs:
            progress.set_description(f"time {run.key.split('|{')[0]}"[:40])
            first = (run.method, run.ratio) not in seen
            seen.add((run.method, run.ratio))
            if first and run.method != BARE and run.key not in refused and times.lacking(run.key, [0]):
                try:
                    times.append([{"run": run.key, **time_run(self.model, run, batch)}])
                except (ValueError, NotImplementedError) as error:  # this batch puts its budget out of reach
                    times.append([{"run": run.key, "note": str(error)}])
            progress.update(1)


def sweep(
    model: Any,
    data: Any,
    methods: Sequence[str] | str = "all",
    ratios: Sequence[float] = RATIOS,
    *,
    out: str | Path,
    processor: Any = None,
    limit: int | None = None,
    split: str = "test",
    on_error: str = "raise",
    knobs: Knobs | None = None,
    weights: Mapping[str, str | PathLike[str]] | None = None,
    protocol: str = "one-turn",
    metric: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    device: Any = None,
    dtype: Any = None,
    timed: bool = True,
    progress: bool = True,
) -> Results:
    """Compare methods on the same questions, with the controls at equal budget and the uncompressed model beside them.

    Every answer is one line of `out`/answers.jsonl, written at once: call it again after a stop and it goes on. More
    methods, ratios and knobs may be added to a folder. Whatever else acts on answers may not change: questions, images
    and texts by content, weights, config, processor, template, generation config, device, versions of the libraries
    (`hf_compress.evaluate.identity`). Processes that torchrun or accelerate started together share the batches, on
    accelerators or on the CPU; the answers are the same.

    Args:
        model: a name ("demo:llava", "demo:recall"), a folder, a name on a hub, or a model object; it is not compressed
            then, and not changed.
        data: what `hf_compress.evaluate.tasks.load_task` takes, or a `Task`.
        methods: names; a plus sign composes, a colon adds knobs ("fastv:layer=1"). "all", also beside compositions:
            every method of the registry whose needs the model meets.
        ratios: fractions removed; compositions remove it in each of their stages.
        out: folder for answers, results.json, leaderboard.csv, leaderboard.md and pareto.png.
        processor: of a model object; of a text model its tokenizer.
        limit: the first so many questions.
        split: of data that has several.
        on_error: "raise" or "skip": what becomes of rows that cannot be asked, see `load_task`.
        knobs: {"method": {"knob": value}} for all uses of a method. Built-in models have fastv cut before layer 1.
        weights: {"method": folder} of methods that are trained, as `model.compression.save` wrote them; they count by
            content. Those that need weights and get none are refused.
        protocol: "one-turn", the question inside the prompt; "two-turn", after the cache is compressed.
        metric: one of `hf_compress.evaluate.metrics.METRICS`; by default vqa_accuracy where the questions have ten
            answers, else exact_match. "contains" is for models that answer in sentences.
        batch_size: questions per call of `generate`.
        max_new_tokens: by default what the model's generation config says, or 16. Answers that are cut there are
            counted.
        device: "cpu", "cuda", ...; by default where a model object is, and for a name an accelerator if there is one.
        dtype: of the weights of a model that is loaded by name: "float32", "bfloat16", "float16", or a `torch.dtype`.
        timed: measure prefill and decode times.
        progress: show a bar, on a terminal.

    Returns:
        the rows of the leaderboard; `print` shows it.

    Raises:
        ValueError: an argument is wrong, the metric cannot judge these references, or `out` holds answers given under
            other settings.
    """
    _check_options(model, processor, protocol, batch_size, device, dtype)
    title = _title(model)
    names = [methods] if isinstance(methods, str) else list(methods)
    knobs = {**(DEMO_KNOBS if title.startswith("demo:") else {}), **(knobs or {})}
    plan(
        [name for name in names if name != ALL] or ["random"], ratios, knobs, weights
    )  # what is wrong is said before loading
    if metric is not None:
        load_metric(metric)
    state, folder = join_processes(device), Path(out)
    with ExitStack() as stack:
        on_main(state, lambda: stack.enter_context(claimed(folder)))
        task = data if isinstance(data, Task) else load_task(data, limit, split, on_error=on_error)
        metric = metric or ("vqa_accuracy" if min(map(len, task.answers)) >= PEOPLE else "exact_match")
        score_answers(metric, [""] * len(task), task.answers)  # one that cannot judge these says so before all work
        model, processor = _place(model, processor, device, dtype, state)
        _check_model(model, processor, task)
        every, left_out = everything(model, weights) if ALL in names else ([], {})
        runs = plan([name for name in names if name != ALL] + every, ratios, knobs, weights, task.modality)
        _check_weights(model, runs)
        max_new_tokens = max_new_tokens or model.generation_config.max_new_tokens or LENGTH
        settings = {"model": title, "data": task.name, "questions": len(task), "fingerprint": task.fingerprint}
        settings["skipped"] = len(task.skipped)
        settings |= {"protocol": protocol, "batch_size": batch_size, "dtype": str(model.dtype).removeprefix("torch.")}
        settings |= {"max_new_tokens": max_new_tokens} | made_by(model, processor)
        records = Records.open(folder, settings, state)
        Sweep(model, processor, task, runs, records, protocol, batch_size, max_new_tokens).run(timed, state, progress)

        def end() -> Results:
            results = collect(task, runs, records, metric, settings, left_out, model.device)
            results.write(folder)
            return results

        return on_main(state, end)


def _size(picture: Any) -> tuple[int, ...]:
    """What like pictures have alike: width and height, of a video also how many frames it has."""
    return (*picture[0].size, len(picture)) if isinstance(picture, Frames) else picture.size


def _check_options(model: Any, processor: Any, protocol: str, batch_size: int, device: Any, dtype: Any) -> None:
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r} is not one of {', '.join(PROTOCOLS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; choose 1 or more")
    named = isinstance(model, (str, Path))
    if not named and processor is None:
        raise ValueError("processor=None: a model object needs its processor, or its tokenizer if it reads text only")
    if not named and dtype is not None:
        raise ValueError(f"dtype={dtype!r}: a model object has its own; call model.to({dtype}), or name the model")
    check_place(device, dtype)


def _title(model: Any) -> str:
    """Its name for records; what `load_demo` returned is called as the command line calls it."""
    from hf_compress import demo

    if isinstance(model, (str, Path)):
        return str(model)
    name = model.name_or_path or type(model).__name__
    return f"demo:{Path(name).name}" if Path(name).parent == Path(demo.__file__).parent else name


def _place(model: Any, processor: Any, device: Any, dtype: Any, state: Any) -> tuple[Any, Any]:
    """(model, processor) on the device where the questions are asked; loaded if the model is a name."""
    if isinstance(model, (str, Path)):
        with state.local_main_process_first():
            return load_model(str(model), device or default_device(state), dtype)
    return model if device is None else model.to(device), processor


def _check_model(model: Any, processor: Any, task: Task) -> None:
    """
    Raises:
        ValueError: the model cannot be asked.
    """
    if getattr(model, "compression", None) is not None:
        raise ValueError("model is compressed; call model.decompress() first: the sweep compresses it by itself")
    if model.training:
        raise ValueError("model is in training mode, where answers are drawn anew each time; call model.eval() first")
    if tokenizer_of(processor).padding_side != "left":
        raise ValueError("processor.tokenizer.padding_side='right': generation needs 'left'; set it to 'left'")
    if task.modality == "text":
        return
    needed = {"image": "visual", "video": "video"}[task.modality]
    if needed not in adapter_for(model).gives:
        raise ValueError(f"data={task.name!r} shows {task.modality}s, which {type(model).__name__} cannot see")
    if getattr(processor, f"{task.modality}_processor", None) is None:
        raise ValueError(
            f"data={task.name!r} shows {task.modality}s, and processor={type(processor).__name__} reads none; pass the "
            "model's processor, or save it into the model's folder"
        )


def _check_weights(model: Any, runs: Sequence[Run]) -> None:
    """
    Raises:
        ValueError: weights do not fit the model, or their method cannot act on it.
    """
    first = {run.method: run for run in reversed(runs) if run.weights is not None}
    for run in first.values():
        compress(model, run.config(), weights=run.weights)
        decompress(model)


def everything(model: Any, weights: Mapping[str, Any] | None = None) -> tuple[list[str], dict[str, str]]:
    """All methods of the registry whose needs the model meets, and why the others are left out.

    Those without use before they are trained are left out unless there are `weights` of them.
    """
    adapter = adapter_for(model)
    names, left_out = [], {}
    for spec in registry.methods().values():
        lacking = sorted(spec.needs - adapter.gives)
        if spec.stage in adapter.stages and not lacking and spec.needs_weights and spec.name not in (weights or {}):
            left_out[spec.name] = f"has to be trained: pass its weights, --weights {spec.name}=FOLDER"
        elif spec.stage in adapter.stages and not lacking:
            names.append(spec.name)
        else:
            left_out[spec.name] = "; ".join(registry.NEEDS[n] for n in lacking) or f"no {spec.stage} stage"
    return names, left_out
