"""The prompt stage by toys: rows of text that go before the language model, against prompts shortened by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from hf_compress.methods.base import PromptMethod
from hf_compress.signals import LOSS, Assignment, Read
from tests.invariants.language import FullLength, bare, mrope, rerun
from tests.invariants.reference import GREEDY, alone, batch_of, close, greedy, logits_of, shared
from tests.toys import toy

TEXT = ["llama", "qwen2", "gemma2", "mistral_window"]
VISUAL = ["llava", "qwen2_5_vl", "llava_window"]


@dataclass
class Every(PromptMethod):
    """The tokens whose place times 37 is smallest modulo 101."""

    keep_first: int = 1
    keep_last: int = 2
    asked: list[Any] = field(default_factory=list)

    def assign(self, text, keep):
        self.asked.append((text.ids, text.at, text.embeddings, text.length, keep))
        order = ((text.at * 37) % 101).argsort(dim=-1, stable=True)[:, :keep]
        return Assignment(order.sort(dim=-1).values)


def short(name, batch, tokens, kept, positions="auto"):
    """(B, T, V): the language model on rows cut by hand, sample by sample, without a cache."""
    out = []
    for b, rows in enumerate(kept):
        full = FullLength(name, batch, tokens)
        rows = [*rows, *range(full.prompt, full.rows)]
        where = full.positions[..., b : b + 1, rows]
        if positions == "renumber" or (positions == "auto" and not mrope(name)):
            where = torch.arange(len(rows))[None]

        def change(kw, b=b, rows=rows, where=where):
            ones = torch.ones(1, len(rows), dtype=torch.long)
            return dict(kw, inputs_embeds=kw["inputs_embeds"][b : b + 1, rows], position_ids=where, attention_mask=ones)

        out.append(rerun(full.model, full.batch, change, None)[0][0, -tokens.shape[1] :])
    return torch.stack(out)


@pytest.mark.parametrize("positions", ["auto", "original"])
@pytest.mark.parametrize("name", TEXT + VISUAL)
@torch.no_grad()
def test_generation_is_that_of_the_short_prompt(name, positions):
    model, batch = shared(name), batch_of(name)
    with toy(Every, "prompt") as key, model.compressed(key, ratio=0.5, positions=positions):
        run, last = greedy(model, batch), model.compression.last
    kept = last.layer_index[0]
    whole = [mask.nonzero()[:, 0].tolist() for mask in batch["attention_mask"]]
    visual = [{r for rows in FullLength(name, batch, run.tokens).images(b) for r in rows} for b in range(len(whole))]
    for mine, rows, shown in zip(kept, whole, visual):
        text = [r for r in rows if r not in shown]
        free = text[1:-2]
        assert shown <= set(mine) and set(text) - set(free) <= set(mine)
        assert len(set(mine) & set(free)) == -(-len(free) // 2) or len(set(mine) & set(free)) == len(free) // 2
    if positions == "original" and any(FullLength(name, batch, run.tokens).windows):
        return  # windows are then measured over gaps: `test_windows_over_gaps`
    close(run.logits, short(name, batch, run.tokens, kept, positions))


@pytest.mark.parametrize("name", ["gemma2", "mistral_window", "llava_window", "gemma3", "paligemma"])
@torch.no_grad()
def test_windows_over_gaps(name):
    """At their original positions rows are as far from each other as before."""
    model, batch = shared(name), batch_of(name)
    with toy(Every, "prompt") as key, model.compressed(key, ratio=0.5, positions="original"):
        run, last = greedy(model, batch), model.compression.last
    full = FullLength(name, batch, run.tokens)
    close(run.logits, full.logits(full.survivors(last.layer_index)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "llava"])
@torch.no_grad()
def test_a_batch_equals_its_samples(name, side):
    model, batch = shared(name), batch_of(name, side=side)
    with toy(Every, "prompt") as key, model.compressed(key, ratio=0.5, positions="original"):
        got, last = logits_of(model, batch), model.compression.last
    full = FullLength(name, batch, batch["input_ids"][:, :1])
    expected = full.run(full.survivors(last.layer_index))[0]
    for b, rows in enumerate(last.layer_index[-1]):
        close(got[b, rows], expected[b, rows])


@torch.no_grad()
def test_with_the_other_stages():
    """Visual tokens, text, layers and cache together; each layer holds what is left of all of them."""
    name = "llava"
    model, batch = shared(name), batch_of(name)
    with (
        toy(Every, "prompt") as key,
        model.compressed(["fastervlm", key, "fastv", "snapkv"], ratio=[0.5, 0.5, 0.3, 0.4], layer=1, window=4),
    ):
        run, last = greedy(model, batch), model.compression.last
    full, held = FullLength(name, batch, run.tokens), last.layer_index
    order = full.columns(held[0]).long().cumsum(1).sub(1).clamp(min=0)
    full = FullLength(name, batch, run.tokens, order)
    close(run.logits, full.logits(full.evicted(full.survivors(held), run.cache)))


class Expected(Every):
    """What was expected goes; reads losses and the attention of layer 1, and keeps them."""

    seen: ClassVar[dict[str, Any]] = {}

    def reads(self, depth):
        return {LOSS, Read("layer", 1, "attention")}

    def assign(self, text, keep):
        for name, value in (("loss", text.loss), ("attention", text.attention(1))):
            self.seen.setdefault(name, []).append((text.at[0], value[0]))
        return Assignment(text.loss.topk(keep).indices.sort(-1).values)


@pytest.mark.parametrize("name", ["llama", "granite", "cohere2", "llava", "qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_what_a_further_forward_tells(name):
    model, batch = shared(name), batch_of(name)
    Expected.seen.clear()
    with toy(Expected, "prompt") as key, model.compressed(key, ratio=0.5):
        logits_of(model, batch)
        uses = model.compression.last
    assert sum(uses.prompt_tokens) > sum(uses.layer_tokens[0])
    full = FullLength(name, batch, batch["input_ids"][:, :1])
    logits, maps = full.run([full.causal(i) for i in range(full.layers)])
    for b, ((at, loss), (_, attention)) in enumerate(zip(Expected.seen["loss"], Expected.seen["attention"])):
        p = logits[b].log_softmax(-1)
        first = int(batch["attention_mask"][b].long().argmax())
        want = torch.tensor([0.0 if i == first else -p[i - 1, batch["input_ids"][b, i]] for i in at.tolist()])
        close(loss, want)
        close(attention, maps[1][b, :, -1].mean(0)[at])


def test_layers_behind_the_deepest_are_not_run(monkeypatch):
    class Shallow(Expected):
        def reads(self, depth):
            return {Read("layer", 1, "attention")}

        def assign(self, text, keep):
            return Assignment(text.attention(1).topk(keep).indices.sort(-1).values)

    model, runs = shared("llama"), []
    for i, layer in enumerate(model.model.layers):
        original = type(layer).forward
        monkeypatch.setattr(layer.mlp, "forward", lambda x, i=i, f=layer.mlp.forward: runs.append(i) or f(x))
    with toy(Shallow, "prompt") as key, model.compressed(key, ratio=0.5):
        model(**batch_of("llama"))
    assert original and [runs.count(i) for i in range(4)] == [2, 1, 1, 1]  # attention of layer 1 is the last thing read


def test_undeclared_reads_are_refused():
    class Asks(Every):
        def assign(self, text, keep):
            return Assignment(text.loss.topk(keep).indices)

    model = shared("llama")
    with toy(Asks, "prompt") as key, model.compressed(key, ratio=0.5), pytest.raises(RuntimeError, match="reads"):
        model(**batch_of("llama"))


def test_merged_text():
    """An answer that merges: the mean of the embeddings stands at the kept place."""

    class Pools(Every):
        def assign(self, text, keep):
            n = text.ids.shape[1]
            groups = (torch.arange(n) * keep // n)[None]
            first = torch.tensor([[int((groups[0] == k).long().argmax()) for k in range(keep)]])
            return Assignment(first, groups)

    name = "llama"
    model, batch = shared(name), batch_of(name)
    with torch.no_grad(), toy(Pools, "prompt") as key, model.compressed(key, ratio=0.5):
        got, last = logits_of(model, batch), model.compression.last
    table = bare(name).get_input_embeddings()
    for b, kept in enumerate(last.layer_index[0]):
        rows = batch["attention_mask"][b].nonzero()[:, 0].tolist()
        free = rows[1:-2]
        keep = len(set(kept) & set(free))
        x = table(batch["input_ids"][b]).detach()
        parts = [[free[i] for i in range(len(free)) if i * keep // len(free) == k] for k in range(keep)]
        states = torch.stack([x[rows[0]], *(x[p].mean(0) for p in parts), *(x[r] for r in rows[-2:])])
        with torch.no_grad():
            close(got[b, -1], bare(name)(inputs_embeds=states[None], use_cache=False).logits[0, -1])


@torch.no_grad()
def test_turns():
    """A second turn is shortened like the first; what is generated continues the whole conversation."""
    name = "llama"
    model, batch = shared(name), batch_of(name)
    with toy(Every, "prompt") as key, model.compressed(key, ratio=0.5):
        first = greedy(model, batch)
        more = torch.cat([first.out.sequences, batch["input_ids"][:, -9:]], 1)
        mask = torch.cat(
            [batch["attention_mask"], torch.ones(2, more.shape[1] - batch["input_ids"].shape[1])], 1
        ).long()
        second = model.generate(more, attention_mask=mask, past_key_values=first.cache, **GREEDY)
        held = first.cache.layers[0].layout
    assert second.shape[1] == more.shape[1] + GREEDY["max_new_tokens"]
    assert held.seen == second.shape[1] - 1 and len(held) < held.seen - 10


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_later_turns_of_a_batch_are_those_of_its_samples(name):
    """Further forwards see the rows of their turn alone, under masks of a model's own making too."""
    model, batch, new = shared(name), batch_of(name), torch.arange(20, 34)[None]

    def second(one):
        rows = len(one["input_ids"])
        kinds = {"token_type_ids": torch.zeros(rows, 14, dtype=torch.long)} if name == "gemma3" else {}
        mask = torch.cat([one["attention_mask"], torch.ones(rows, 14, dtype=torch.long)], 1)
        cache = model(**one, use_cache=True).past_key_values
        return model(new.expand(rows, -1), attention_mask=mask, past_key_values=cache, **kinds).logits

    with toy(Expected, "prompt") as key, model.compressed(key, ratio=0.5):
        close(second(batch)[1:], second(alone(name, batch, 1)))


def test_labels_stay():
    """Rows with labels and those that predict one never go, and the loss is that of the short prompt."""
    name = "llama"
    model, batch = shared(name), batch_of(name)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-6] = -100
    with toy(Every, "prompt") as key, model.compressed(key, ratio=0.5):
        loss = model(**batch, labels=labels, use_cache=False).loss
        last = model.compression.last
    for rows in last.layer_index[0]:
        assert set(range(labels.shape[1] - 7, labels.shape[1])) <= set(rows)
    tokens = batch["input_ids"][:, :1]
    logits = torch.stack([x[-7:-1] for x in short_rows(name, batch, tokens, last.layer_index[0])])
    close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, -6:].flatten()))


def short_rows(name, batch, tokens, kept):
    """(rows, V) logits per sample of the prompt cut by hand."""
    out = []
    for b, rows in enumerate(kept):
        full = FullLength(name, batch, tokens)
        take = lambda kw, b=b, rows=rows: dict(
            kw,
            inputs_embeds=kw["inputs_embeds"][b : b + 1, rows],
            position_ids=torch.arange(len(rows))[None],
            attention_mask=torch.ones(1, len(rows), dtype=torch.long),
        )
        with torch.no_grad():
            out.append(rerun(full.model, full.batch, take, None)[0][0])
    return out


@pytest.mark.parametrize(
    ("knobs", "arguments", "message"),
    [
        ({}, dict(prefill_chunk_size=4), "prefill_chunk_size=4: method='toy' decides"),
        ({}, dict(cache_implementation="static"), "cache_implementation='static' .*method='toy' cannot act"),
    ],
)
def test_refused_calls(knobs, arguments, message):
    model, batch = shared("llama"), batch_of("llama")
    with (
        toy(Every, "prompt") as key,
        model.compressed(key, ratio=0.5, **knobs),
        pytest.raises(ValueError, match=message),
    ):
        model.generate(**batch, **arguments)


def test_embeddings_without_ids_are_refused():
    model, batch = shared("llama"), batch_of("llama")
    x = model.get_input_embeddings()(batch["input_ids"])
    with toy(Every, "prompt") as key, model.compressed(key, ratio=0.5), pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=x, attention_mask=batch["attention_mask"])


def test_positions_that_do_not_go_together():
    model = shared("llava")
    with toy(Every, "prompt") as key, pytest.raises(ValueError, match="give both methods the same positions"):
        model.compress(["fastervlm", key], ratio=0.5, positions=["original", "auto"])


class Answers(Every):
    """Answers that cannot be carried out."""

    kind: ClassVar[str] = "more"

    def assign(self, text, keep):
        n = text.ids.shape[1]
        every = torch.arange(n)[None]
        wrong = {"more": every, "twice": torch.zeros_like(every[:, :keep]), "flat": every[0, :keep]}
        wrong |= {"outside": every[:, :keep] + n, "real": every[:, :keep].float()}
        return "nothing" if self.kind == "none" else Assignment(wrong.get(self.kind, every[:, :keep]))

    def make(self, text, assignment):
        return text.embeddings.mean(1) if self.kind == "vectors" else None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("more", r"kept of shape \(1, 21\) for 1 sequences of 21 tokens that keep 10"),
        ("twice", "kept are indices below 21, each once"),
        ("outside", "kept are indices below 21, each once"),
        ("flat", r"kept of shape \(10,\)"),
        ("real", "kept of torch.float32"),
        ("none", "answered with str; an Assignment"),
        ("vectors", r"made vectors of shape .*\(1, 10, 32\)"),
    ],
)
def test_answers_that_cannot_be_carried_out_are_refused(wrong, message):
    class Wrong(Answers):
        kind = wrong

    model = shared("llama")
    refused = pytest.raises(ValueError, match=f"method='toy' .*{message}")
    with toy(Wrong, "prompt") as key, model.compressed(key, ratio=0.5), refused:
        model(**batch_of("llama"))


@torch.no_grad()
def test_nothing_is_made_where_nothing_goes():
    class Makes(Every):
        def make(self, text, assignment):
            return torch.zeros_like(assignment.pick(text.embeddings))

    model, batch = shared("llama"), batch_of("llama")
    plain = logits_of(model, batch)
    for budget in ({"ratio": 0}, {"keep": 1000}):
        with toy(Makes, "prompt") as key, model.compressed(key, **budget):
            assert torch.equal(logits_of(model, batch), plain)


@pytest.mark.parametrize("cls", [Every, Expected])
@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_what_is_generated_without_a_cache_is_no_prompt(cls, name):
    model, batch = shared(name), batch_of(name)
    with toy(cls, "prompt") as key, model.compressed(key, ratio=0.5):
        close(greedy(model, batch, use_cache=False).logits, greedy(model, batch).logits)


@torch.no_grad()
def test_two_stages_read_one_layer():
    """What the prompt stage reads ahead is still recorded for a method between the layers."""
    model, batch = shared("llava"), batch_of("llava")
    with toy(Expected, "prompt") as key, model.compressed([key, "fastv"], ratio=[0.5, 0.4], layer=2):
        run, last = greedy(model, batch), model.compression.last
    full, held = FullLength("llava", batch, run.tokens), last.layer_index
    order = full.columns(held[0]).long().cumsum(1).sub(1).clamp(min=0)
    full = FullLength("llava", batch, run.tokens, order)
    close(run.logits, full.logits(full.survivors(held)))


@pytest.mark.parametrize("read", [Read("layer", 4, "attention"), Read("layer", 1, "hidden"), Read("tower", 0, "key")])
def test_reads_that_nobody_shows_are_refused(read):
    class Reads(Every):
        def reads(self, depth):
            return {read}

    with toy(Reads, "prompt") as key, pytest.raises(ValueError, match=r"method='toy' reads .*has 4 layers"):
        shared("llama").compress(key, ratio=0.5)


@pytest.mark.parametrize("stage", ["vision", "decoder", "cache"])
def test_a_method_is_of_its_stage(stage):
    with pytest.raises(ValueError, match=rf"register\('toy'\): .*{stage} stage is a .*Method; .*Every'> is none"):
        toy(Every, stage).__enter__()
