"""Decoder methods: plans and choices against the numbers of their cards."""

from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch

from hf_compress import registry
from hf_compress.budget import check_ratio
from hf_compress.engine import decoder, state
from hf_compress.engine.decoder import newest_votes, voters
from hf_compress.engine.plans import plans_of
from hf_compress.engine.stage import Budgeted
from hf_compress.engine.state import Forward, Given
from hf_compress.layout import Layout
from hf_compress.methods.decoder.fastv import FastV
from hf_compress.methods.decoder.pyramiddrop import PyramidDrop
from tests.invariants.reference import alone, batch_of, logits_of, shared, unchanged


class Rows:
    """The rows that enter a layer, with given attention; `visual` places, one image unless told."""

    def __init__(self, attention, visual, image=None):
        self.attention_, self.asked = torch.tensor(attention), []
        self.visual = torch.zeros(self.attention_.shape, dtype=torch.bool)
        self.visual[:, visual] = True
        self.valid = torch.ones_like(self.visual)
        self.image = torch.where(self.visual, 0, -1) if image is None else torch.tensor(image)
        last = torch.full((len(self.visual), 1), self.visual.shape[1] - 1)
        self.speaks = torch.zeros_like(self.visual).scatter(1, last, True)

    @property
    def removable(self):
        return self.visual

    def attention(self, *, source):
        self.asked.append(source)
        return self.attention_


def kept(method, rows, *counts):
    return [row.nonzero()[:, 0].tolist() for row in method.decide(rows, list(counts)).stays(rows.valid.shape[1])]


def test_fastv_card():
    """Last row .30 .10 | .05 .20 .01 .08 .20 .03 | .02 .01 with the image at 2..7, half removed."""
    rows = Rows([[0.30, 0.10, 0.05, 0.20, 0.01, 0.08, 0.20, 0.03, 0.02, 0.01]], range(2, 8))
    assert kept(FastV(), rows, 3) == [[0, 1, 3, 5, 6, 8, 9]]
    assert rows.asked == ["own"]


def test_fastv_plan_of_the_card():
    """V=576, T=32, K=2, ratio .5: R=.5333, 269 tokens, achieved .49967."""
    plan = FastV().plan(32, 576, Fraction(1, 2))
    assert plan == {2: 269}
    assert pytest.approx(0.49967, abs=1e-5) == 1 - (2 * 576 + 30 * 269) / (32 * 576)


@pytest.mark.parametrize(("removed", "mean"), [(0.5, 306), (0.75, 171)])
def test_fastv_means_of_the_table(removed, mean):
    ratio = check_ratio(removed) * 30 / 32
    (n,) = FastV().plan(32, 576, ratio).values()
    assert (2 * 576 + 30 * n) / 32 == mean


def test_fastv_reach():
    assert FastV(layer=1).plan(4, 8, Fraction(7, 10)) == {1: 1}
    with pytest.raises(ValueError, match=r"0 <= ratio < 0\.9375"):
        FastV().plan(32, 576, Fraction(15, 16))


def test_pyramiddrop_stage_counts_of_the_card():
    """T=8, V=8, boundaries 2, 4, 6: 8 8 4 4 2 2 1 1, mean 3.75, removed .53125."""
    assert PyramidDrop().plan(8, 8, Fraction(17, 32)) == {2: 4, 4: 2, 6: 1}
    assert PyramidDrop().boundaries(32) == (8, 16, 24)


def test_pyramiddrop_defaults_of_the_paper():
    """576 / 288 / 144 / 72 at a mean of 270."""
    plan = PyramidDrop().plan(32, 576, 1 - Fraction(270, 576))
    assert plan == {8: 288, 16: 144, 24: 72}


def test_pyramiddrop_choices_of_the_card():
    """First stage to {0,1,2,4}, second to {2,4} of the original image."""
    first = Rows([[0.1, 0.3, 0.2, 0.05, 0.25, 0.02, 0.04, 0.04, 0.0]], range(8))
    assert kept(PyramidDrop(), first, 4) == [[0, 1, 2, 4, 8]]
    assert first.asked == ["next"]
    second = Rows([[0.2, 0.1, 0.5, 0.25, 0.0]], range(4))
    assert [[0, 1, 2, 4, 8][i] for i in kept(PyramidDrop(), second, 2)[0]] == [2, 4, 8]


def test_the_last_row_of_the_prompt_stays():
    """A prompt that ends with its image: the row that predicts the answer is kept, within the count."""
    assert kept(FastV(), Rows([[0.5, 0.4, 0.3, 0.2, 0.1]], range(1, 5)), 2) == [[0, 1, 4]]


@pytest.mark.parametrize("method", [FastV(layer=1), PyramidDrop()])
def test_ties_go_to_the_lower_index(method):
    assert kept(method, Rows([[0.1] * 6], range(1, 5)), 2) == [[0, 1, 2, 5]]


@pytest.mark.parametrize("method", [FastV(layer=1), PyramidDrop()])
def test_padding_and_text_neither_win_nor_lose(method):
    """Invalid rows never stay, text always does, rows without images are whole."""
    rows = Rows([[9.0, 0.1, 0.2, 0.3, 0.9, 0.0], [9.0, 8.0, 0.2, 0.3, 0.9, 0.0]], [1, 2, 3])
    rows.valid[0, 0] = False
    rows.visual[1] = False
    assert kept(method, rows, 1, 0) == [[3, 4, 5], [0, 1, 2, 3, 4, 5]]


def test_scopes():
    """Joint ranking may empty an image; per image each keeps its share."""
    rows = lambda: Rows([[0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.0]], range(6), [[0, 0, 0, 0, 1, 1, -1]])
    assert kept(FastV(), rows(), 3) == [[0, 1, 2, 6]]
    assert kept(FastV(scope="per_image"), rows(), 3) == [[0, 1, 5, 6]]


@pytest.mark.parametrize("method", [FastV(layer=1), PyramidDrop()])
def test_schedule_per_sample(method):
    """Every sample has its own counts, samples without images none."""
    by_ratio = Budgeted("some", method, Fraction(2, 5), None)
    plan = plans_of(by_ratio, 4, [16, 8, 0], [1, 1, 0], 1, {})
    alone = [method.plan(4, n, Fraction(2, 5)) for n in (16, 8)]
    assert plan == {layer: [alone[0][layer], alone[1][layer], 0] for layer in alone[0]}
    absolute = plans_of(Budgeted("some", method, None, 10), 4, [16, 32], [1, 2], 1, {})
    assert absolute == plans_of(Budgeted("some", method, Fraction(6, 16), None), 4, [16, 32], [1, 2], 1, {})


@pytest.mark.parametrize("method", [FastV(layer=1), PyramidDrop()])
def test_ratio_zero_keeps_everything(method):
    assert set(method.plan(8, 576, Fraction(0)).values()) == {576}


def test_newest_rows_vote(monkeypatch):
    """The shortcut for prompts without padding and answers is what a look at the rows says."""
    rows = torch.arange(5).expand(2, -1)
    slots = rows, rows, torch.full_like(rows, -1)
    whole, padded = (Layout(*slots, rows >= first, torch.zeros(2), 5) for first in (0, 1))
    labels = torch.tensor([[-100, -100, -100, 7, -100], [-100, 7, 7, -100, 7]])

    def forward(**given):
        return Forward(Given({}, size=(2, 5), **given), state.Rows(local=rows))

    prompt = forward(), forward(prompt_rows=5)
    assert all(newest_votes(f, whole) and voters(f, whole)[0].tolist() == [[4], [4]] for f in prompt)
    other = forward(prompt_rows=3), forward()
    other[1].given.inputs["labels"] = labels
    assert not any(newest_votes(f, whole) for f in other) and not newest_votes(prompt[0], padded)
    assert voters(other[0], whole)[0].tolist() == [[2], [2]]
    rows_, weight = voters(other[1], whole)
    assert rows_.tolist() == [[2, 0], [0, 3]] and weight.tolist() == [[1, 0], [1, 1]]
    monkeypatch.setattr(decoder, "newest_votes", lambda *_: False)
    for f in prompt:
        for layout in (whole, padded):
            assert voters(f, layout)[0].tolist() == [[4], [4]] and bool((voters(f, layout)[1] == 1).all())


# -- plans that depend on the budget ----------------------------------------------------------------------------------
@dataclass
class Curve(FastV):
    """FastV that cuts before a layer which the ratio and the number of visual tokens choose."""

    def boundaries(self, layers):
        return range(1, layers)

    def at(self, tokens, ratio):
        return 1 if tokens > 40 else 2 + (ratio < Fraction(1, 4))

    def plan(self, layers, tokens, ratio):
        return FastV(layer=self.at(tokens, ratio)).plan(layers, tokens, ratio) if ratio else {}


@dataclass
class Early(FastV):
    """Cuts where its boundaries do not say."""

    def plan(self, layers, tokens, ratio):
        return {1: tokens} | super().plan(layers, tokens, ratio)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    for name, cls in (("curve", Curve), ("early", Early)):
        registry.register(name, stage="decoder", paper="control", needs={"visual"})(cls)


@pytest.mark.parametrize(("ratio", "layer"), [(0, None), (0.2, 3), (0.3, 2), (0.45, 2)])
def test_the_cut_may_depend_on_the_ratio(ratio, layer, registered):
    model, batch = shared("llava"), batch_of("llava")
    expected = logits_of(model, batch)
    if layer is not None:
        with model.compressed("fastv", ratio=ratio, layer=layer):
            expected = logits_of(model, alone("llava", batch, 1))
    with model.compressed("curve", ratio=ratio):
        given = batch if layer is None else alone("llava", batch, 1)
        assert torch.equal(logits_of(model, given), expected)


def test_the_cut_may_depend_on_the_sample(registered):
    """Rows of one batch are cut before different layers, each as alone; by `keep` too."""
    model, batch = shared("llava"), batch_of("llava")
    for budget in (dict(ratio=0.3), dict(keep=24)):
        with model.compressed("curve", **budget):
            together = logits_of(model, batch)
            for b in range(2):
                single = alone("llava", batch, b)
                n = single["input_ids"].shape[1]
                torch.testing.assert_close(together[b : b + 1, -n:], logits_of(model, single), rtol=0, atol=1e-5)


def test_a_plan_outside_its_boundaries_is_refused(registered):
    with (
        unchanged(shared("llava")),
        pytest.raises(ValueError, match=r"'early' drops before layers \[1\], which are none"),
    ):
        shared("llava").compress("early", ratio=0.3)


@dataclass
class Anything(FastV):
    """Says nothing of visual tokens, and drops what the base class names: visual tokens."""


def test_a_method_that_would_be_idle_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register("anything", stage="decoder", paper="control")(Anything)
    model = shared("llama")
    with pytest.raises(ValueError, match="'anything' needs visual tokens in the prompt, which Llama"):
        model.compress("anything", ratio=0.2)
    assert model.compression is None
