"""Vision methods that ask the first layers of the language model: the seam by a toy, and what is built on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from hf_compress.methods.base import VisionMethod
from hf_compress.signals import LOOKS, Assignment, Read
from hf_compress.tensors.select import top_sorted
from tests import tiny
from tests.invariants.language import FullLength
from tests.invariants.reference import alone, bare, batch_of, close, greedy, logits_of, shared, short_logits
from tests.tiny import BOS, IMG
from tests.toys import toy

MODELS = ["llava", "llava_window", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma", "idefics3"]


@dataclass
class Looked(VisionMethod):
    """What rows of the prompt look at in one layer; each crop by itself unless `whole`."""

    layer: int = 1
    rows: str = "last"
    seen: list[Any] = field(default_factory=list)

    def reads(self, depth):
        return {Read("layer", self.layer, "attention")}

    def assign(self, tokens, keep):
        heads = tokens.looked_at(self.layer, self.rows)
        self.seen.append((tokens.image[:, 0].tolist(), heads))
        return Assignment(top_sorted(heads.mean(1), keep))


class Together(Looked):
    """The same of all images of a sample."""

    scope = "sample"


def by_hand(name, sample, layer, rows, answer=0, whole=False):
    """(H, N) per image, or of all in one: a mean over rows of the eager maps of the bare model, row by row."""
    full = FullLength(name, sample, sample["input_ids"][:, :1])
    maps = full.run([full.causal(i) for i in range(full.layers)])[1][layer][0]
    images = full.visual(0)
    visual = {row for rows in full.images(0) for row in rows}
    stop = full.rows - answer
    out = []
    for mine in [[row for image in images for row in image]] if whole else images:
        later = [row for row in range(max(mine) + 1, stop)]
        voters = {"last": [stop - 1], "later": later, "text": [row for row in later if row not in visual]}[rows]
        total = torch.zeros(maps.shape[0], len(mine))
        for row in voters:
            total += maps[:, row, mine]
        out.append(total / max(1, len(voters)))
    return out


def shown(model, method):
    """(ordinal of the image in its sample, (H, N)) that a toy was shown, of every image."""
    return [(image, x) for images, heads in method.seen for image, x in zip(images, heads)]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("rows", LOOKS)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "llava_next"])
def test_rows_are_those_of_the_whole_prompt(name, rows, layer, attn):
    """Of a padded batch, against the maps of the bare model over each sample alone."""
    model = shared(name, attn)
    for side in ("left", "right"):
        batch = batch_of(name, side=side)
        with toy(Looked, "vision", {"visual"}) as key, model.compressed(key, ratio=0.5, layer=layer, rows=rows):
            logits_of(model, batch)
            seen = shown(model, model.compression.context.vision_method)
        expected = [(i, x) for b in range(2) for i, x in enumerate(by_hand(name, alone(name, batch, b), layer, rows))]
        assert len(seen) == len(expected) == 3
        for image, heads in expected:
            assert (
                min(float((heads - x).abs().max()) if x.shape == heads.shape else 1.0 for i, x in seen if i == image)
                < 1e-5
            )


@pytest.mark.parametrize("rows", LOOKS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_all_images_of_a_sample(name, rows):
    model, batch = shared(name), batch_of(name)
    with toy(Together, "vision", {"visual"}) as key, model.compressed(key, ratio=0.5, rows=rows):
        logits_of(model, batch)
        seen = shown(model, model.compression.context.vision_method)
    for row in range(2):
        (expected,) = by_hand(name, alone(name, batch, row), 1, rows, whole=True)
        assert any(x.shape == expected.shape and torch.allclose(x, expected, atol=1e-5) for _, x in seen)


def run(model, batch, method, **knobs):
    """Logits, kept tokens, and what the toy was shown."""
    with model.compressed(method, ratio=0.5, **knobs):
        out = logits_of(model, batch)
        return out, model.compression.last.visual_kept, shown(model, model.compression.context.vision_method)


@pytest.mark.parametrize("rows", LOOKS)
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_is_its_samples(name, rows):
    """Also with crops and newlines; and the kept sets are those of the short model."""
    model, batch = shared(name), batch_of(name)
    with toy(Looked, "vision", {"visual"}) as key, model.compressed(key, ratio=0.5, rows=rows):
        together, kept = greedy(model, batch), model.compression.last.visual_kept
        for row in range(2):
            sample = alone(name, batch, row)
            single = greedy(model, sample)
            assert model.compression.last.visual_kept == [kept[row]]
            close(single.logits[0], together.logits[row])
            close(single.logits[0], short_logits(name, sample, single.tokens[0], kept[row]))


@pytest.mark.parametrize(
    "kwargs", [dict(num_beams=3), dict(use_cache=False), dict(num_return_sequences=2, num_beams=2)]
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_searches_and_steps_without_a_cache(name, kwargs):
    """What is generated votes on nothing, however often the prompt is fed again."""
    model, batch = shared(name), batch_of(name)
    with toy(Looked, "vision", {"visual"}) as key:
        _, expected, _ = run(model, batch, key)
        with model.compressed(key, ratio=0.5):
            out = model.generate(**batch, **(tiny.GREEDY | kwargs))
            kept = model.compression.last.visual_kept
            alone_ = model.generate(**alone(name, batch, 0), **(tiny.GREEDY | kwargs))
    copies = len(out) // 2
    assert out[:copies, batch["input_ids"].shape[1] :].tolist() == alone_[:, -5:].tolist()
    assert kept[0] == expected[0] and kept[-1] == expected[1]


@pytest.mark.parametrize("rows", LOOKS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_answers_to_train_on_do_not_vote(name, rows):
    """Neither they nor what has read them, a second question for instance; and nothing of it has a gradient."""
    model, seen = shared(name), []
    question, answer, more = [7, 8], [20, 21, 22], [9, 9, 9, 9]
    for said in (answer, [40, 33, 70]):
        batch = tiny.batch(name, model, [[BOS, 5, IMG, *question, *said, *more]])
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -7:-4] = batch["input_ids"][:, -7:-4]
        with toy(Looked, "vision", {"visual"}) as key, model.compressed(key, ratio=0.5, rows=rows):
            model(**batch, labels=labels).loss.backward()
            seen += shown(model, model.compression.context.vision_method)
    model.zero_grad(set_to_none=True)
    sample = {k: v for k, v in batch.items()}
    (expected,) = by_hand(name, sample, 1, rows, answer=7)
    for _, heads in seen:
        assert not heads.requires_grad
        close(heads, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_later_turn_reads_its_own_rows(name):
    """What a picture of a second turn is looked at by is said in that turn; of earlier rows nothing is fed again."""
    model = shared(name)
    base, new = (tiny.batch(name, model, [prompt]) for prompt in ([BOS, 5, IMG, 7, 8], [IMG, 20, 21]))
    ids, n = torch.cat([base["input_ids"], new["input_ids"]], 1), base["input_ids"].shape[1]
    turn = dict(input_ids=new["input_ids"], attention_mask=torch.ones_like(ids), **tiny.encoder_inputs(new))
    if name == "qwen2_5_vl":
        whole = dict(new, input_ids=ids, image_grid_thw=torch.cat([base["image_grid_thw"], new["image_grid_thw"]]))
        del whole["pixel_values"], whole["attention_mask"]
        whole["mm_token_type_ids"] = (ids == IMG).int()
        turn["position_ids"] = bare(name).base_model.get_rope_index(**whole)[0][..., n:]
    with toy(Looked, "vision", {"visual"}) as key, model.compressed(key, ratio=0.5), torch.no_grad():
        cache = model(**base).past_key_values
        model(**turn, past_key_values=cache)
        seen = shown(model, model.compression.context.vision_method)
    (_, first), (ordinal, second) = seen
    assert ordinal == 1
    close(first, by_hand(name, base, 1, "last")[0], atol=1e-5)
    close(second, by_hand(name, new, 1, "last")[0], atol=1e-5)  # positions are relative


def test_samples_packed_into_one_row():
    model, prompts = shared("llava"), [[BOS, 5, IMG, 7, 8], [BOS, 11, IMG, 13, IMG, 14]]
    samples = [tiny.batch("llava", model, [prompt]) for prompt in prompts]
    samples[1]["pixel_values"] = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(5))
    row = {k: torch.cat([s[k] for s in samples], int(k == "input_ids")) for k in ("input_ids", "pixel_values")}
    places = [torch.arange(s["input_ids"].shape[1]) for s in samples]
    for rows in LOOKS:
        with toy(Looked, "vision", {"visual"}) as key, model.compressed(key, ratio=0.5, rows=rows):
            logits_of(model, row, position_ids=torch.cat(places)[None], use_cache=False)
            seen = shown(model, model.compression.context.vision_method)
        expected = [x for sample in samples for x in by_hand("llava", sample, 1, rows)]
        for (_, heads), x in zip(seen, expected, strict=True):
            close(heads, x, atol=1e-5)


def test_what_is_refused():
    """Layers that are not there or keep a state; what was not declared; a prompt in parts, caches for whole prompts."""
    with toy(Looked, "vision", {"visual"}) as key:
        for name, layer in (("llava", 4), ("llava", -1), ("qwen3_5", 0)):
            with pytest.raises(ValueError, match=r"'toy' reads Read.*those that attend show their 'attention'"):
                tiny.build(name).compress(key, ratio=0.5, layer=layer)
        model, batch = shared("llava"), batch_of("llava")
        with model.compressed(key, ratio=0.5):
            with pytest.raises(ValueError, match="which a chunk does not show"):
                greedy(model, batch, prefill_chunk_size=5)
            with pytest.raises(ValueError, match="vision methods that read no layer"):
                greedy(model, batch, cache_implementation="static")
            model.compression.context.vision_method.layer = 2
            with pytest.raises(ValueError, match=r"layer 2 of the language model but its reads\(\) does not name"):
                greedy(model, batch)
            model.compression.context.vision_method.layer, model.compression.context.vision_method.rows = 1, "first"
            with pytest.raises(ValueError, match=r"rows='first' asked for by method='toy' must be one of"):
                greedy(model, batch)


def test_no_further_forward_where_nobody_reads():
    """Prompts without images, and methods of other kinds, run the layers once."""
    model, runs = shared("llava"), []
    handle = model.get_decoder().layers[1].register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        with toy(Looked, "vision", {"visual"}) as key:
            for method, batch, times in ((key, "inputs", 2), (key, "text_only", 1), ("uniform", "inputs", 1)):
                with model.compressed(method, ratio=0.5):
                    logits_of(model, batch_of("llava", batch))
                assert len(runs) == times, (method, batch)
                runs.clear()
    finally:
        handle.remove()
