"""Cache methods: choices against the numbers of their cards, and against slow formulas on whole models."""

import pytest
import torch

from hf_compress.engine.evict import entries
from hf_compress.methods.cache.h2o import H2O
from hf_compress.methods.cache.knorm import KNorm
from hf_compress.methods.cache.snapkv import SnapKV
from hf_compress.methods.cache.streaming import Streaming
from hf_compress.tensors.attention import column_sums
from hf_compress.tensors.select import best_slots
from tests.invariants.reference import FullLength, batch_of, greedy, shared, slots

RATIO, NEW = 0.5, 5


class Entries:
    """The entries of one layer and head: (1, 1, S) tensors as `CacheView` gives them."""

    def __init__(self, length, budget, keys=None, votes=None, sums=None, incoming=0):
        self.keys = torch.zeros(1, 1, length, 2) if keys is None else keys
        self.valid = torch.ones(1, 1, length, dtype=torch.bool)
        self.order = torch.arange(length)[None, None]
        self.lengths, self.shape = torch.tensor([[[length]]]), (1, 1, length)
        self.budget = torch.tensor([[[budget]]])
        self.incoming, self.scores = incoming, sums
        self.votes, self.asked = votes, []

    def window_attention(self, rows):
        self.asked.append(rows.tolist())
        return self.votes

    def column_sums(self, *, normalize):
        return self.sums_of(normalize)

    def keep(self, method, count=None):
        """Slots that stay."""
        count = int(self.budget) if count is None else count
        return best_slots(method.score(self), self.valid, torch.tensor([count]))[0][0, 0].tolist()


def row(*values):
    return torch.tensor([[values]], dtype=torch.float32)


# -- cards ----------------------------------------------------------------------------------------------------------
def test_streaming_card():
    """L=10, ratio .4, four sinks: {0,1,2,3,8,9}."""
    assert entries(torch.tensor([10]), RATIO * 4 / 5, None).tolist() == [6]
    assert Entries(10, 6).keep(Streaming()) == [0, 1, 2, 3, 8, 9]
    assert Entries(10, 3).keep(Streaming()) == [0, 1, 9]  # the newest entry takes the place of a sink
    assert Entries(10, 1).keep(Streaming()) == [9]
    assert Entries(10, 6).keep(Streaming(sinks=0)) == [4, 5, 6, 7, 8, 9]


def test_h2o_card():
    """Sums 2.4 .8 .5 .3, C=3, R=1: {0,1,3}; the sums come from the rows of the card."""
    rows = torch.tensor([[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.5, 0.1, 0.4, 0], [0.3, 0.3, 0.1, 0.3]])
    sums = rows.sum(0)[None, None]
    torch.testing.assert_close(sums, row(2.4, 0.8, 0.5, 0.3))
    assert Entries(4, 3, sums=sums).keep(H2O()) == [0, 1, 3]
    normalized = sums / torch.tensor([4, 3, 2, 1])
    torch.testing.assert_close(normalized, row(0.6, 0.8 / 3, 0.25, 0.3))
    query = rows.clamp(min=1e-30).log()[None, None]  # one-hot keys: logits are the rows themselves
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    got = column_sums(query, torch.eye(4)[None, None], 1.0, lambda part: mask[part][None, None], torch.ones(1, 4))
    torch.testing.assert_close(got, sums)


def test_h2o_step():
    """While decoding the incoming token counts as recent: of C=4 one more recent and two heavy entries stay."""
    assert Entries(4, 4, sums=row(0.1, 2.0, 0.3, 0.0), incoming=1).keep(H2O(), 3) == [1, 2, 3]


@pytest.mark.parametrize(("pooling", "kept"), [("avg", [1, 2]), ("max", [0, 1])])
def test_snapkv_card(pooling, kept):
    """Votes .15 .25 .2 .2 on four older keys, kernel 3; two of them and the window stay."""
    votes = row(0.15, 0.25, 0.2, 0.2, 9.0, 9.0)
    view = Entries(6, 4, votes=votes)
    method = SnapKV(window=2, kernel=3, pooling=pooling)
    score = method.score(view)[0, 0, :4]
    expected = {"avg": [0.1333, 0.2, 0.2167, 0.1333], "max": [0.25, 0.25, 0.25, 0.2]}[pooling]
    torch.testing.assert_close(score, torch.tensor(expected), atol=1e-4, rtol=0)
    assert view.asked == [[2]]
    assert view.keep(method) == [*kept, 4, 5]


def test_snapkv_window_shrinks_to_half_a_small_budget():
    view = Entries(8, 4, votes=row(*range(8)))
    assert view.keep(SnapKV(window=32, kernel=1)) == [4, 5, 6, 7] and view.asked == [[2]]
    view = Entries(8, 1, votes=row(*range(8)))
    assert view.keep(SnapKV(window=32)) == [7] and view.asked == [[1]]


def test_knorm_card():
    """Norms 3, 1, 2, .5 with C=2: {1, 3}."""
    keys = torch.tensor([[[[3.0, 0], [0, 1], [2, 0], [0.3, 0.4]]]])
    assert Entries(4, 2, keys=keys).keep(KNorm()) == [1, 3]


def test_knorm_layer_budgets_sum():
    """Two whole layers: C' = (N C - 2 L) / (N - 2), remainders to the first layers; impossible ones are refused."""
    method, budget, lengths = KNorm(skip_layers=2), torch.tensor([15, 9]), torch.tensor([20, 11])
    counts = torch.stack([method.layer_budget(budget, lengths, i, 5) for i in range(5)])
    assert counts[:2].tolist() == [[20, 11]] * 2
    assert counts.sum(0).tolist() == [75, 45] and counts[2:].max(0).values.sub(counts[2:].min(0).values).max() <= 1
    with pytest.raises(ValueError, match="skip_layers=2"):
        method.layer_budget(torch.tensor([5]), torch.tensor([20]), 2, 5)


@pytest.mark.parametrize(("ratio", "expected"), [(0.4, [6, 3]), (0.5, [5, 2]), (0.99, [1, 1]), (0, [10, 5])])
def test_entries_round_down(ratio, expected):
    assert entries(torch.tensor([10, 5]), ratio, None).tolist() == expected
    assert entries(torch.tensor([10, 5]), None, 7).tolist() == [7, 7]  # room for what comes, where the policy holds


# -- whole models ---------------------------------------------------------------------------------------------------
MODELS = pytest.mark.parametrize("name", ["llama", "qwen3", "llava", "qwen2_5_vl"])


def groups(x, kv_heads):
    """(B, H, S) to (B, Hkv, S), mean over the query heads of a group."""
    return x.unflatten(1, (kv_heads, -1)).mean(2)


def valid_rows(batch, b):
    return batch["attention_mask"][b].nonzero()[:, 0].tolist()


def prompt_pass(name, batch):
    """The full-length reference of the prompt and its attention."""
    full = FullLength(name, batch, batch["input_ids"][:, :1])
    return full, full.run([full.causal(i) for i in range(full.layers)])[1]


def held_after(model, name, method, batch, steps, **knobs):
    """Per layer (B, Hkv, rows) bool, and the run."""
    with model.compressed(method, ratio=RATIO, **knobs):
        run = greedy(model, batch, max_new_tokens=steps)
    rows = batch["input_ids"].shape[1] + steps - 1
    kv = model.config.get_text_config().num_key_value_heads
    return [slots(run.cache, i, rows, kv) for i in range(4)], run


def best(score, candidates, count):
    """The `count` best, ties to the lower index."""
    return sorted(sorted(candidates, key=lambda j: (-score[j], j))[:count])


@MODELS
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_snapkv_on_models(name, pooling):
    model, batch = shared(name), batch_of(name)
    held, _ = held_after(model, name, "snapkv", batch, 1, window=4, kernel=3, pooling=pooling)
    full, attention = prompt_pass(name, batch)
    for layer in range(4):
        votes = groups(attention[layer][:, :, -4:].sum(2), full.kv_heads)
        for b in range(2):
            rows = valid_rows(batch, b)
            old = rows[:-4]
            for h in range(full.kv_heads):
                at = [0.0, *votes[b, h, old].tolist(), 0.0]
                windows = [at[j : j + 3] for j in range(len(old))]
                score = {j: sum(w) / 3 if pooling == "avg" else max(w) for j, w in zip(old, windows)}
                expected = sorted(best(score, old, len(rows) // 2 - 4) + rows[-4:])
                assert held[layer][b, h].nonzero()[:, 0].tolist() == expected


@MODELS
def test_knorm_on_models(name):
    """The bare model's cache says which keys are small."""
    model, batch = shared(name), batch_of(name)
    held, _ = held_after(model, name, "knorm", batch, 1)
    with torch.no_grad():
        cache = model(**batch).past_key_values
    for layer in range(4):
        norms = cache.layers[layer].keys.norm(dim=-1)
        for b in range(2):
            rows = valid_rows(batch, b)
            for h in range(norms.shape[1]):
                expected = best(-norms[b, h], rows, len(rows) // 2)
                assert held[layer][b, h].nonzero()[:, 0].tolist() == expected


@MODELS
def test_streaming_on_models(name):
    """At every step the first four entries and the newest ones, C in all."""
    model, batch = shared(name), batch_of(name)
    length = batch["input_ids"].shape[1]
    for steps in (1, 2, NEW):
        held, _ = held_after(model, name, "streaming", batch, steps)
        for b in range(2):
            prompt = valid_rows(batch, b)
            rows, budget = prompt + list(range(length, length + steps - 1)), len(prompt) // 2
            expected = rows[:4] + rows[-(budget - 4) :]
            for layer in held:
                assert all(head.nonzero()[:, 0].tolist() == expected for head in layer[b])


@MODELS
@pytest.mark.parametrize("normalize", [False, True])
def test_h2o_prompt_on_models(name, normalize):
    model, batch = shared(name), batch_of(name)
    held, _ = held_after(model, name, "h2o", batch, 1, normalize=normalize)
    full, attention = prompt_pass(name, batch)
    weight = full.valid[:, None, :, None].float()
    for layer in range(4):
        sums = groups((attention[layer] * weight).sum(2), full.kv_heads)
        for b in range(2):
            rows = valid_rows(batch, b)
            for h in range(full.kv_heads):
                score = {j: sums[b, h, j] / (len(rows) - r if normalize else 1) for r, j in enumerate(rows)}
                assert held[layer][b, h].nonzero()[:, 0].tolist() == h2o_choice(score, rows, len(rows) // 2)


def h2o_choice(score, rows, budget, arriving=0):
    """Half of the budget to the newest rows, the rest to the heaviest; `arriving` rows are recent already."""
    recent = budget // 2 - arriving
    newest = rows[len(rows) - recent :]
    return sorted(best(score, rows[: len(rows) - recent], budget - arriving - recent) + newest)


@MODELS
def test_h2o_decoding_on_models(name):
    """Scores go on being summed over what each step really saw; one entry leaves per step."""
    model, batch = shared(name), batch_of(name)
    _, run = held_after(model, name, "h2o", batch, NEW)
    full = FullLength(name, batch, run.tokens)
    see = [full.causal(i).expand(-1, full.kv_heads, -1, -1).clone() for i in range(4)]
    wide = lambda: [s.repeat_interleave(full.heads // full.kv_heads, 1) for s in see]
    attention = full.run(wide())[1]
    before = full.valid.clone()
    before[:, full.prompt :] = False
    weight = before[:, None, :, None].float()
    sums = [groups((a * weight).sum(2), full.kv_heads) for a in attention]
    budgets = [len(valid_rows(batch, b)) // 2 for b in range(2)]
    kept = [
        [[h2o_choice(sums[i][b, h], valid_rows(batch, b), budgets[b]) for h in range(full.kv_heads)] for b in range(2)]
        for i in range(4)
    ]
    for step in range(1, NEW):
        now = full.prompt + step - 1
        for i in range(4):
            for b in range(2):
                for h in range(full.kv_heads):
                    stay = h2o_choice(sums[i][b, h], kept[i][b][h], budgets[b], arriving=1) + [now]
                    kept[i][b][h] = stay
                    see[i][b, h, now] = False
                    see[i][b, h, now, stay] = True
        attention = full.run(wide())[1]
        held, _ = held_after(model, name, "h2o", batch, step + 1)
        for i in range(4):
            sums[i] = sums[i] + groups(attention[i][:, :, now], full.kv_heads)
            for b in range(2):
                for h in range(full.kv_heads):
                    assert held[i][b, h].nonzero()[:, 0].tolist() == kept[i][b][h]
