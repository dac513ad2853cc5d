"""Methods that choose heads by a measurement, and the measurements: cards, slow formulas, whole models."""

import itertools
import json
import math
from fractions import Fraction

import pytest
import torch

import hf_compress
from hf_compress import calibrate
from hf_compress.calibrate.retrieval import echo_induction
from hf_compress.calibrate.semantic import recall
from hf_compress.methods.cache.compresskv import CompressKV, by_errors
from hf_compress.methods.cache.razor import Razor
from hf_compress.stores.compensated import CompensatedStore
from hf_compress.stores.ragged import Ragged, attend
from tests.invariants.reference import alone, bare, batch_of, close, fresh, greedy, logits_of, shared, slots, unchanged
from tests.methods.edited import LONG, Random, assert_entries, best, edited_logits
from tests.tiny import IMG

RETRIEVAL = [[0, 1], [2, 0]]
NEEDLE = (2, 29)
MODELS = pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl"])


# -- razor: cards and slow formulas ---------------------------------------------------------------------------------
def test_razor_card_weights():
    """One kept entry with q k = 1, two dropped with q k = 0: weights .5761 and .4239 (2 / (2 + e))."""
    keys, values = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 0], [0, 1]])
    query = torch.tensor([1.0, 0]).view(1, 1, 1, 2)
    lead = torch.tensor([[[0.0, math.log(2)]]])
    none = torch.zeros(1, 1, 0, 2)
    out = attend(query, 1.0, Ragged(keys, [[2]], lead), Ragged(values, [[2]]), (none, none), None)
    torch.testing.assert_close(out[0, 0, 0], torch.tensor([0.5761, 0.4239]), atol=1e-4, rtol=0)


def test_razor_card_window():
    """L = 32768 and f = .15: the window L / 5 leaves .3201 of all entries, and the ratio gives the window back."""
    L, f = 32768, Fraction(15, 100)
    window = max(4000, L // 5)
    remaining = f + (1 - f) * Fraction(4 + window + 1, L)
    assert round(float(remaining), 4) == 0.3201
    store = CompensatedStore(frozenset(), 1 - (1 - remaining) / (1 - f), sinks=4, window=1)
    assert store.local(L) == 4 + 1 + window
    assert (
        store.local(3) == 3
        and store.local(8) == 6
        and CompensatedStore(frozenset(), Fraction(1, 9), 4, 4000).local(999) == 999
    )


def razor_by_hand(prompt, b, h, local, sinks, retrieves, rotated):
    rows, keys, values = prompt.rows(b), prompt.keys[b, h], prompt.values[b, h]
    out = {r: (keys[r], values[r], 0.0) for r in rows}
    if retrieves or len(rows) <= local:
        return out
    dropped = rows[sinks : len(rows) - (local - sinks - 1)]
    middle = dropped[len(dropped) // 2]
    key = keys[dropped].mean(0)
    if not rotated:
        flat = torch.stack([prompt.turned(keys[r], b, r, -1) for r in dropped]).mean(0)
        key = prompt.turned(flat, b, middle, 1)
    for r in dropped:
        del out[r]
    out[middle] = key, values[dropped].mean(0), math.log(len(dropped))
    return out


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rotated", [True, False])
def test_razor_by_hand(groups, rotated):
    """What each head holds, and attention over it in both forms, against explicit logits; ragged, left padded."""
    prompt = Random(groups, kv_heads=3)
    for share, sinks in ((Fraction(1, 2), 4), (Fraction(1, 3), 2), (Fraction(3, 4), 0)):
        method = Razor(sinks=sinks, rotated=rotated)
        method._store = store = CompensatedStore(frozenset({(1, 2)}), share, sinks, 1, rotated)
        held = prompt.settle(method, "1/2", layer=1)
        query = torch.randn(2, prompt.heads, 1, 8)
        bias, (keys, values) = held.bias, held.whole()
        tail = torch.randn(2, 2, 3, 1, 8).unbind(0)
        out = attend(query, 0.5, *held.body, tail, None)
        for b, h in itertools.product(range(2), range(prompt.heads)):
            kv = h // groups
            local = store.local(prompt.lengths[b])
            expected = razor_by_hand(prompt, b, kv, local, sinks, kv == 2, rotated)
            assert_entries(prompt.held(held, b, kv), expected)
            k, v = (torch.stack([*(e[i] for e in expected.values()), tail[i][b, kv, 0]]) for i in range(2))
            logits = k @ query[b, h, 0] * 0.5 + torch.tensor([*(e[2] for e in expected.values()), 0.0])
            torch.testing.assert_close(out[b, 0, h], logits.softmax(0) @ v, atol=1e-5, rtol=1e-5)
            masked = keys[b, kv] @ query[b, h, 0] * 0.5 + bias[b, kv]
            masked = masked.masked_fill(~held.layout.valid[b, kv], -torch.inf)
            logits = torch.cat([masked, logits[-1:]])
            padded = logits.softmax(0) @ torch.cat([values[b, kv], tail[1][b, kv]])
            torch.testing.assert_close(padded, out[b, 0, h], atol=1e-5, rtol=1e-5)


def test_compensation_moves_with_its_rows():
    """Beams, repeats and moves of the cache carry the counts along."""
    prompt, method = Random(1), Razor()
    method._store = CompensatedStore(frozenset({(0, 0)}), Fraction(1, 2), 4, 1)
    held = prompt.settle(method, "1/3")
    before = held.bias
    assert before.max() > 1 and not before[:, 0].any()
    held.batch_repeat_interleave(2)
    assert torch.equal(held.bias, before.repeat_interleave(2, 0))
    held.reorder_cache(torch.tensor([3, 0, 1]))
    assert torch.equal(held.bias, before[[1, 0, 0]])
    held.offload(), held.prefetch()
    assert torch.equal(held.bias, before[[1, 0, 0]])
    assert sum(t.numel() for t in held.body[0].tensors()) > held.body[0].flat.numel()


# -- razor: whole models --------------------------------------------------------------------------------------------
@MODELS
@pytest.mark.parametrize("rotated", [True, False])
def test_razor_decodes_over_compensated_caches(name, rotated):
    """Later steps are the bare model with means in place of what was dropped, counted as often; sdpa and eager."""
    batch = batch_of(name)
    runs = {}
    for attn in ("sdpa", "eager"):
        model = shared(name, attn)
        plain = logits_of(model, batch)
        with model.compressed("razor", ratio=0.5, retrieval=RETRIEVAL, rotated=rotated):
            assert torch.equal(logits_of(model, batch), plain)
            first, runs[attn] = greedy(model, batch, max_new_tokens=1).cache, greedy(model, batch)
        close(runs[attn].logits, edited_logits(name, batch, first, runs[attn]))
    close(runs["sdpa"].logits, runs["eager"].logits)
    lengths = batch["attention_mask"].sum(1).tolist()
    for i, layer in enumerate(first.layers):
        for b, h in itertools.product(range(2), range(2)):
            local = max(lengths[b] * 1 // 3, 6)  # ratio 1/2 of everything is 2/3 of the local heads
            count = lengths[b] if [i, h] in RETRIEVAL else local
            assert layer.layout.counts[b, h] == count
            assert layer.bias[b, h].max() == pytest.approx(math.log(lengths[b] - count + 1))


@MODELS
def test_razor_rows_alone(name):
    model, batch = shared(name), batch_of(name)
    length = batch["input_ids"].shape[1]
    with model.compressed("razor", ratio=0.5, retrieval=RETRIEVAL):
        together = greedy(model, batch)
        for row in range(2):
            sample = alone(name, batch, row)
            single = greedy(model, sample)
            close(together.logits[row], single.logits[0])
            n = sample["input_ids"].shape[1]
            for i in range(4):
                mine = slots(together.cache, i, length + 5, 4)[row, :, length - n :]
                assert torch.equal(mine, slots(single.cache, i, n + 5, 4)[0])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("method", "knobs"),
    [("razor", {"retrieval": RETRIEVAL}), ("razor", {"retrieval": [[0, 0], [0, 1]]}), ("compresskv", {"window": 4})],
    ids=["razor", "razor-whole-layer", "compresskv"],
)
@pytest.mark.filterwarnings("ignore:compresskv")
def test_generation(method, knobs, attn):
    """Ratio 0 is the bare model; beams, samples, candidates and a second turn."""
    model, batch = shared("llava", attn), batch_of("llava")
    bare_run = greedy(model, batch)
    with model.compressed(method, ratio=0, **knobs):
        same = greedy(model, batch)
        assert torch.equal(same.logits, bare_run.logits) and torch.equal(same.tokens, bare_run.tokens)
    with model.compressed(method, ratio=0.5, **knobs):
        plain = greedy(model, batch)
        assert not torch.equal(plain.logits[:, 1:], bare_run.logits[:, 1:])
        sample = alone("llava", batch, 0)
        single = greedy(model, sample)
        options = dict(do_sample=False, suppress_tokens=[IMG])
        looked_up = model.generate(**sample, **options, max_new_tokens=5, prompt_lookup_num_tokens=2)
        assert torch.equal(looked_up[:, -5:], single.tokens)
        beams = dict(options, max_new_tokens=5, num_beams=3, num_return_sequences=2)
        together = model.generate(**batch, **beams)
        for row in range(2):
            one = model.generate(**alone("llava", batch, row), **beams)
            assert torch.equal(together[2 * row : 2 * row + 2, -5:], one[:, -5:])
        more = torch.cat([single.out.sequences, torch.tensor([[7, 8, 9]])], 1)
        turn = dict(input_ids=more, attention_mask=torch.ones_like(more), past_key_values=single.cache)
        run = model.generate(**turn, **options, max_new_tokens=3)
        assert run.shape[1] == more.shape[1] + 3
        again = greedy(model, sample).cache  # token by token gives the same second turn
        fed = [
            model(input_ids=more[:, i : i + 1], past_key_values=again).logits
            for i in range(again.get_seq_length(), more.shape[1])
        ]
        assert int(fed[-1][0, -1].index_fill(0, torch.tensor([IMG]), -torch.inf).argmax()) == int(run[0, more.shape[1]])


def test_razor_bytes():
    """Whole heads, cut heads, their counts and indices: the budget and nothing else."""
    model = shared("llama")
    batch = alone("llama", batch_of("llama"), 0)
    with model.compressed("razor", ratio=0.5, retrieval=RETRIEVAL), torch.no_grad():
        cache = model(**batch).past_key_values
        totals = model.compression.report().totals()
    length = batch["input_ids"].shape[1]
    entries = 2 * length + 6 * (length // 3)
    leads = 4 * 2 * 5
    indices = sum(t.numel() * t.element_size() for layer in cache.layers for t in layer.layout.tensors())
    assert totals["kv_bytes"] == 4 * (2 * entries * 8 + leads) + indices
    assert all(layer.keys.numel() == 0 for layer in cache.layers)
    assert entries / (8 * length) == 0.5


def test_short_prompts_stay_whole():
    model, batch = shared("llama"), batch_of("llama")
    plain = greedy(model, batch)
    with model.compressed("razor", ratio=0.5, retrieval=RETRIEVAL, window=4000):
        run = greedy(model, batch)
    assert torch.equal(run.logits, plain.logits)


# -- the file of a measurement --------------------------------------------------------------------------------------
def scores(**changes):
    """A measurement of tests.tiny "llama": 4 layers, 2 KV heads."""
    model = {"model_type": "llama", "layers": 4, "heads": 4, "kv_heads": 2}
    induction = [[0.1, 0.2], [0.3, 0.9], [0.0, 0.4], [0.5, 0.6]]
    echo = [[0.1, 0.2], [0.3, 0.2], [0.8, 0.4], [0.5, 0.6]]
    return {"version": 1, "model": model, "induction": induction, "echo": echo} | changes


def retrieval_of(model):
    return model.compression.context.stages["cache"].method._store.retrieval


def test_razor_reads_its_file(tmp_path):
    """The best by induction and the best by echo, over all layers; from the knob, or beside the checkpoint."""
    model, file = fresh("llama"), tmp_path / "retrieval_heads.json"
    with unchanged(model), pytest.raises(ValueError, match=r"(?s)no retrieval_heads.json.*calibrate.retrieval_heads"):
        model.compress("razor", ratio=0.5)
    file.write_text(json.dumps(scores()))
    with model.compressed("razor", ratio=0.5, heads_file=str(file)):
        assert retrieval_of(model) == {(1, 1), (2, 0)}
    with model.compressed("razor", ratio=0.2, heads_file=str(file), induction=0.4, echo=0.25):
        assert retrieval_of(model) == {(1, 1), (3, 1), (3, 0), (2, 0)}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with loaded.compressed("razor", ratio=0.5):
        assert retrieval_of(loaded) == {(1, 1), (2, 0)}
    with pytest.raises(ValueError, match=r"heads_file=.*missing.json' does not exist"):
        model.compress("razor", ratio=0.5, heads_file=str(tmp_path / "missing.json"))
    for changes in ({"version": 2}, {"model": scores()["model"] | {"layers": 5}}):
        file.write_text(json.dumps(scores(**changes)))
        with pytest.raises(ValueError, match="measure again"):
            model.compress("razor", ratio=0.5, heads_file=str(file))


def test_fewer_retrieval_heads_for_high_ratios(tmp_path):
    """Where ratio leaves less than they hold, fewer heads are used, with a warning; in the end it is refused."""
    model, file = shared("llama"), tmp_path / "heads.json"
    file.write_text(json.dumps(scores()))
    knobs = dict(heads_file=str(file), induction=0.5, echo=0.25)
    message = r"ratio=0.6 leaves less than its 5 retrieval heads of 8 hold; 2 are used"
    with pytest.warns(UserWarning, match=message), model.compressed("razor", ratio=0.6, **knobs):
        assert retrieval_of(model) == {(1, 1), (2, 0)}
    with unchanged(model), pytest.warns(UserWarning), pytest.raises(ValueError, match=r"less than 0.75 can be removed"):
        model.compress("razor", ratio=0.8, **knobs)
    with unchanged(model), pytest.raises(ValueError, match=r"4 retrieval heads of 8 .* less than 0.5"):
        model.compress("razor", ratio=0.5, retrieval=[[i, 0] for i in range(4)])


@pytest.mark.parametrize(
    ("method", "knobs", "message"),
    [
        ("razor", {"retrieval": [[4, 0]]}, r"\(4, 0\)\] are not"),
        ("razor", {"retrieval": [], "policy": "hold"}, "policy='hold' must be one of"),
        ("razor", {"sinks": -1}, "sinks=-1"),
        ("razor", {"window": 0}, "window=0"),
        ("razor", {"induction": 1.5}, "induction=1.5 must be a number of at least 0 and at most 1"),
        ("compresskv", {"heads": "adaptive"}, "one list"),
        ("compresskv", {"pooling": "max"}, "pooling='max'"),
        ("compresskv", {"voters": 0}, "voters=0"),
        ("compresskv", {"budget": "most"}, "budget='most' must be one of"),
        ("compresskv", {"heads_file": "/nowhere/at.json"}, "does not exist"),
    ],
)
def test_refused(method, knobs, message):
    model = shared("llama")
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.compress(method, ratio=0.5, **knobs)


@pytest.mark.parametrize(
    ("method", "model", "knob"),
    [("razor", "llama", "heads_file"), ("compresskv", "llama", "heads_file"), ("dymu", "llava", "thresholds_file")],
)
def test_files_that_hold_no_measurement(method, model, knob, tmp_path):
    model, file = shared(model), tmp_path / "measured.json"
    for content, message in ((b"", "Expecting value"), (b"[1]", "holds list, no object"), (b"\xff{", "decode")):
        file.write_bytes(content)
        damaged = rf"measured.json' is damaged \(.*{message}.*\); measure again, or give another {knob}="
        with unchanged(model), pytest.raises(ValueError, match=damaged):
            model.compress(method, ratio=0.5, **{knob: str(file)})
    with unchanged(model), pytest.raises(ValueError, match=f"{knob}=.* is a folder; name a file, such as"):
        model.compress(method, ratio=0.5, **{knob: str(tmp_path)})


def test_places_that_are_no_path():
    with pytest.raises(ValueError, match="path=5 must be the path of a file, or None"):
        calibrate.retrieval_heads(shared("llama"), tokens=2, path=5, progress=False)


# -- retrieval heads ------------------------------------------------------------------------------------------------
def test_echo_and_induction_by_hand(monkeypatch):
    """Attention to earlier occurrences of a row's token, and to the tokens behind them; in blocks as in one piece."""
    K, copies, H, d = 5, 3, 4, 6
    S = 1 + K * copies
    query, key = torch.randn(1, H, S, d), torch.randn(1, 2, S, d)
    expected = torch.zeros(2, H)
    for h in range(H):
        logits = (query[0, h] @ key[0, h // 2].T * 0.7).masked_fill(~torch.ones(S, S).tril().bool(), -torch.inf)
        a = logits.softmax(-1)
        for r in range(1 + K, S):
            for c in range(1, r):
                same = (r - 1) % K == (c - 1) % K  # the token of row r is that of row 1 + (r - 1) % K
                expected[0, h] += a[r, c] * same / (S - 1 - K)
                expected[1, h] += a[r, c + 1] * same / (S - 1 - K)
    for chunk in (2**24, 3 * H * S):
        monkeypatch.setattr("hf_compress.calibrate.retrieval.CHUNK", chunk)
        got = torch.stack(echo_induction(query, key, 0.7, K, copies)).float()
        torch.testing.assert_close(got, expected)


def test_an_induction_head_is_found():
    """Keys that say "my predecessor was x" and queries that ask "who follows x" score 1."""
    K, copies = 6, 2
    token = torch.cat([torch.tensor([K]), torch.arange(K).repeat(copies)])
    one = torch.eye(K + 1)
    before = torch.cat([one[K:], one[token[:-1]]])
    induction = echo_induction(one[token][None, None], before[None, None], 100.0, K, copies)
    echo = echo_induction(one[token][None, None], one[token][None, None], 100.0, K, copies)
    assert induction[1] > 0.99 and induction[0] < 0.01
    assert echo[0] == pytest.approx(0.5, abs=0.01) and echo[1] < 0.01  # half of it on the row itself


@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_mixed"])
def test_scan_of_models(name, tmp_path, capsys):
    """Scores of every KV head (the best of its group) from the attention of the bare model; nothing is left behind."""
    model, path = fresh(name, "sdpa"), tmp_path / "heads.json"
    with unchanged(model):
        data = calibrate.retrieval_heads(model, tokens=12, copies=3, path=path)
    assert "retrieval heads: 100%" in capsys.readouterr().err
    assert data == json.loads(path.read_text())
    eager, seen = bare(name), {}
    ids = None

    def note(module, args, kwargs, out):
        seen[module.layer_idx] = out[1][0]

    def prompt(module, args, kwargs):
        nonlocal ids
        ids = kwargs["input_ids"]

    handle = model.get_decoder().register_forward_pre_hook(prompt, with_kwargs=True)
    calibrate.retrieval_heads(model, tokens=12, copies=3, path=path, progress=False)
    handle.remove()
    assert ids.shape == (1, 37) and torch.equal(ids[0, 1:13], ids[0, 13:25]) and torch.equal(ids[0, 1:13], ids[0, 25:])
    assert ids[0, 0] == 1 and not set(ids[0, 1:].tolist()) & {0, 1, 2, IMG if name == "llava" else 0}
    handles = [layer.self_attn.register_forward_hook(note, with_kwargs=True) for layer in eager.get_decoder().layers]
    with torch.no_grad():
        eager.get_decoder()(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    rows = torch.arange(13, 37)
    for i in range(4):
        if name == "qwen2_mixed" and data["echo"][i] is None:
            assert eager.config.layer_types[i] == "sliding_attention"
            continue
        for kind, shift in (("echo", 0), ("induction", 1)):
            mine = sum(seen[i][:, r, c + shift] for r in rows.tolist() for c in range(r - 12, 0, -12)) / len(rows)
            torch.testing.assert_close(torch.tensor(data[kind][i]), mine.view(2, 2).amax(1), atol=1e-5, rtol=0)
    assert (None in data["echo"]) == (name == "qwen2_mixed")
    with model.compressed("razor", ratio=0.4, heads_file=str(path)):
        greedy(model, batch_of(name), max_new_tokens=2)


def test_scans_need_a_bare_model_and_a_place(tmp_path):
    model = shared("llama")
    with pytest.raises(ValueError, match=r"path=None.*heads_file="):
        calibrate.retrieval_heads(model)
    with model.compressed("knorm", ratio=0.5), pytest.raises(ValueError, match="decompress"):
        calibrate.retrieval_heads(model, tokens=4, path=tmp_path / "x.json")
    with pytest.raises(ValueError, match="copies=1"):
        calibrate.retrieval_heads(model, copies=1, path=tmp_path / "x.json")


# -- compresskv -----------------------------------------------------------------------------------------------------
def test_compresskv_card():
    """Errors .4 .3 .2 .1, C = 100: 141, 114, 86, 59."""
    assert by_errors(100, 1000, (0.4, 0.3, 0.2, 0.1), 32) == (141, 114, 86, 59)
    assert by_errors(100, 1000, (1.0, 0.0, 0.0, 0.0), 32) == (300, 34, 33, 33)  # clipped; the others get what is left


@pytest.mark.parametrize(("mean", "length"), [(100, 1000), (100, 120), (40, 1000), (20, 1000), (7, 7), (33, 34)])
@pytest.mark.parametrize("errors", [(0.97, 0.01, 0.01, 0.01), (0.25,) * 4, (1.0, 0.0, 0.0, 0.0), (0.0,) * 4])
def test_layer_budgets_sum(mean, length, errors):
    """Between the least and three means, never more than the prompt, in the order of the errors; the sum is exact."""
    counts = by_errors(mean, length, errors, 32)
    assert sum(counts) == 4 * mean
    assert min(counts) >= min(32, mean) and max(counts) <= min(3 * mean, length)
    assert list(counts) == sorted(counts, reverse=True)


def votes_by_hand(prompt, b, voters, window, kernel):
    rows = prompt.rows(b)
    old = rows[: len(rows) - window]
    received = torch.stack([prompt.attention(b, h)[rows[-window:]].sum(0) for h in voters]).mean(0).tolist()
    votes = [received[j] if j in old else 0.0 for j in range(LONG)]
    pooled = {j: sum(votes[max(0, j - kernel // 2) : j + kernel // 2 + 1]) / kernel for j in old}
    return pooled, old, rows[-window:]


@pytest.mark.parametrize("groups", [1, 2])
def test_compresskv_by_hand(groups):
    """The best query heads of the layer choose one list for all KV heads; without a file all heads do."""
    prompt = Random(groups, kv_heads=4)
    heads = torch.rand(2, prompt.heads).tolist()
    for measured in (None, {"heads": heads, "errors": [0.7, 0.3]}):
        method = CompressKV(window=3, kernel=3, voters=2, least=1)
        method._measured = measured
        held = prompt.settle(method, "1/2", layer=1)
        voters = sorted(range(prompt.heads), key=lambda h: -heads[1][h])[:2] if measured else range(prompt.heads)
        for b in range(2):
            budget = prompt.lengths[b] // 2
            if measured:
                budget = by_errors(budget, prompt.lengths[b], (0.7, 0.3), 1)[1]
                assert budget < prompt.lengths[b] // 2
            score, old, recent = votes_by_hand(prompt, b, voters, 3, 3)
            kept = sorted(best(score, old, budget - 3) + recent)
            for h in range(4):
                assert sorted(prompt.held(held, b, h)) == kept


def test_compresskv_without_a_file_warns_and_is_uniform():
    model, batch = shared("llama"), batch_of("llama")
    message = r"no semantic_heads.json.*calibrate.semantic_heads"
    with pytest.warns(UserWarning, match=message), model.compressed("compresskv", ratio=0.5, window=4):
        logits_of(model, batch)
        assert model.compression.last.cache_tokens == [[12, 7]] * 4


def test_recall():
    assert recall([1, 2, 2, 5], [2, 2, 2, 3]) == 0.5 and recall([], [1]) == 0 and recall([4, 4], [4]) == 1


def needle_samples(name, model, count=4):
    """Prompts whose "answer" is what the bare model says anyway, where it has a token of the needle."""
    out = []
    for seed in itertools.count():
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 80, (1, 30), generator=g)
        if name == "llava":
            ids = torch.cat([ids, torch.full((1, 36), IMG)], 1)
        extra = {"pixel_values": torch.rand(1, 3, 24, 24, generator=g)} if name == "llava" else {}
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}
        answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
        if set(answer) & set(ids[0, slice(*NEEDLE)].tolist()):
            out.append({**inputs, "needle": NEEDLE, "answer": answer if out else [0, 0, 0]})  # the first one fails
        if len(out) == count:
            return out


def attention_and_outputs(model, sample, tokens):
    """Bare eager model, teacher-forced: attention (H, T, S) of the rows that give the tokens, and block outputs."""
    rows = {}
    answer = torch.tensor([tokens[:-1]])
    ids = torch.cat([sample["input_ids"], answer], 1)
    inputs = {k: v for k, v in sample.items() if k not in ("needle", "answer", "attention_mask", "input_ids")}

    def note(module, args, kwargs, out):
        rows[module.layer_idx] = out

    layers = model.get_decoder().layers
    handles = [layer.self_attn.register_forward_hook(note, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        cache = model(input_ids=ids, **inputs, use_cache=True).past_key_values
    for handle in handles:
        handle.remove()
    return rows, cache


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_semantic_heads_by_hand(name, tmp_path, capsys):
    """Credits and errors against one teacher-forced pass of the bare model in eager attention."""
    model, eager, path = fresh(name, "sdpa"), bare(name), tmp_path / "heads.json"
    samples = needle_samples(name, eager)
    logits_of(model, batch_of(name))  # towers set attributes at their first call
    sizes = dict(keep=12, voters=2, window=4, kernel=3)
    with unchanged(model):
        data = calibrate.semantic_heads(model, samples, **sizes, max_new_tokens=6, path=path)
    assert "semantic heads: 100%" in capsys.readouterr().err and data == json.loads(path.read_text())
    heads, tokens, passes = torch.zeros(4, 4, dtype=torch.float64), [], []
    for sample in samples:
        ids = sample["input_ids"]
        inputs = {k: v for k, v in sample.items() if k not in ("needle", "answer")}
        tokens.append(eager.generate(**inputs, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist())
        passes.append(attention_and_outputs(eager, sample, tokens[-1]))
    credited = 0
    for sample, answer, (rows, _) in list(zip(samples, tokens, passes))[1:]:
        L, needle = sample["input_ids"].shape[1], sample["input_ids"][0, slice(*NEEDLE)].tolist()
        for step, token in enumerate(answer):
            for place in needle:
                if place == token:
                    credited += 1
                    for i in range(4):
                        heads[i] += rows[i][1][0, :, L - 1 + step, slice(*NEEDLE)].sum(1) / (len(samples) - 1)
    assert credited >= 3
    torch.testing.assert_close(torch.tensor(data["heads"], dtype=torch.float64), heads, atol=1e-5, rtol=0)
    errors = [layer_error(eager, i, heads[i], samples, tokens, passes) for i in range(4)]
    expected = torch.tensor(errors) / sum(errors)
    torch.testing.assert_close(torch.tensor(data["errors"]), expected, atol=1e-4, rtol=0)
    assert expected.max() - expected.min() > 0.02
    model.compress("compresskv", ratio=0.5, heads_file=str(path), least=4, window=4)
    logits_of(model, batch_of(name))
    counts = torch.tensor(model.compression.last.cache_tokens)
    lengths = batch_of(name)["attention_mask"].sum(1)
    assert torch.equal(counts.sum(0), 4 * (lengths // 2)) and counts.float().std(0).min() > 0
    assert (counts[expected.argsort()].diff(dim=0) >= 0).all()


def layer_error(model, i, heads, samples, tokens, passes):
    """Sum over steps of the relative change of the attention output when the prompt is reduced to 12 entries."""
    voters = heads.argsort(descending=True, stable=True)[:2].tolist()
    total = 0.0
    for sample, answer, (rows, cache) in zip(samples, tokens, passes):
        L = sample["input_ids"].shape[1]
        a = rows[i][1][0]  # (H, L + T - 1, L + T - 1)
        votes = [float(a[voters, L - 4 : L, j].sum()) / 2 if j < L - 4 else 0.0 for j in range(L)]
        pooled = {j: sum(votes[max(0, j - 1) : j + 2]) / 3 for j in range(L - 4)}
        keep = sorted(best(pooled, list(pooled), 8) + list(range(L - 4, L)))
        values = cache.layers[i].values[0].repeat_interleave(2, 0)
        for t in range(1, len(answer)):
            row = L - 1 + t
            seen = [*keep, *range(L, row + 1)]
            part = a[:, row, seen] / a[:, row, seen].sum(1, keepdim=True)  # softmax over fewer entries
            mixed = torch.stack([part[h] @ values[h, seen] for h in range(4)]).flatten()
            with torch.no_grad():
                out = model.get_decoder().layers[i].self_attn.o_proj(mixed)
            whole = rows[i][0][0, row]
            total += float((out - whole).norm() / (whole.norm() + 1e-5))
    return total


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(input_ids=torch.ones(2, 9, dtype=torch.long)), r"samples\[0\]: input_ids must be a \(1, L\) tensor"),
        (dict(needle=(5, 40)), r"samples\[0\]: needle=\(5, 40\)"),
        (dict(answer=[0]), "none of 1 answers"),
        (dict(keep=40), "no prompt is longer"),
        (dict(keep=4), "keep=4 must be larger than window=4"),
        (dict(kernel=2), "kernel=2 must be odd"),
    ],
)
def test_samples_are_checked(changes, message, tmp_path):
    model, path = shared("llama"), tmp_path / "heads.json"
    sample = needle_samples("llama", model, 2)[1]
    sizes = dict(keep=12, window=4, kernel=3) | {k: v for k, v in changes.items() if k in ("keep", "kernel")}
    sample |= {k: v for k, v in changes.items() if k not in sizes}
    with unchanged(model), pytest.raises(ValueError, match=message):
        calibrate.semantic_heads(model, [sample], **sizes, max_new_tokens=6, path=path, progress=False)
    assert not path.exists()


def test_measured_methods_are_listed():
    assert {"razor", "compresskv"} <= set(hf_compress.methods("cache"))
