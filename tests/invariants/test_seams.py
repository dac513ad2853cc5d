"""What a method can do between decoder layers, by toys against the bare model: wait, merge, decide, remember, trim."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import pytest
import torch

import hf_compress
from hf_compress import budget
from hf_compress.methods.base import DecoderMethod
from hf_compress.signals import Assignment, Read
from tests import tiny
from tests.invariants.language import FullLength, bare
from tests.invariants.reference import alone, batch_of, close, greedy, logits_of, shared
from tests.toys import toy

VISUAL = ["llava", "qwen2_5_vl", "llava_window"]
TEXT = ["llama", "gemma2", "qwen2"]


@dataclass
class Half(DecoderMethod):
    """Half of the rows, by a number that the place of each gives it."""

    layers: ClassVar[tuple[int, ...]] = (1, 2)

    def boundaries(self, layers):
        return self.layers

    def reads(self, depth):
        return set()

    def plan(self, layers, tokens, ratio: Fraction):
        left, plan = tokens, {}
        for layer in self.layers:
            left = plan[layer] = budget.kept(tokens if self.waits else left, ratio)
        return plan

    def score(self, view):
        return ((view.first * 37 + view.layer * 11) % 101).float()


class Waits(Half):
    """Rows skip a layer and come back."""

    layers = (1, 3)
    waits = True


class Gated(Waits):
    """And what goes through counts by its place."""

    def gate(self, view, answer):
        return 1 / (1 + view.first.float())


class Anywhere(Half):
    """Any row of the prompt but the first two and the last three."""

    def removable(self, view):
        return view.prompt & (view.first >= 2) & (view.last >= 3)

    def units(self, images):
        return 1


class Threshold(Half):
    """As many as are longer than the mean: only the layer knows how many."""

    layers = (2,)

    def plan(self, layers, tokens, ratio):
        return {2: None}

    def decide(self, view, keep):
        assert keep is None
        size = view.hidden.float().norm(dim=-1)
        mean = (size * view.removable).sum(1, keepdim=True) / view.removable.sum(1, keepdim=True).clamp(min=1)
        return Assignment.selection(view.valid & ~(view.removable & (size < mean)))


class Pairs(Half):
    """Every other row is merged into the one that may go before it."""

    layers = (2,)

    def plan(self, layers, tokens, ratio):
        return {2: None}

    def decide(self, view, keep):
        nth = view.removable.long().cumsum(1) - 1
        goes = view.removable & (nth % 2 == 1)
        out = Assignment.selection(view.valid & ~goes)
        place = torch.full_like(nth, -1).scatter(1, out.kept, torch.arange(out.kept.shape[1]).expand_as(out.kept))
        if out.valid is not None:
            place = torch.where(out.stays(nth.shape[1]), place, -1)
        owner = torch.where(goes, -1, torch.arange(nth.shape[1])).masked_fill(~view.removable, -1).cummax(1).values
        out.groups = torch.where(goes, place.gather(1, owner.clamp(min=0)), place)
        return out


def reference(name, batch, tokens, through, gates=None, put=None):
    """(B, L, V) logits of the bare model in which only the rows `through[layer][b]` of the prompt go through a layer.

    Args:
        gates: {layer: (B, L, 1)}: rows that do not go through come out as they went in, the others as x + gate (y - x).
        put: {layer: function of its input}.
    """
    full, layers, handles = FullLength(name, batch, tokens), bare(name).get_decoder().layers, []
    gates, put = gates or {}, put or {}
    for layer, gate in gates.items():

        def leave(_, args, out, rows=through[layer], gate=gate):
            rows = full.columns(rows)
            y, x = out[0] if isinstance(out, tuple) else out, args[0]
            y = torch.where(rows[..., None], x + gate * (y - x), x)
            return (y, *out[1:]) if isinstance(out, tuple) else y

        handles.append(layers[layer].register_forward_hook(leave))
    for layer, change in put.items():
        handles.append(layers[layer].register_forward_pre_hook(lambda _, args, f=change: (f(args[0]), *args[1:])))
    try:
        return full.run(full.survivors(through))[0]
    finally:
        for handle in handles:
            handle.remove()


def run_toy(cls, name, batch, side, needs=("visual",), **knobs):
    """Tokens, logits and the last run; generated where the padding is on the left."""
    model = shared(name)
    with toy(cls, "decoder", needs) as key, model.compressed(key, ratio=0.5, **knobs):
        if side == "left":
            run = greedy(model, batch)
            return run.tokens, run.logits, model.compression.last
        return batch["input_ids"][:, :1], logits_of(model, batch), model.compression.last


def compare(got, expected, prompt, through, side):
    if side == "left":
        close(got, expected[:, prompt - 1 :])
        return
    for b, rows in enumerate(through):
        close(got[b, rows], expected[b, rows])


def cases(names, *toys):
    found = [pytest.param(c, n, id=f"{c.__name__}-{n}") for c in toys for n in names]
    return pytest.mark.parametrize(("cls", "name"), found)


@pytest.mark.parametrize("side", ["left", "right"])
@cases(VISUAL, Half, Threshold)
@torch.no_grad()
def test_visual_rows_go(cls, name, side):
    batch = batch_of(name, side=side)
    tokens, got, last = run_toy(cls, name, batch, side)
    assert sum(map(len, last.layer_index[-1])) < sum(map(len, last.layer_index[0]))
    expected = reference(name, batch, tokens, last.layer_index)
    compare(got, expected, batch["input_ids"].shape[1], last.layer_index[-1], side)


@pytest.mark.parametrize("side", ["left", "right"])
@cases([*TEXT, "llava"], Anywhere)
@torch.no_grad()
def test_rows_of_any_prompt_go(cls, name, side):
    """Text models too: the first rows and the last ones stay, in every sample."""
    batch = batch_of(name, side=side)
    tokens, got, last = run_toy(cls, name, batch, side, needs=())
    for b, mask in enumerate(batch["attention_mask"]):
        rows = mask.nonzero()[:, 0].tolist()
        assert {*rows[:2], *rows[-3:]} <= set(last.layer_index[-1][b])
        free = len(rows) - 5
        assert [len(at[b]) for at in last.layer_index[1:3]] == [
            5 + n for n in cls().plan(4, free, Fraction(1, 2)).values()
        ]
    expected = reference(name, batch, tokens, last.layer_index)
    compare(got, expected, batch["input_ids"].shape[1], last.layer_index[-1], side)


@pytest.mark.parametrize("side", ["left", "right"])
@cases(VISUAL, Waits, Gated)
@torch.no_grad()
def test_rows_wait(cls, name, side):
    """They skip attention, MLP and cache of a layer and come back behind it; that layer's cache is the short one."""
    batch = batch_of(name, side=side)
    tokens, got, last = run_toy(cls, name, batch, side)
    sizes = [sum(map(len, rows)) for rows in last.layer_index]
    assert sizes[0] == sizes[2] > max(sizes[1], sizes[3])
    gate = torch.ones(len(got), batch["input_ids"].shape[1] + tokens.shape[1] - 1, 1)
    if cls is Gated:
        first = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        gate[:, : first.shape[1], 0] = 1 / (1 + first.float())
    expected = reference(name, batch, tokens, last.layer_index, gates={i: gate for i in cls.layers})
    compare(got, expected, batch["input_ids"].shape[1], last.layer_index[0], side)


@pytest.mark.parametrize("side", ["left", "right"])
@cases(VISUAL, Pairs)
@torch.no_grad()
def test_rows_are_merged(cls, name, side):
    batch = batch_of(name, side=side)
    tokens, got, last = run_toy(cls, name, batch, side)
    before, after = last.layer_index[1], last.layer_index[2]
    assert [len(a) for a in before] != [len(a) for a in after]

    def put(x):
        x = x.clone()
        for b, rows in enumerate(before):
            visual = [r for r in rows if any(r in image for image in FullLength(name, batch, tokens).visual(b))]
            for one, two in zip(visual[::2], visual[1::2]):
                x[b, one] = (x[b, one] + x[b, two]) / 2
        return x

    expected = reference(name, batch, tokens, last.layer_index, put={2: put})
    compare(got, expected, batch["input_ids"].shape[1], after, side)


class Elsewhere(Gated):
    """Text that waits, and a gate by the place of each row in its whole conversation."""

    def removable(self, view):
        return view.prompt & (view.first >= 2) & (view.last >= 3)

    def units(self, images):
        return 1


@pytest.mark.parametrize("name", ["llama", "gemma2", "llava"])
@torch.no_grad()
def test_gates_know_prompts_only(name):
    """Steps with a cache ask for no gate: neither do rows generated without one."""
    model, batch = shared(name), batch_of(name)
    with toy(Elsewhere, "decoder") as key, model.compressed(key, ratio=0.5):
        close(greedy(model, batch, use_cache=False).logits, greedy(model, batch).logits)


@pytest.mark.parametrize("lengths", [(1, 40), (12, 40)])
@torch.no_grad()
def test_gates_of_a_batch_are_those_of_its_samples(lengths):
    """Also of one that is too short to lose a row, padded or packed."""
    model = shared("llama")
    rows = [torch.arange(n) % 70 + 5 for n in lengths]
    batch = tiny.pad([row.tolist() for row in rows])
    with toy(Elsewhere, "decoder") as key, model.compressed(key, ratio=0.5):
        each = [logits_of(model, {"input_ids": row[None]})[0] for row in rows]
        padded = logits_of(model, batch)
        places = torch.cat([torch.arange(len(row)) for row in rows])[None]
        packed = model(input_ids=torch.cat(rows)[None], position_ids=places, use_cache=False).logits
    close(padded[batch["attention_mask"].bool()], torch.cat(each))
    close(packed[0], torch.cat(each))


@torch.no_grad()
def test_places_of_a_later_turn_count_no_padding():
    """What is decided by `first` is the same in a batch and alone."""
    model, batch, seen = shared("llama"), batch_of("llama"), []

    class Notes(Anywhere):
        def score(self, view):
            seen.append(view.first[-1][view.valid[-1]])
            return super().score(view)

    new = torch.arange(20, 32)[None]
    with toy(Notes, "decoder") as key, model.compressed(key, ratio=0.5):
        for rows in ([0, 1], [1]):
            one = batch if len(rows) == 2 else alone("llama", batch, 1)
            cache = model(**one, use_cache=True).past_key_values
            mask = torch.cat([one["attention_mask"], torch.ones(len(rows), 12, dtype=torch.long)], 1)
            seen.clear()
            model(input_ids=new.expand(len(rows), -1), attention_mask=mask, past_key_values=cache)
            assert seen[0].tolist() == list(range(15, 27))


def test_gates_of_another_shape_are_refused():
    class Flat(Gated):
        def gate(self, view, answer):
            return torch.ones(answer.kept.shape)

    model, wanted = shared("llava"), pytest.raises(ValueError, match=r"method='toy' gave a gate of shape .*\(B, S\)")
    with toy(Flat, "decoder", {"visual"}) as key, model.compressed(key, ratio=0.5), wanted:
        model(**batch_of("llava"))


@pytest.mark.parametrize(
    ("kept", "message"), [([[0, 0, 1]], "each once"), ([[0, 500]], "each once"), (None, "kept of")]
)
def test_answers_that_cannot_be_carried_out_are_refused(kept, message):
    class Wrong(Half):
        def decide(self, view, keep):
            return Assignment(torch.tensor([0]) if kept is None else torch.tensor(kept * len(view.valid)))

    model, wanted = shared("llava"), pytest.raises(ValueError, match=f"method='toy' answered .*{message}")
    with toy(Wrong, "decoder", {"visual"}) as key, model.compressed(key, ratio=0.5), wanted:
        model(**batch_of("llava"))


def test_a_waiting_layer_trains():
    """Loss and gradients, of a gate too, are those of the layer applied to the rows that go through."""
    name = "llava"
    batch, gate = batch_of(name), torch.nn.Parameter(torch.tensor(0.7))

    class Learns(Waits):
        def gate(self, view, answer):
            return gate.expand(view.valid.shape)

    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[labels >= 90] = -100
    labels[:, :-3] = -100
    model = shared(name)
    with toy(Learns, "decoder", {"visual"}) as key, model.compressed(key, ratio=0.5):
        loss = model(**batch, labels=labels, use_cache=False).loss
        through = model.compression.last.layer_index
    (got,) = torch.autograd.grad(loss, gate)

    def by_hand(value):
        whole = torch.full((*batch["input_ids"].shape, 1), float(value))
        logits = reference(name, batch, batch["input_ids"][:, :1], through, gates={i: whole for i in Waits.layers})
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    with torch.no_grad():
        close(loss, by_hand(0.7))
        step = (by_hand(0.71) - by_hand(0.69)) / 0.02
    torch.testing.assert_close(got, step, rtol=0.02, atol=1e-4)


def test_reading_a_layer_that_rows_waited_in_is_refused():
    class Reads(Waits):
        layers = (1, 2)

        def reads(self, depth):
            return {Read("layer", 1, "attention")}

        def score(self, view):
            return view.attention(source="own") if view.layer == 2 else super().score(view)

    model, batch = shared("llava"), batch_of("llava")
    wanted = pytest.raises(RuntimeError, match=r"layer 1: .* waited there")
    with toy(Reads, "decoder", {"visual"}) as key, model.compressed(key, ratio=0.5), wanted:
        model(**batch)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", VISUAL)
@torch.no_grad()
def test_what_is_remembered_moves_with_the_rows(name, side):
    seen = []

    class Remembers(Half):
        layers = (1, 2, 3)

        def decide(self, view, keep):
            if view.layer == 1:
                view.memory["mark"] = torch.stack([view.first, view.image], -1)
            seen.append((view.memory["mark"], torch.stack([view.first, view.image], -1), view.valid))
            return super().decide(view, keep)

    run_toy(Remembers, name, batch_of(name, side=side), side)
    assert len(seen) == 3 and len({m.shape[1] for m, *_ in seen}) == 3
    for mark, now, valid in seen:
        assert torch.equal(mark[valid], now[valid])


@pytest.mark.parametrize("name", ["llama", "mistral_window", "llava"])
@torch.no_grad()
def test_received_attention_is_the_product_with_the_map(name):
    """Three steps of a weight through the attention of the layer just run, per query head, against the whole map."""
    found = {}

    class Flows(Half):
        layers = (2,)

        def reads(self, depth):
            return {Read("layer", 1, "attention")}

        def removable(self, view):
            return view.prompt & (view.last > 2)

        def score(self, view):
            weight = view.valid[:, None].float()
            for _ in range(3):
                weight = view.received(weight, source="own")
            found.update(weight=weight, valid=view.valid)
            return weight.mean(1)

    batch = batch_of(name)
    run_toy(Flows, name, batch, "right", needs=())
    full = FullLength(name, batch, batch["input_ids"][:, :1])
    maps = full.run([full.causal(i) for i in range(full.layers)])[1][1]
    valid = batch["attention_mask"].bool()
    weight = valid[:, None].float().expand(-1, maps.shape[1], -1)
    for _ in range(3):
        weight = ((weight * valid[:, None])[:, :, None] @ maps)[:, :, 0]
    shape = found["valid"][:, None].expand_as(found["weight"])
    close(found["weight"][shape], (weight * 1.0)[valid[:, None].expand_as(weight)])


def test_the_registry_is_as_before():
    before = hf_compress.methods()
    with toy(Half, "decoder") as key:
        assert key in hf_compress.methods()
    assert hf_compress.methods() == before


class Trims(Half):
    """Rows that go leave the caches of the layers before, too."""

    layers = (2,)
    trims = True


@pytest.mark.parametrize("name", [*VISUAL, "mistral_window", "gemma2"])
@torch.no_grad()
def test_rows_leave_the_caches_of_earlier_layers(name):
    """What is generated sees them in no layer; layers that held the same rows go on sharing a layout."""

    class Text(Trims, Anywhere):
        layers = (2,)

    text = name in ("mistral_window", "gemma2")
    model, batch = shared(name), batch_of(name)
    with toy(Text if text else Trims, "decoder", () if text else {"visual"}) as key, model.compressed(key, ratio=0.5):
        held = [layer.layout for layer in model(**batch, use_cache=True).past_key_values.layers]
        run, last = greedy(model, batch), model.compression.last
    full, through = FullLength(name, batch, run.tokens), last.layer_index
    see, late = full.survivors(through), torch.arange(full.rows)[:, None] >= full.prompt
    left = full.columns(through[-1])[:, None, None]
    close(run.logits, full.logits([mask & (left | ~late) for mask in see]))
    assert len({len(layout) for layout, window in zip(held, full.windows) if window is None}) <= 1
    assert len({id(layout) for layout, window in zip(held[:2], full.windows) if window == full.windows[0]}) == 1


def test_trimmed_caches_do_not_go_with_evicted_ones():
    model = shared("llava")
    refused = pytest.raises(ValueError, match="method='toy' takes rows out of the caches of earlier layers")
    with toy(Trims, "decoder", {"visual"}) as key, refused:
        model.compress([key, "snapkv"], ratio=[0.5, 0.5])


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_what_is_generated_without_a_cache_would_see_trimmed_rows(name):
    """Refused, as the layers before are run when it is not yet known what goes; a single forward is what it is."""

    class Text(Trims, Anywhere):
        layers = (2,)

    model, batch = shared(name), batch_of(name)
    refused = pytest.raises(ValueError, match=r"use_cache=False \(argument or config\): method='toy'.*use_cache=True")
    with torch.no_grad(), toy(Text, "decoder") as key:
        with model.compressed(key, ratio=0.5):
            close(logits_of(model, batch, use_cache=False), logits_of(model, batch))
            with refused:
                greedy(model, batch, use_cache=False)
        with model.compressed(key, ratio=0):
            greedy(model, batch, use_cache=False)


@pytest.mark.parametrize("cls", [Half, Gated, Threshold, Pairs])
@torch.no_grad()
def test_ratio_zero_is_the_bare_model(cls):
    """Whatever the method would decide: nothing is to be removed."""
    model, batch = shared("llava"), batch_of("llava")
    plain = logits_of(model, batch)
    with toy(cls, "decoder", {"visual"}) as key, model.compressed(key, ratio=0):
        assert torch.equal(logits_of(model, batch), plain)


def test_rows_that_wait_trim_nothing():
    class Both(Waits):
        trims = True

    model = shared("llava")
    refused = pytest.raises(ValueError, match=r"method='toy' .*waits.*trims.*one of them")
    with toy(Both, "decoder", {"visual"}) as key, refused:
        model.compress(key, ratio=0.5)


@pytest.mark.parametrize("plan", [{1: 72}, {1: 3, 2: 5}, {1: -3}, {1: 4.5}])
def test_plans_that_are_none_are_refused(plan):
    class Wrong(Half):
        def plan(self, layers, tokens, ratio):
            return plan

    model = shared("llava")
    with toy(Wrong, "decoder", {"visual"}) as key, pytest.raises(ValueError, match=r"method='toy' plans .*from 0 to"):
        model.compress(key, ratio=0.5)
    assert model.compression is None


def test_reads_that_nobody_shows_are_refused():
    class Wrong(Half):
        def reads(self, depth):
            return {Read("layer", depth, "attention")}

    with toy(Wrong, "decoder", {"visual"}) as key, pytest.raises(ValueError, match=r"method='toy' reads .*4 layers"):
        shared("llava").compress(key, ratio=0.5)


def test_scores_of_another_shape_are_refused():
    class Flat(Half):
        def score(self, view):
            return view.first[0].float()

    model, wanted = shared("llava"), pytest.raises(ValueError, match=r"score: \(77,\) is not \(B, S\)")
    with toy(Flat, "decoder", {"visual"}) as key, model.compressed(key, ratio=0.5), wanted:
        model(**batch_of("llava"))
