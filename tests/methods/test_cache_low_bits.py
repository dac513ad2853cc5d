"""Low-bit stores: the numbers of their cards, slow formulas step by step on random layers, bytes, and whole models."""

import copy
import functools
import math
import pickle
import types
from fractions import Fraction

import pytest
import torch
from transformers import DynamicCache

import hf_compress
from hf_compress.engine.entries import StoredView
from hf_compress.engine.evict import CachePolicy
from hf_compress.layout import Layout
from hf_compress.methods.cache.gear import Gear
from hf_compress.methods.cache.kivi import Kivi
from hf_compress.methods.cache.mikv import MiKV
from hf_compress.methods.cache.snapkv import SnapKV
from hf_compress.methods.cache.zipcache import ZipCache
from hf_compress.stores import HeldLayer
from hf_compress.stores.demoting import balance
from hf_compress.stores.kivi import KiviStore
from tests.invariants.reference import alone, bare, batch_of, close, fresh, greedy, logits_of, shared, untouched
from tests.stores.test_packed import slow_packed
from tests.tiny import GREEDY

MODELS = ["llama", "llava", "qwen2_5_vl"]


class Steps:
    """One layer of random queries, keys and values under a method: a left-padded prompt, then one token per step.

    Args:
        lengths: of the samples of the prompt.
    """

    def __init__(self, method, lengths, ratio=None, steps=0, heads=2, group=2, d=8, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        B, L = len(lengths), max(lengths)
        self.lengths, self.heads, self.group, self.d, self.rows = lengths, heads, group, d, L
        shape = (B, heads, L + steps, d)
        self.k, self.v = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
        self.q = (2 * torch.randn(B, heads * group, L + steps, d, generator=g)).to(dtype)
        self.valid = torch.arange(L + steps) >= L - torch.tensor(lengths)[:, None]
        self.held = HeldLayer()
        method.check(1, ratio and Fraction(ratio))
        self.policy = CachePolicy(method, ratio and Fraction(ratio), None, [0], 1)
        self.start()

    def layout(self, a, b):
        index = torch.arange(a, b).repeat(len(self.lengths), 1)
        zeros = torch.zeros(len(index), dtype=torch.int64)
        return Layout(index, index, torch.full_like(index, -1), self.valid[:, a:b], zeros, b)

    def start(self):
        layout, n = self.layout(0, self.rows), self.rows
        self.held.announce(layout)
        self.held.update(self.k[:, :, :n].clone(), self.v[:, :, :n].clone())
        record = (self.q[:, :, :n], self.k[:, :, :n], self.d**-0.5)
        self.policy.after_prompt(types.SimpleNamespace(layers=[self.held]), 0, layout, record, None)

    def step(self, tokens=1):
        """Feeds the next tokens; returns the keys and values that they attended to, themselves included."""
        n = self.rows
        self.policy.steps.before(self.held, 0)
        new = self.layout(n, n + tokens)
        self.held.announce(new)
        at = slice(n, n + tokens)
        keys, values = self.held.update(self.k[:, :, at].clone(), self.v[:, :, at].clone())
        self.policy.steps.after(self.held, new, (self.q[:, :, at], keys, self.d**-0.5))
        self.rows += tokens
        return keys, values

    def row(self, b, n=None):
        """Keys, values and queries of a sample without its padding, up to its n-th token."""
        first = int(self.valid[b].long().argmax())
        return [t[b, :, first:][:, :n] for t in (self.k, self.v, self.q)]

    def attention(self, q, keys, h):
        """(len(keys),) what the query heads of KV head h give each key, their mean."""
        heads = range(h * self.group, (h + 1) * self.group)
        return sum(torch.softmax(keys[h].float() @ q[i].float() / math.sqrt(self.d), 0) for i in heads) / self.group

    def alone(self, b, method, ratio=None):
        """The same sample in a batch of its own."""
        one = copy.copy(self)
        one.lengths, one.rows, one.held = [self.lengths[b]], self.lengths[b], HeldLayer()
        one.k, one.v, one.q = (t[None] for t in self.row(b))
        one.valid = torch.ones(1, one.k.shape[2], dtype=torch.bool)
        method.check(1, ratio and Fraction(ratio))
        one.policy = CachePolicy(method, ratio and Fraction(ratio), None, [0], 1)
        one.start()
        return one


def assert_slots(got, expected):
    """(H, n, d) of one sample, padding cut off by hand: what is read is the reference, bit for bit."""
    assert got.shape == expected.shape and torch.equal(got, expected), (got - expected).abs().amax((0, 2))


# -- kivi -----------------------------------------------------------------------------------------------------------
def slow_kivi(x, prompt, residual, group, bits, channel):
    """(H, n, d) of one sample: all but the newest packed, in groups that end where the residual of the prompt began."""
    n, edge = x.shape[1], prompt - residual
    ends = [e for e in range(edge % group, n + 1, group) if e <= edge + (n - prompt) // group * group]
    out, start = x.clone(), 0
    for end in ends:
        if end > start:
            block = x[:, start:end]
            out[:, start:end] = slow_packed(block, bits, (end - start, 1) if channel else (1, min(group, x.shape[2])))
        start = max(start, end)
    return out


@pytest.mark.parametrize(("residual", "group"), [(4, 4), (6, 4), (13, 8)])
@pytest.mark.parametrize("bits", [2, 8])
def test_kivi_step_by_step(bits, residual, group):
    """Samples of 15, 9 and 3 tokens in one batch, 20 steps: each is at every step what the formula says of it alone."""
    lengths = [15, 9, 3]
    run = Steps(Kivi(bits=bits, group=group, residual=residual), lengths, steps=20)
    for step in range(21):
        keys, values = run.held.whole() if step == 0 else run.step()
        for b, length in enumerate(lengths):
            k, v, _ = run.row(b, length + step)
            settled = length + max(step - 1, 0)  # the newest token came after the packing
            for got, x, channel in ((keys, k, True), (values, v, False)):
                expected = slow_kivi(x[:, :settled], length, residual, group, bits, channel)
                assert_slots(got[b, :, -(length + step) :], torch.cat([expected, x[:, settled:]], 1))


@pytest.mark.parametrize("residual", [3, 32])
def test_kivi_short_prompts_stay(residual):
    run = Steps(Kivi(bits=1, group=4, residual=residual), [3, 2], steps=1)
    keys, values = run.step()
    assert torch.equal(keys, run.k) and torch.equal(values, run.v)


def test_kivi_several_tokens_at_once():
    """What a forward appends stays until the next; then as if it had come token by token."""
    method = Kivi(bits=2, group=4, residual=4)
    many, single = Steps(method, [15, 9], steps=14), Steps(method, [15, 9], steps=14)
    keys, _ = many.step(13)
    assert torch.equal(keys[:, :, 15:], many.k[:, :, 15:28])
    for _ in range(13):
        single.step()
    for a, b in zip(many.step(), single.step()):
        assert torch.equal(a, b)


def test_kivi_candidates_can_be_taken_back():
    method = Kivi(bits=2, group=4, residual=4)
    run, plain = Steps(method, [15], steps=8), Steps(method, [15], steps=8)
    for _ in range(3):
        run.step(4)
        run.held.crop(-2)
        run.rows -= 2
        plain.step(2)
    for a, b in zip(run.step(), plain.step()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (4, 64), (8, 32), (1, 128)])
def test_kivi_bytes(bits, group):
    """Codes, and 4 bytes per group; the residual in 16 bits. At most 5 % over bits + 32 / group from 1024 tokens on."""
    H, d, L, R = 4, 128, 1024 + 77, 32
    run = Steps(Kivi(bits=bits, group=group, residual=R), [L], steps=group, heads=H, group=1, d=d, dtype=torch.bfloat16)
    packed = L - R
    codes, scales = 2 * H * packed * d * bits // 8, 4 * H * (-(-packed // group) * d + packed * d // group)
    assert run.held.nbytes() == codes + scales + 2 * 2 * H * d * R
    promised = 2 * H * d * (packed * (bits + 32 / group) + R * 16) / 8
    assert promised <= run.held.nbytes() <= 1.05 * promised
    run.step(group - 1)
    run.step()
    assert run.held.nbytes() == codes + scales + 2 * 2 * H * d * (R + group)  # packed before the next token
    run.policy.steps.before(run.held, 0)
    assert run.held.nbytes() == codes + scales + 2 * 2 * H * d * R + 2 * H * group * d * bits // 8 + 8 * H * d


@pytest.mark.parametrize(
    ("ratio", "bits"),
    [
        ("0.8125", [(2, 2)]),
        ("0.815", [(2, 2)]),
        ("0.82", [(2, 1), (2, 2)]),
        ("0.6875", [(4, 4)]),
        ("0.75", [(4, 2)]),
        ("0.875", [(1, 1)]),
    ]
    + [("0.65", [(4, 4), (8, 4)]), ("0.5", [(8, 4), (8, 8)])],
)
def test_kivi_ratio(ratio, bits):
    """One pair of widths within 1 % (2 % of the bytes above), else two neighbours in the share that meets the ratio."""
    method, total = Kivi(), 0.0
    method.check(32, Fraction(ratio))
    found = []
    for depth in range(32):
        held = HeldLayer()
        run = Steps(Kivi(), [40], d=32)
        view = StoredView(held := run.held, depth, 32, torch.tensor([40]), place=(depth, 32))
        held.body, held.keys, held.values = None, run.k, run.v
        method.packing().settle([held], [view])
        pair = tuple(part.packed.bits for part in held.body)
        found.append(pair)
        total += sum(b + 1 for b in pair) / 64
    assert sorted(set(found)) == bits
    assert abs(16 * (1 - float(Fraction(ratio))) - 16 * total / 16) < (0.16 if len(bits) == 1 else 0.07)


def test_kivi_refuses():
    with pytest.raises(ValueError, match=r"ratio=0.9: 8 to 1 bits with group=32 remove 0.4375 to 0.875"):
        Kivi().check(4, Fraction("0.9"))
    with pytest.raises(ValueError, match=r"ratio=0.3: .* remove 0.4688 to 0.9062"):
        Kivi(group=64).check(4, Fraction("0.3"))
    for knobs in (dict(bits=3), dict(group=2), dict(residual=0), dict(policy="hold")):
        with pytest.raises(ValueError, match=next(iter(knobs))):
            Kivi(**knobs)


class Counted(KiviStore):
    """Half of the entries, whatever they take."""

    def entries(self, length, share, sizes, index=0, outside=0):
        return length // 2


@pytest.mark.parametrize("heads", ["uniform", "adaptive"])
def test_evicted_and_packed(heads):
    """Heads of different lengths store what they keep and no more; each row is packed as alone."""
    kept = Steps(SnapKV(window=4, kernel=1, heads=heads), [40, 25], "0.5", steps=9)
    method = SnapKV(window=4, kernel=1, heads=heads)
    store = Counted(2, 2, 4, 6)
    method.packing = lambda: store  # type: ignore[method-assign]
    run = Steps(method, [40, 25], "0.5", steps=9)
    counts = run.held.layout.counts if heads == "adaptive" else torch.tensor([[20, 20], [12, 12]])
    assert torch.equal(kept.held.layout.valid, run.held.layout.valid)
    if heads == "adaptive":
        assert len(set(counts.flatten().tolist())) > 2
    n = run.held.keys.shape[2]
    packed = (counts - n).clamp(min=0)
    if heads == "uniform":  # rows are filled up to the longest, as in the bare cache
        packed = packed.amax().expand(2, 2)
    tokens, groups = int(packed.sum()), int(((packed + 3) // 4).sum())
    body = sum(t.numel() * t.element_size() for part in run.held.body for t in part.tensors())
    assert body == 2 * tokens * 2 + 4 * (groups * 8 + tokens * 2)
    for _ in range(9):
        (keys, values), (k, v) = run.step(), kept.step()
    for b in range(2):
        for h in range(2):
            c = int(counts[b, h])
            for got, x, channel in ((keys, k, True), (values, v, False)):
                x = x[b, h, -(c + 9) :][None]
                expected = slow_kivi(x[:, :-1], c, 6, 4, 2, channel)
                assert_slots(got[b, h, -(c + 9) :][None], torch.cat([expected, x[:, -1:]], 1))


# -- zipcache -------------------------------------------------------------------------------------------------------
def card_view():
    """The rows of the h2o card as one-hot keys: attention is [1], [.6 .4], [.5 .1 .4], [.3 .3 .1 .3]."""
    rows = torch.tensor([[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.5, 0.1, 0.4, 0], [0.3, 0.3, 0.1, 0.3]])
    run = Steps(Kivi(), [4], heads=1, group=1, d=4)
    run.held.body, run.held.keys, run.held.values = None, torch.eye(4)[None, None], run.v
    record = (rows.clamp(min=1e-30).log()[None, None], run.held.keys, 1.0)
    return StoredView(run.held, 0, 1, torch.tensor([4]), run.held.layout, record)


def test_zipcache_normalisation():
    """Rows 0 and 3 probe: [.65 .3 .1 .3]; the released code divides by all rows that see a token."""
    view, probes = card_view(), torch.tensor([[1.0, 0, 0, 1]])
    got = view.column_sums(weight=probes, normalize=True)
    torch.testing.assert_close(got, torch.tensor([[[0.65, 0.3, 0.1, 0.3]]]))
    sums = view.column_sums(weight=probes)
    torch.testing.assert_close(sums, torch.tensor([[[1.3, 0.3, 0.1, 0.3]]]))
    some = view.column_sums(weight=torch.tensor([[0, 0.5, 0, 2.0]]))
    torch.testing.assert_close(some, torch.tensor([[[0.9, 0.8, 0.2, 0.6]]]))
    picked = {}
    for normalize in ("paper", "code"):
        method = ZipCache(share=0.5, probes=1.0, normalize=normalize)
        method._probe_rows = lambda rows, layer: torch.tensor([True, False, False, True])  # type: ignore[method-assign]
        view = card_view()
        view.scores = method.begin(view)
        method.packing().settle([view.held], [view])
        picked[normalize] = view.held.body[0].prompt.members()[0, 0, 0].tolist()
    assert picked == {"paper": [True, True, False, False], "code": [True, False, False, True]}  # .325 .1 .05 .3


def test_zipcache_values_card():
    """v = [1 10 3], [2 40 -3] at 2 bits, one class: back [1 10.954 3], [1.348 40 -3]."""
    method = ZipCache(share=1.0)
    v = torch.tensor([[1.0, 10, 3, 0], [2, 40, -3, 0]]).view(1, 1, 1, 2, 4)
    v[..., 3] = v[..., 0]  # a fourth channel, as four codes make a byte; it changes no range
    every = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    _, values = method.packing()._mixed(v, v, ~every, every, most=(0, 2))
    torch.testing.assert_close(
        values.factor.flatten()[:3].float(), torch.tensor([1.4142, 6.3246, 1.7321]), atol=1e-3, rtol=0
    )
    expected = torch.tensor([[1, 10.954, 3], [1.348, 40, -3]])
    torch.testing.assert_close(values.read()[0, 0, 0, :, :3], expected, atol=0, rtol=2e-3)


def test_zipcache_probes():
    """The newest 5 % and as many random earlier rows, other ones in other layers, the same at every run."""
    method = ZipCache()
    rows = [method._probe_rows(200, layer) for layer in range(3)]
    for probing in rows:
        assert probing[190:].all() and probing.sum() == 20
    assert torch.equal(rows[0], ZipCache()._probe_rows(200, 0))
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], ZipCache(seed=1)._probe_rows(200, 0))
    assert method._probe_rows(3, 0)[-1] and sum(ZipCache(probes=1.0)._probe_rows(7, 0)) == 6
    assert [i for i, votes in enumerate(method.voting_rows(200, 100)) if votes][-5:] == list(range(95, 100))


def slow_zip(k, v, score, high):
    """Keys and values (H, n, d) of a block of one sample: of each head `high` salient tokens in 4 bits, others in 2."""
    H, n, d = k.shape
    kinds = []
    for h in range(H):
        order = sorted(range(n), key=lambda j: (-float(score[h, j]), j))
        kinds.append((sorted(order[:high]), sorted(order[high:])))
    factor = v.float().abs().amax(1, keepdim=True).sqrt().half().float()
    scaled, out_k, out_v = v.float() / factor, torch.empty_like(k), torch.empty_like(v)
    for kind, bits in ((0, 4), (1, 2)):
        at = [kinds[h][kind] for h in range(H)]
        for h in range(H):
            if at[h]:
                out_k[h, at[h]] = slow_packed(k[h, at[h]][None], bits, (len(at[h]), 1))[0]
        for i in range(len(at[0])):  # the i-th tokens of all heads share a range
            line = torch.cat([scaled[h, at[h][i]] for h in range(H)])
            back = slow_packed(line[None, None], bits, (1, H * d))[0, 0].view(H, d)
            for h in range(H):
                out_v[h, at[h][i]] = back[h] * factor[h, 0]
    return out_k, out_v


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("normalize", ["paper", "code"])
def test_zipcache_step_by_step(group, normalize):
    """Prompts of 24 and 17 tokens in one batch, then blocks of 6: probes, saliency, classes and codes by hand."""
    lengths, gap = [24, 17], 6
    method = ZipCache(gap=gap, probes=0.4, normalize=normalize)
    run = Steps(method, lengths, steps=15, group=group)
    voting = method.voting_rows(gap, gap)
    seen = [[], []]  # what each step read, per sample
    for step in range(16):
        keys, values = run.held.whole() if step == 0 else run.step()
        blocks = max(step - 1, 0) // gap
        for b, length in enumerate(lengths):
            k, v, q = run.row(b, length + step)
            seen[b].append(keys[b, :, -(length + step) :])
            parts, probing = [], method._probe_rows(length, 0).tolist()
            bounds = [(0, length)] + [(length + gap * j, length + gap * (j + 1)) for j in range(blocks)]
            for start, stop in bounds:
                score = torch.zeros(2, stop - start)
                votes = torch.zeros(stop - start)
                for r in range(start, stop):
                    if not (probing[r] if start == 0 else voting[r - start]):
                        continue
                    # the prompt saw itself as it was; a later row what was stored when it came
                    base = k[:, : r + 1] if start == 0 else seen[b][r - length + 1]
                    for h in range(2):
                        score[h, : r - start + 1] += run.attention(q[:, r], base, h)[start:]
                    votes[: r - start + 1] += 1
                n = stop - start
                score /= votes if normalize == "paper" else torch.arange(n, 0, -1)
                parts.append(slow_zip(k[:, start:stop], v[:, start:stop], score, n - int(0.4 * n + 1e-9)))
            done = bounds[-1][1]
            for got, x, i in ((keys, k, 0), (values, v, 1)):
                expected = torch.cat([*(part[i] for part in parts), x[:, done:]], 1)
                assert_slots(got[b, :, -(length + step) :], expected)


def test_zipcache_several_tokens_at_once():
    """A block that arrives at once is probed by the same rows as one that comes token by token."""
    many, single = (Steps(ZipCache(gap=6, probes=0.4), [24, 17], steps=8) for _ in range(2))
    many.step(6)
    for _ in range(6):
        single.step()
    for a, b in zip(many.step(), single.step()):
        assert torch.equal(a, b)
    assert many.held.keys.shape[2] == 1


def test_zipcache_grow_packs_the_prompt_only():
    run = Steps(ZipCache(policy="grow", gap=2), [24, 17], steps=5)
    for _ in range(5):
        keys, _ = run.step()
    assert len(run.held.body[0]) == 24 and torch.equal(keys[:, :, 24:], run.k[:, :, 24:])
    assert "scores" not in run.held.side  # nothing to accumulate


def test_mikv_grow_packs_the_prompt_only():
    run = Steps(MiKV(policy="grow"), [24, 17], steps=5)
    for _ in range(5):
        keys, _ = run.step()
    assert len(run.held.body[0]) == 24 and torch.equal(keys[:, :, 24:], run.k[:, :, 24:])
    assert "scores" not in run.held.side


@pytest.mark.parametrize(("ratio", "share"), [("0.78", None), ("0.8", None), ("0.86", None), (None, 0.4)])
def test_zipcache_bytes(ratio, share):
    """Everything that lies beside the codes is in the ratio; u = .4 is 3.2 bits and a little."""
    H, d, L = 8, 128, 1024
    method = ZipCache() if share is None else ZipCache(share=share)
    run = Steps(method, [L], ratio, steps=101, heads=H, group=1, d=d, dtype=torch.bfloat16)
    full, numbers = 2 * H * L * d * 2, 2 * H * L * d
    members = run.held.body[0].prompt.members()
    high = int(members[0, 0].sum())
    assert (members.sum(-1) == high).all()
    beside = 4 * L + 2 * 4 * H * d + 2 * H * d + 2 * H * L // 8  # scales of values and keys, channels, bitmaps
    assert run.held.nbytes() == 2 * H * d * (high * 4 + (L - high) * 2) // 8 + beside
    if ratio is None:
        assert high == L - int(0.4 * L) and 3.2 < run.held.nbytes() * 8 / numbers < 3.3
        return
    before = run.held.nbytes()
    assert 0 <= (1 - float(ratio)) - before / full < 0.0005
    run.step(100)
    run.step()
    assert run.held.keys.shape[2] == 1 and len(run.held.body[0]) == L + 100
    block = run.held.nbytes() - 2 * 2 * H * d - before  # has more beside its codes, so fewer of them in 4 bits
    least = 2 * H * d * 100 * 2 // 8 + 4 * 100 + 4 * H * d + 2 * H * d + 2 * H * 13  # all in 2 bits
    assert block <= max(least, (1 - float(ratio)) * 2 * H * 100 * d * 2)


def test_zipcache_refuses():
    for ratio in ("0.7", "0.875", "0.9"):
        with pytest.raises(ValueError, match=r"4 and 2 bits remove 0.75 to \(almost\) 0.875"):
            ZipCache().check(4, Fraction(ratio))
    ZipCache(high=8, low=4).check(4, Fraction("0.7"))
    for knobs in (dict(high=2), dict(high=3), dict(share=1.5), dict(probes=0), dict(gap=0), dict(normalize="x")):
        with pytest.raises(ValueError, match=r"low|high|share|probes|gap|normalize"):
            ZipCache(**knobs)


# -- mikv -----------------------------------------------------------------------------------------------------------
def test_mikv_balancer_card():
    """max |q| = [4 1], max |k| = [1 4]: both become [2 2]. Of a group of query heads the largest counts."""
    view = types.SimpleNamespace(
        valid=torch.tensor([[[False, True, True]]]),
        keys=torch.tensor([[[[9.0, 9], [-1, 4], [0.5, 2]]]]),
        queries=torch.tensor([[[[9.0, 9], [4, 0], [1, -1]], [[9.0, 9], [-2, 0.5], [1, 1]]]]),
    )
    factor = balance(view)
    torch.testing.assert_close(factor.flatten(), torch.tensor([0.5, 2]))
    torch.testing.assert_close(torch.tensor([1.0, 4]) / factor.flatten(), torch.tensor([2.0, 2]))
    torch.testing.assert_close(torch.tensor([4.0, 1]) * factor.flatten(), torch.tensor([2.0, 2]))


@pytest.mark.parametrize(("high", "size"), [(16, 0.325), (8, 0.231), (4, 0.181), (2, 0.156)])
def test_mikv_bytes(high, size):
    """r = .2 and groups of 64: 32.5, 23.1, 18.1 and 15.6 %; a bitmap and the balancer beside, nothing else."""
    H, d, L = 4, 128, 1000
    run = Steps(MiKV(high=high), [L], steps=6, heads=H, group=1, d=d, dtype=torch.bfloat16)
    full = 2 * H * d * L * 2
    for step in range(7):
        if step:
            run.step()
        n = L + max(step - 1, 0)
        r = n // 5
        bits = r * (16 if high == 16 else high + 0.5) + (n - r) * 2.5
        beside = 2 * H * -(-n // 8) + 2 * H * d
        assert run.held.nbytes() == 2 * H * d * bits / 8 + beside + (2 * 2 * H * d if step else 0)
        if not step:
            assert abs((run.held.nbytes() - beside) / full - size) < 5e-4 and beside < 0.003 * full


@pytest.mark.parametrize("high", [16, 8])
@pytest.mark.parametrize("group", [1, 2])
def test_mikv_step_by_step(high, group):
    """Prompts of 24 and 17 tokens in one batch, 12 steps: scores, members, demotions and codes by hand."""
    lengths, r = [24, 17], 0.3
    run = Steps(MiKV(share=r, high=high, group=4), lengths, steps=12, group=group)
    state = []
    for b, length in enumerate(lengths):
        k, v, q = run.row(b, length)
        score = torch.zeros(2, length)
        for row in range(length):
            for h in range(2):
                score[h, : row + 1] += run.attention(q[:, row], k[:, : row + 1], h)
        top = q.abs().amax(1).view(2, group, -1).amax(1)
        factor = (k.abs().amax(1) / top).sqrt().half().float()[:, None]
        important = [choice(score[h], range(length), int(r * length), length) for h in range(2)]
        state.append(dict(score=score, factor=factor, important=important))
    for step in range(13):
        keys, values = run.held.whole() if step == 0 else run.step()
        for b, length in enumerate(lengths):
            mine, n = state[b], length + step
            k, v, q = run.row(b, n)
            settled = length + max(step - 1, 0)
            if step == 0:
                mine["k"], mine["v"] = k.clone(), v.clone()
                changed = [range(length)] * 2
            else:
                changed = []
                for h in range(2):
                    held = [*mine["important"][h], *range(len(mine["k"][h]), settled)]
                    mine["important"][h] = choice(mine["score"][h], held, int(r * settled), settled)
                    changed.append(held)
                late = slice(mine["k"].shape[1], settled)
                mine["k"], mine["v"] = (torch.cat([mine[x], t[:, late]], 1) for x, t in (("k", k), ("v", v)))
            old = {x: mine[x].clone() for x in "kv"}
            for h in range(2):
                for j in changed[h]:
                    for x, factor in (("k", mine["factor"][h, 0]), ("v", torch.ones(8))):
                        fresh_ = j >= settled - 1 or step == 0
                        number = old[x][h, j]
                        if high == 8 and fresh_:
                            number = slow_packed((number / factor)[None, None], 8, (1, 4))[0, 0] * factor
                        if j not in mine["important"][h]:
                            base = number if high == 8 and step else old[x][h, j]
                            number = slow_packed((base / factor)[None, None], 2, (1, 4))[0, 0] * factor
                        mine[x][h, j] = number
            for got, x, t in ((keys, "k", k), (values, "v", v)):
                expected = torch.cat([mine[x], t[:, settled:]], 1)
                torch.testing.assert_close(got[b, :, -n:], expected, atol=2e-3 if high == 8 else 1e-6, rtol=0)
            if step:
                more = torch.zeros(2, n - mine["score"].shape[1])
                mine["score"] = torch.cat([mine["score"], more], 1)
                for h in range(2):
                    mine["score"][h] += run.attention(q[:, -1], keys[b, :, -n:], h)


def choice(score, held, count, n):
    """Of the entries held the newest half of the budget, and the heaviest others; ties to the lower index."""
    recent = [j for j in held if j >= n - max(1, count // 2)]
    old = sorted((j for j in held if j not in recent), key=lambda j: (-float(score[j]), j))
    return sorted((recent + old)[:count] if count < len(recent) else recent + old[: count - len(recent)])


def test_mikv_keeps_everything_at_one():
    """r = 1 changes no bit, nor does r = 1 in the prompt under policy='grow'."""
    for policy in ("hold", "grow"):
        run = Steps(MiKV(share=1.0, policy=policy), [24, 17], steps=4, dtype=torch.bfloat16)
        for _ in range(4):
            keys, values = run.step()
        for got, x in ((keys, run.k), (values, run.v)):
            assert torch.equal(got * run.valid[:, None, :, None], x * run.valid[:, None, :, None])


@pytest.mark.parametrize(
    ("ratio", "knobs"), [("0.5", {}), ("0.675", {}), ("0.8", {}), ("0.84375", {}), ("0.8", dict(high=8))]
)
def test_mikv_ratio(ratio, knobs):
    """r e_high + (1 - r) e_low = 16 (1 - ratio)."""
    H, d, L = 4, 128, 1024
    run = Steps(MiKV(**knobs), [L], ratio, heads=H, group=1, d=d, dtype=torch.bfloat16)
    share = run.held.nbytes() / (2 * H * d * L * 2)
    assert 0.995 * (1 - float(ratio)) < share < 1.02 * (1 - float(ratio))


def test_mikv_refuses():
    with pytest.raises(ValueError, match=r"16 and 2 bits in groups of 64 remove 0 to 0.8438"):
        MiKV().check(4, Fraction("0.85"))
    with pytest.raises(ValueError, match=r"8 and 2 bits in groups of 64 remove 0.4688 to 0.8438"):
        MiKV(high=8).check(4, Fraction("0.4"))
    for knobs in (dict(high=2, low=4), dict(high=3), dict(low=3), dict(share=-0.1), dict(group=1)):
        with pytest.raises(ValueError, match=r"low|high|share|group"):
            MiKV(**knobs)


# -- gear -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("outliers", "size"), [(0.02, 0.228), (0.0, 0.188)])
def test_gear_bytes(outliers, size):
    """L = 4096, d = 128, 2 bits, groups of 64, rank 4: 22.8 % with 2 % outliers, 18.8 % without; decode blocks."""
    H, d, L = 4, 128, 4096
    run = Steps(Gear(outliers=outliers), [L], steps=65, heads=H, group=1, d=d, dtype=torch.bfloat16)
    sparse = lambda n: 4 * (H * d * int(outliers * n) + n * int(outliers * H * d))
    block = lambda n, r: 2 * (n * H * d * 5 // 16 + 2 * r * H * (n + d)) + sparse(n)
    assert run.held.nbytes() == block(L, 4)
    assert abs(run.held.nbytes() / (2 * H * L * d * 2) - size) < 1e-3  # whole outliers per line
    run.step(64)
    run.step()
    assert run.held.nbytes() == block(L, 4) + block(64, 2) + 2 * 2 * H * d


@pytest.mark.parametrize("backbone", ["kivi", "kcvt"])
def test_gear_blocks(backbone):
    """The prompt, then six tokens at a time; codes alone (no outliers, rank 0) are the slow quantiser."""
    lengths = [24, 17]
    run = Steps(Gear(outliers=0.0, rank=0, later_rank=0, gap=6, group=4, backbone=backbone), lengths, steps=14)
    for step in range(15):
        keys, values = run.held.whole() if step == 0 else run.step()
        for b, length in enumerate(lengths):
            k, v, _ = run.row(b, length + step)
            bounds = [(0, length)] + [(length + 6 * j, length + 6 * (j + 1)) for j in range(max(step - 1, 0) // 6)]
            done = bounds[-1][1]
            parts = []
            for start, stop in bounds:
                x, y = k[:, start:stop], v[:, start:stop]
                if backbone == "kivi":
                    parts.append((slow_packed(x, 2, (4, 1)), slow_packed(y, 2, (1, 4))))
                else:
                    flat = slow_packed(y.transpose(0, 1).flatten(1)[None], 2, (1, 16))[0]
                    parts.append((slow_packed(x, 2, (stop - start, 1)), flat.unflatten(1, (2, 8)).transpose(0, 1)))
            for got, x, i in ((keys, k, 0), (values, v, 1)):
                expected = torch.cat([*(part[i] for part in parts), x[:, done:]], 1)
                assert_slots(got[b, :, -(length + step) :], expected)


@pytest.mark.parametrize("knobs", [dict(outliers=1.0), dict(rank=8, later_rank=8, outliers=0.0)])
def test_gear_identity(knobs):
    """All outliers, or full rank: the 16-bit numbers come back, in prompt and blocks."""
    run = Steps(Gear(gap=9, group=4, **knobs), [24, 17], steps=20, dtype=torch.bfloat16)
    for _ in range(20):
        keys, values = run.step()
    valid = run.valid[:, None, :, None]
    for got, x in ((keys, run.k), (values, run.v)):
        if "rank" in knobs:
            torch.testing.assert_close((got * valid).float(), (x * valid).float(), atol=0.03, rtol=0.01)
        else:
            assert torch.equal(got * valid, x * valid)


def test_gear_corrections_help():
    """Outliers and rank each bring the error down, in the prompt and in blocks."""
    errors = {}
    for name, knobs in {
        "codes": dict(outliers=0.0, rank=0, later_rank=0),
        "rank": dict(outliers=0.0),
        "outliers": dict(outliers=0.1, rank=0, later_rank=0),
        "both": dict(outliers=0.1),
    }.items():
        run = Steps(Gear(gap=32, group=32, **knobs), [96, 70], steps=34, d=32)
        for _ in range(34):
            keys, values = run.step()
        off = [(got - x)[run.valid[:, None].expand(got.shape[:3])] for got, x in ((keys, run.k), (values, run.v))]
        errors[name] = sum(float(e.square().sum()) for e in off)
    assert errors["both"] < min(errors["rank"], errors["outliers"])
    assert max(errors["rank"], errors["outliers"]) < errors["codes"]


@pytest.mark.parametrize(
    ("ratio", "plan"),
    [
        ("0.84375", (2, 0, 0)),
        ("0.8", (2, 4, Fraction(5, 1000))),
        ("0.77", (2, 4, Fraction(20, 1000))),
        ("0.7", (2, 4, Fraction(55, 1000))),
        ("0.69", (4, 3, 0)),
        ("0.5", (4, 4, Fraction(90, 1000))),
    ],
)
def test_gear_ratio(ratio, plan):
    """2 bits from .7 on, then rank, then outliers in steps of half a percent; the bytes are met at 1024 tokens."""
    H, d, L = 4, 128, 1024 + 33
    run = Steps(Gear(), [L], ratio, heads=H, group=1, d=d, dtype=torch.bfloat16)
    assert run.policy.method._plan(d) == plan
    assert 0.95 * (1 - float(ratio)) < run.held.nbytes() / (2 * H * d * L * 2) < 1.05 * (1 - float(ratio))


def test_gear_refuses():
    with pytest.raises(ValueError, match=r"ratio=0.85: codes of 2 bits remove 0.8438 of the bytes at most"):
        Gear().check(4, Fraction("0.85"))
    for knobs in (
        dict(bits=3),
        dict(outliers=2.0),
        dict(rank=-1),
        dict(gap=0),
        dict(backbone="x"),
        dict(policy="hold"),
    ):
        with pytest.raises(ValueError, match=next(iter(knobs))):
            Gear(**knobs)


# -- all of them ----------------------------------------------------------------------------------------------------
KNOBS = {
    "kivi": dict(bits=4, group=4, residual=4),
    "zipcache": dict(high=8, low=4, gap=4, probes=0.4),
    "mikv": dict(share=0.4, low=4),
    "gear": dict(bits=4, group=4, gap=4, outliers=0.1),
}
METHODS = pytest.mark.parametrize("method", KNOBS)
MAKE = {"kivi": Kivi, "zipcache": ZipCache, "mikv": MiKV, "gear": Gear}


@METHODS
def test_a_padded_row_is_packed_as_alone(method):
    """At every step the same numbers, read for read (gear: to the rounding of its 16-bit factors)."""
    lengths = [24, 17, 5]
    make = lambda: MAKE[method](**KNOBS[method])
    run = Steps(make(), lengths, steps=11)
    single = [run.alone(b, make()) for b in range(3)]
    for step in range(12):
        pair = run.held.whole() if step == 0 else run.step()
        for b, one in enumerate(single):
            own = one.held.whole() if step == 0 else one.step()
            for got, mine in zip(pair, own):
                got = got[b : b + 1, :, -mine.shape[2] :]
                if method == "gear":
                    torch.testing.assert_close(got, mine, atol=1e-3, rtol=0)
                else:
                    assert torch.equal(got, mine)


@METHODS
def test_rows_and_copies(method):
    """Beams change places and repeat, caches are copied, pickled and offloaded: all go on as they were."""
    run = Steps(MAKE[method](**KNOBS[method]), [24, 17], steps=12)
    for _ in range(6):
        run.step()
    which = torch.tensor([1, 0, 1])
    beams = copy.deepcopy(run)
    beams.held.reorder_cache(which)
    beams.k, beams.v, beams.q, beams.valid = (t[which] for t in (run.k, run.v, run.q, run.valid))
    beams.lengths = [17, 24, 17]
    loaded = copy.deepcopy(run)
    loaded.held = pickle.loads(pickle.dumps(run.held))
    loaded.held.offload()
    loaded.held.prefetch()
    for _ in range(6):
        expected = run.step()
        for a, b, c in zip(expected, beams.step(), loaded.step()):
            torch.testing.assert_close(b, a[which], atol=1e-6, rtol=0)
            assert torch.equal(a, c)
    assert run.held.nbytes() == loaded.held.nbytes()


@METHODS
def test_no_view_keeps_more_alive(method):
    """Storages are as large as what is counted, after the prompt and whenever something was packed."""
    run = Steps(MAKE[method](**KNOBS[method]), [24, 17], steps=9)
    for _ in range(9):
        run.policy.steps.before(run.held, 0)
        tensors = [*run.held.tensors(), *run.held.side.values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
        assert sum(storages.values()) <= sum(t.numel() * t.element_size() for t in tensors)
        assert all(t.untyped_storage().nbytes() == 0 for t in tensors if not t.numel())
        run.step()


@torch.no_grad()
def replayed(name, cache, run, step):
    """(V,) the bare eager model one token on, over the entries that a compressed cache of one sample unpacks to."""
    past = DynamicCache()
    for i, layer in enumerate(cache.layers):
        keys, values = layer.whole()
        past.update(keys[:, :, :-1], values[:, :, :-1], i)
    token = run.tokens[:, step - 1 : step]
    return (
        bare(name)
        .get_decoder()(inputs_embeds=bare(name).get_input_embeddings()(token), past_key_values=past, use_cache=True)
        .last_hidden_state[:, -1]
        @ bare(name).lm_head.weight.T
    )


@pytest.mark.parametrize(("name", "attn"), [("llama", "sdpa"), ("llama", "eager"), ("llava", "sdpa")])
@METHODS
def test_attention_reads_what_is_stored(method, name, attn):
    """The prompt is untouched; each later token attends to what the bodies unpack to, and to itself."""
    model, batch = shared(name, attn), batch_of(name)
    plain, sample = logits_of(model, batch), alone(name, batch, 1)
    before = greedy(model, sample, max_new_tokens=2)
    with model.compressed(method, **KNOBS[method]):
        untouched(method, attn, logits_of(model, batch), plain)
        run = greedy(model, sample, max_new_tokens=9)
        for step in (1, 4, 8):
            cache = greedy(model, sample, max_new_tokens=step + 1).cache
            close(replayed(name, cache, run, step), run.logits[:, step])
    assert (run.logits[:, 1] - before.logits[:, 1]).abs().max() > 1e-3  # and that is not what it was


@pytest.mark.parametrize("name", MODELS)
@METHODS
def test_ratio_zero_is_the_bare_model(method, name):
    model, batch = shared(name), batch_of(name)
    plain = greedy(model, batch)
    with model.compressed(method, ratio=0):
        run = greedy(model, batch)
    assert torch.equal(run.logits, plain.logits) and torch.equal(run.tokens, plain.tokens)


@functools.cache
def double(name):
    """A model and its batch in float64.

    In float32 padding moves keys by 1e-6, which now and then turns the last of the 16 bits of a scale: then everything
    that shares the scale moves by 1e-3, and no tolerance would tell that from an error. Here it is far below.
    """
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch_of(name).items()}
    return fresh(name).double(), batch


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
@METHODS
def test_batch_is_one_by_one(method, name):
    """Ten greedy steps and a second turn."""
    model, batch = double(name)
    with model.compressed(method, **KNOBS[method]):
        run = greedy(model, batch, max_new_tokens=10)
        second = again(model, run, batch)
        for row in range(2):
            sample = alone(name, batch, row)
            single = greedy(model, sample, max_new_tokens=10)
            close(single.logits[0], run.logits[row])
            close(again(model, single, sample).logits[0], second.logits[row])


def again(model, run, batch):
    """A second turn of six tokens on the cache that the first one returned."""
    ids = torch.cat([run.out.sequences, torch.arange(20, 26).expand(len(run.tokens), -1)], 1)
    more = {"input_ids": ids}
    for key, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if key in batch:
            added = ids.shape[1] - batch[key].shape[1]
            more[key] = torch.cat([batch[key], torch.full((len(ids), added), fill, dtype=batch[key].dtype)], 1)
    return greedy(model, more, max_new_tokens=10, past_key_values=copy.deepcopy(run.cache))


@METHODS
def test_beams_and_samples(method):
    """Beams of a padded batch are those of each row alone; returned sequences repeat rows."""
    model, batch = shared("llama"), batch_of("llama")
    with model.compressed(method, **KNOBS[method]):
        together = model.generate(**batch, **GREEDY | dict(max_new_tokens=8), num_beams=3, num_return_sequences=2)
        for row in range(2):
            sample = alone("llama", batch, row)
            n = sample["input_ids"].shape[1]
            single = model.generate(**sample, **GREEDY | dict(max_new_tokens=8), num_beams=3, num_return_sequences=2)
            assert torch.equal(single[:, n:], together[2 * row : 2 * row + 2, -8:])
        torch.manual_seed(1)
        out = model.generate(**batch, max_new_tokens=8, do_sample=True, num_return_sequences=2)
        assert out.shape[0] == 4


@METHODS
def test_prompt_lookup(method):
    """Candidates are checked and taken back where the cache does not change with every token; refused elsewhere."""
    model = shared("llama")
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    knobs, changing = KNOBS[method], method in ("zipcache", "mikv")
    lookup = dict(prompt_lookup_num_tokens=3, max_new_tokens=14)
    if changing or method in ("kivi", "gear"):
        remedy = "policy='grow'" if changing else "without candidates"
        with model.compressed(method, **knobs), pytest.raises(ValueError, match=remedy):
            greedy(model, batch, **lookup)
        if not changing:
            return
        knobs = knobs | dict(policy="grow")
    crops = []
    with model.compressed(method, **knobs):
        plain = greedy(model, batch, max_new_tokens=14)
        crop, HeldLayer.crop = HeldLayer.crop, lambda layer, n: (crops.append(n), crop(layer, n))[1]
        try:
            run = model.generate(**batch, **(GREEDY | lookup))
        finally:
            HeldLayer.crop = crop
    assert torch.equal(run[:, ids.shape[1] :], plain.tokens) and any(crops)


@METHODS
def test_report_and_other_stages(method):
    """The report counts what is stored; low bits go with fewer visual tokens."""
    model, batch = shared("llava"), batch_of("llava")
    with model.compressed(["visionzip", method], ratio=[0.5, None], **KNOBS[method]):
        run = greedy(model, batch, max_new_tokens=1)
        totals = model.compression.report().totals()
    assert totals["kv_bytes"] == sum(layer.nbytes() for layer in run.cache.layers) < 0.75 * totals["full_kv_bytes"]
    for row in range(2):
        sample = alone("llava", batch, row)
        with model.compressed(["visionzip", method], ratio=[0.5, None], **KNOBS[method]):
            close(greedy(model, sample, max_new_tokens=1).logits[0], run.logits[row])


@METHODS
def test_half_precision(method):
    model = fresh("llama").to(torch.bfloat16)
    with model.compressed(method, **KNOBS[method]):
        run = greedy(model, batch_of("llama"), max_new_tokens=9)
    assert run.logits.isfinite().all()
    assert all(
        t.dtype in (torch.bfloat16, torch.float16, torch.uint8, torch.int16) for t in run.cache.layers[0].tensors()
    )


@METHODS
def test_absolute_counts_are_refused(method):
    with pytest.raises(ValueError, match="stores every entry"):
        hf_compress.compress(shared("llama"), method, keep=5)
