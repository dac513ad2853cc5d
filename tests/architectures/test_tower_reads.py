"""What a vision method may read of the tower and of the prompt, on every architecture, against maps made in full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from hf_compress.engine.attention import Tap
from hf_compress.methods.base import VisionMethod
from hf_compress.signals import QUESTION, Assignment, Read
from hf_compress.tensors.select import identity
from tests import tiny
from tests.invariants.reference import VLMS, adapter_of, bare, close, greedy, shared, unchanged
from tests.tiny import BOS, IMG, VID, VIDEO
from tests.toy import registered

CASES = [pytest.param(name, kind, id=f"{name}-{kind}") for name in VLMS for kind in ("inputs", "video")]
CASES = [case for case in CASES if case.values[1] == "inputs" or case.values[0] in VIDEO]
STATES = ("key", "value", "hidden")


@dataclass
class Looks(VisionMethod):
    """Reads everything of two blocks, and keeps the first tokens."""

    seen: ClassVar[list] = []

    def reads(self, depth):
        return {Read("tower", back, what) for back in (0, 1) for what in ("attention", *STATES)} | {QUESTION}

    def assign(self, tokens, keep):
        rows = {
            (rows, back): tokens.attention(back, rows=rows, surrogate="all")
            for rows in ("cls", "mean", "all")
            for back in (0, 1)
        }
        rows["as one", 0] = tokens.attention(rows="cls", surrogate="mean", heads="all")
        states = {(what, back): tokens.states(what, back) for what in STATES for back in (0, 1)}
        for back in (0, 1):
            for what in ("key", "value"):  # all heads side by side
                mean, wide = states[what, back], tokens.states(what, back, heads="all")
                assert wide.shape[-1] > mean.shape[-1]
                torch.testing.assert_close(wide.unflatten(-1, (-1, mean.shape[-1])).mean(-2), mean)
        whole = {(what, back): tokens.whole(what, back) for what in STATES for back in (0, 1)}
        self.seen.append((tokens, rows | states, whole))
        return Assignment(identity(len(tokens), keep, tokens.device))


@dataclass
class Undeclared(Looks):
    """The same without a word about it, but of keys."""

    seen: ClassVar[list] = []

    def reads(self, depth):
        return {Read("tower", 0, "key")}

    def assign(self, tokens, keep):
        self.seen.append(tokens._call())
        assert tokens.states("key").shape[:2] == (len(tokens), tokens.count)
        for ask in (
            lambda: tokens.states("hidden"),
            lambda: tokens.states("key", 1),
            lambda: tokens.whole("value"),
            lambda: tokens.attention(surrogate="all"),
            lambda: tokens.question,
        ):
            with pytest.raises(ValueError, match=r"undeclared.*reads\(\)"):
                ask()
        with pytest.raises(ValueError, match=r"what='keys'.*'key'"):
            tokens.states("keys")
        with pytest.raises(ValueError, match=r"heads='first'.*'all'"):
            tokens.states("key", heads="first")
        with pytest.raises(ValueError, match=r"heads='mean'.*'each', 'all'"):
            tokens.attention(heads="mean")
        with pytest.raises(ValueError, match=r"rows='first'"):
            tokens.attention(rows="first")
        return Assignment(identity(len(tokens), keep, tokens.device))


@pytest.fixture
def spy(monkeypatch):
    """{block: queries, keys and values of every call} and {block: states} of the vision tower of a model."""

    def watch(model, name):
        calls, hidden, adapter = {}, {}, adapter_of(name)
        for block in adapter.attention_blocks(model):
            for tower in adapter.by_tower(model):
                module = tower.hidden_module(model, block)
                note = lambda _, args, out, block=block: hidden.setdefault(block, []).append(
                    out[0] if isinstance(out, tuple) else out
                )
                module.register_forward_hook(note)
        old = Tap.__init__

        def init(self, base, sink, key):
            def also(key, call):
                calls.setdefault(key, []).append(call)
                return sink(key, call)

            old(self, base, also, key)

        monkeypatch.setattr(Tap, "__init__", init)
        return calls, hidden

    return watch


def naive(adapter, model, call, calls, rows):
    """Whole maps in double precision, over the patches that are real, and what of them belongs to a token."""
    sizes, skip, out = adapter.packed(model, call), adapter.cls_tokens(model), []
    for query, key, _, scaling, *_ in calls:
        parts = [query.shape[2]] if sizes is None or len(calls) == len(sizes) else sizes
        for q, k in zip(query.double().split(parts, 2), key.double().split(parts, 2)):
            real = torch.ones(len(q), q.shape[2]) if adapter.real(call) is None else adapter.real(call)
            see = torch.zeros(real.shape, dtype=torch.double).masked_fill(real == 0, -torch.inf)[:, None, None]
            weight = (real / real.sum(1, keepdim=True)).double()[:, None, :, None]
            if rows == "mean":
                real = real[:, skip:] / real[:, skip:].sum(1, keepdim=True)
                q = (q[:, :, skip:] * real[:, None, :, None]).sum(2, keepdim=True)
                weight = torch.ones(1, 1, 1, 1)
            whole = (q @ k.mT * scaling + see).softmax(-1)
            row = whole[:, :, 0] if rows == "cls" else (whole * weight).sum(2)
            out.append(row[:, :, skip:])
    return joined(adapter, model, call, torch.cat(out, 2).mT)


def joined(adapter, model, call, x):
    return [crop.mean(1) for crop in adapter.per_token(model, call, x.double())]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_everything_that_can_be_read(name, kind, spy):
    model, batch = tiny.build(name), getattr(tiny, kind)(name, bare(name))
    Looks.seen.clear()
    calls, hidden = spy(model, name)
    with registered(Looks), torch.no_grad(), model.compressed("looks", 0.5):
        model(**batch)
        adapter = model.compression.context.adapter
    blocks = adapter.attention_blocks(model)
    assert Looks.seen
    for tokens, found, whole in Looks.seen:
        call, skip = tokens._call(), adapter.cls_tokens(model)
        assert tokens.depth == len(blocks)
        for (what, back), x in found.items():
            block = blocks[-1 - back]
            mine = calls[block]
            if what in STATES:
                heads = [c.key.mean(1) if what == "key" else c.value.mean(1) for c in mine]
                rows = torch.cat(
                    [h if h.ndim == 3 else h[None] for h in hidden[block]] if what == "hidden" else heads, 1
                )
                expected = joined(adapter, model, call, rows[:, skip:])
                seen = None if skip else naive(adapter, model, call, mine, "all")
                for mine_, unit in zip(whole[what, back].flatten(0, 1).double(), tokens._units):
                    if skip:
                        first = rows[unit.crop, 0]
                    else:
                        weight = unit.read(seen).mean(1)
                        first = (weight / weight.sum()) @ unit.read(expected)
                    torch.testing.assert_close(mine_, first.double(), atol=2e-5, rtol=1e-4)
            else:
                rows = "all" if what == "cls" and not skip else what
                if what == "as one":  # all channels of a row in one product
                    rows = "cls" if skip else "mean"
                    mine = [
                        c._replace(
                            query=c.query.transpose(1, 2).flatten(2)[:, None],
                            key=c.key.transpose(1, 2).flatten(2)[:, None],
                            scaling=c.scaling * c.query.shape[1] ** -0.5,
                        )
                        for c in mine
                    ]
                expected = naive(adapter, model, call, mine, rows)
                x = x.transpose(1, 2)
            for mine_, unit in zip(x, tokens._units):
                torch.testing.assert_close(mine_.double(), unit.read(expected), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VLMS)
def test_only_what_is_declared_can_be_read_and_is_kept(name):
    model, batch = shared(name), tiny.inputs(name, bare(name))
    Undeclared.seen.clear()
    with registered(Undeclared), torch.no_grad(), model.compressed("undeclared", 0.5):
        model(**batch)
    assert {what for call in Undeclared.seen for _, what in call.reads} == {"key"}


@pytest.mark.parametrize("name", VLMS)
def test_a_surrogate_is_named_where_there_is_no_cls(name):
    @dataclass
    class Pure(VisionMethod):
        """[CLS] or nothing."""

        def reads(self, depth):
            return {Read("tower", 0, "attention")}

        def assign(self, tokens, keep):
            return Assignment(tokens.attention().mean(1).topk(keep).indices.sort(1).values)

    model, batch = shared(name), tiny.inputs(name, bare(name))
    with registered(Pure), torch.no_grad(), model.compressed("pure", 0.5):
        if adapter_of(name).cls_tokens(model):
            model(**batch)
        else:
            with pytest.raises(ValueError, match=r"no \[CLS\].*surrogate=None.*'mean', 'all'"):
                model(**batch)


@pytest.mark.parametrize("read", [Read("tower", -1, "key"), Read("tower", 0, "keys")])
def test_what_no_tower_has_cannot_be_read(read):
    class Odd(Undeclared):
        """Asks for what there is not."""

        def reads(self, depth):
            return {read}

    model = shared("llava")
    with registered(Odd), unchanged(model), pytest.raises(ValueError, match=r"'odd' reads Read\(.*blocks from 0 on"):
        model.compress("odd", 0.5)


# -- the question ------------------------------------------------------------------------------------------------------
@dataclass
class Asked(VisionMethod):
    """Keeps the first tokens, as many of them that go first as the question has real rows."""

    seen: ClassVar[list] = []

    def reads(self, depth):
        return {QUESTION}

    def assign(self, tokens, keep):
        text, real = tokens.question
        self.seen.append([x[r] for x, r in zip(text, real)])
        shift = real.sum(1) % (tokens.count - keep)
        return Assignment(torch.arange(keep)[None] + shift[:, None])


def texts(name, ids, mask):
    """Per image, in the order of the prompt, the embedded tokens behind it in its row."""
    out, table = [], bare(name).get_input_embeddings()
    for row, real in zip(ids.tolist(), mask.tolist()):
        text = [token if real[i] and token not in (IMG, VID) else None for i, token in enumerate(row)]
        starts = [i for i, token in enumerate(row) if token == IMG and (i == 0 or row[i - 1] != IMG)]
        stops = [next(j for j in range(i, len(row) + 1) if j == len(row) or row[j] != IMG) for i in starts]
        out += [table(torch.tensor([t for t in text[stop:] if t is not None], dtype=torch.long)) for stop in stops]
    return out


def asked(name, batch, **more):
    """What `Asked` saw, per image in the order of the prompt, and the tokens that were kept."""
    model = shared(name)
    Asked.seen.clear()
    with registered(Asked), torch.no_grad(), model.compressed("asked", 0.5):
        model(**batch, **more)
        return [x for part in Asked.seen for x in part], model.compression.last.visual_kept


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "paligemma", "internvl", "gemma3"])
def test_question_is_the_text_behind_an_image(name, side):
    batch = tiny.inputs(name, bare(name), side=side)
    seen, kept = asked(name, batch)
    expected = texts(name, batch["input_ids"], batch["attention_mask"])
    assert [len(x) for x in seen] == [len(x) for x in expected]
    for a, b in zip(seen, expected):
        close(a, b.detach())
    for row in range(2):
        one = tiny.single(batch, row, name)
        assert asked(name, one)[1] == [kept[row]]


def test_answers_are_no_question():
    batch = tiny.batch("llava", bare("llava"), [[BOS, IMG, 5, 6, 7, 8, 9]])
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    (seen,), _ = asked("llava", batch, labels=labels)
    assert torch.equal(seen, bare("llava").get_input_embeddings()(torch.tensor([5, 6, 7])))
    (seen,), _ = asked("llava", batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == IMG, -100))
    assert seen.shape[0] == 0


def test_questions_of_one_encoding():
    """Features that are asked about twice are decided on twice; the same question finds the same decision."""
    model = shared("llava")
    prompts = [tiny.batch("llava", model, [[BOS, IMG, *range(5, 5 + n)]]) for n in (2, 6, 2)]
    with torch.no_grad(), registered(Asked), model.compressed("asked", 0.5):
        features = model.base_model.get_image_features(prompts[0]["pixel_values"], return_dict=True)
        kept = []
        for prompt in prompts:
            rest = {k: v for k, v in prompt.items() if k != "pixel_values"}
            model(**rest, mm_encoder_outputs={"image": features})
            kept.append(model.compression.last.visual_kept)
    assert kept[0] == kept[2] != kept[1] and kept[1][0][0][0] == 6


def test_question_of_a_prompt_in_chunks():
    model, batch = shared("llava"), tiny.inputs("llava", bare("llava"))
    with registered(Asked), model.compressed("asked", 0.5):
        whole = greedy(model, batch)
        kept = model.compression.last.visual_kept
        chunks = greedy(model, batch, prefill_chunk_size=50)
    assert torch.equal(whole.tokens, chunks.tokens) and {k[0] for row in kept for k in row} == {3, 2, 1}


def test_question_of_packed_samples():
    """Only the text of the own sample."""
    alone = tiny.batch("llava", bare("llava"), [[BOS, 5, IMG, 7, 8]])
    ids, n = alone["input_ids"], alone["input_ids"].shape[1]
    packed = dict(
        input_ids=ids.repeat(1, 2),
        position_ids=torch.arange(n).repeat(2)[None],
        pixel_values=alone["pixel_values"].repeat(2, 1, 1, 1),
    )
    seen, _ = asked("llava", packed, use_cache=False)
    assert [len(x) for x in seen] == [2, 2]
