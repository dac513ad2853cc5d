"""Packed decoding against unpacking and plain attention in fp32.

Run by `test_kernels.py` in Triton's interpreter, in a process of its own; on a machine with a CUDA device run this file
itself, compiled: `python -m pytest tests/kernels/decode.py`.
"""

import pytest
import torch

import hf_compress
from hf_compress import kernels
from hf_compress.kernels import segments
from hf_compress.kernels.decode import Plan, attend
from hf_compress.stores import ragged
from hf_compress.stores.packed import Packed
from hf_compress.stores.ragged import Ragged
from tests.invariants.reference import fresh
from tests.tiny import GREEDY

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Error of the output, values being of unit variance: of fp32 sums in another order (logits reach 40, and their error is
# that of the weights); of fp16 numbers; of bf16 tails and outputs. One slot too many or too few moves it by 1e-2.
BOUND = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def plain(query, scaling, keys, values, tail, valid=None):
    """(B, 1, Hq, d') in fp32: unpack everything, repeat the heads, softmax over what counts."""
    k, v = (torch.cat([part.read(), t.float()], 2) for part, t in zip((keys, values), tail))
    share = query.shape[1] // k.shape[1]
    logits = query.float() @ k.repeat_interleave(share, 1).mT * scaling
    if valid is not None:
        seen = valid.expand(-1, k.shape[1], -1).repeat_interleave(share, 1)[:, :, None].clone()
        seen[..., -1] = True
        logits = logits.masked_fill(~seen, float("-inf"))
    return (logits.softmax(-1) @ v.repeat_interleave(share, 1)).transpose(1, 2)


SEVERAL = Plan(programs=6)  # stretches, on the CPU too


class Case:
    """Random queries, packed entries whose channels have offsets, and a dense tail."""

    def __init__(
        self, n, *, bits=(4, 4), group=32, channels=32, heads=1, share=1, d=64, width=None, rows=1, tail=5,
        dtype=torch.float32, seed=0,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        width = width or d
        draw = lambda *shape: torch.randn(shape, generator=g)
        k, v = draw(rows, heads, n, d) + 3 * draw(1, heads, 1, d), draw(rows, heads, n, width)
        self.query = (2 * draw(rows, heads * share, 1, d)).to(DEVICE, dtype)
        self.tail = tuple(draw(rows, heads, tail, size).to(DEVICE, dtype) for size in (d, width))
        self.keys = Packed.of(k, bits[0], (group, 1)).to(DEVICE)
        self.values = Packed.of(v, bits[1], (1, channels)).to(DEVICE)
        self.dtype, self.scaling = dtype, d**-0.5

    def check(self, valid=None, plan=SEVERAL):
        assert kernels.fits(self.keys, self.values)
        args = self.query, self.scaling, self.keys, self.values, self.tail, valid
        got, expected = attend(*args, plan), plain(*args)
        assert got.shape == expected.shape and got.dtype == self.dtype
        assert (got.float() - expected).abs().max() <= BOUND[self.dtype]


@pytest.mark.parametrize("bits", [(1, 1), (2, 2), (4, 4), (8, 8), (1, 8), (8, 2), (4, 1), (2, 4)])
def test_bits(bits):
    Case(150, bits=bits).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 4, 8] if DEVICE == "cuda" else [4])  # the interpreter has one code for all
def test_precisions(bits, dtype):
    Case(150, bits=(bits, bits), dtype=dtype, share=2).check()


@pytest.mark.parametrize(
    ("group", "channels"), [(4, 1), (4, 8), (16, 2), (16, 64), (64, 4), (128, 16), (256, 32), (1, 64), (8, 1)]
)
def test_groups(group, channels):
    """Smaller and larger than a tile, and than the codes of a byte; the first group of tokens is short."""
    Case(300, group=group, channels=channels, bits=(4, 2), tail=1).check(plan=Plan(programs=2))


@pytest.mark.parametrize("share", [4, 8, 20])
def test_query_heads_per_head(share):
    Case(70, share=share, heads=2).check()


@pytest.mark.parametrize(("n", "tail"), [(1, 1), (31, 64), (32, 70), (33, 1), (64, 64), (257, 5)])
def test_lengths(n, tail):
    Case(n, tail=tail, share=2).check()


@pytest.mark.parametrize(("d", "width"), [(8, 8), (96, 96), (128, 128), (64, 32), (16, 128), (256, 256)])
def test_head_sizes(d, width):
    Case(100, d=d, width=width, channels=8, tail=3).check(plan=None)


@pytest.mark.parametrize(
    "plan", [Plan(tile=16, programs=3), Plan(tile=128), Plan(programs=1), Plan(tile=32, programs=1000)]
)
def test_plans(plan):
    Case(300, d=32, share=2).check(plan=plan)


def test_left_padding():
    """Rows of a batch with different numbers of padding slots; a whole stretch of one counts nothing."""
    case = Case(200, rows=2, share=2, tail=6)
    start = torch.tensor([[150], [0]])
    case.check((torch.arange(206) >= start)[:, None].to(DEVICE))
    start[0] = 205  # nothing but the token itself
    case.check((torch.arange(206) >= start)[:, None].to(DEVICE))


def test_any_slots_of_any_head():
    g = torch.Generator().manual_seed(1)
    valid = torch.rand(2, 2, 140, generator=g) < 0.5
    valid[0, 0], valid[..., -1] = False, False  # the token itself is seen nevertheless
    Case(133, rows=2, heads=2, tail=7, share=4).check(valid.to(DEVICE))


def test_strides():
    """Tails and queries as models give them: parts of larger tensors, tokens before heads."""
    case = Case(90, rows=2, heads=2, tail=9, share=2)
    case.tail = tuple(t.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 2:] for t in case.tail)
    case.query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    case.check(torch.ones(2, 1, 97, dtype=torch.bool, device=DEVICE))


def test_growing():
    """Groups appended behind a short first one."""
    case = Case(45, tail=4)
    more = Case(64, seed=3)
    case.keys, case.values = case.keys.join(more.keys), case.values.join(more.values)
    case.check()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (Packed.of(x, 4, (6, 1)), Packed.of(x, 4, (1, 8))),
        lambda x: (Packed.of(x, 4, (4, 1)), Packed.of(x, 4, (8, 8))),
        lambda x: (Packed.of(x, 4, (4, 1)).tightened([[9, 3]]), Packed.of(x, 4, (1, 8)).tightened([[9, 3]])),
        lambda x: (Packed.of(x[:, :, :0], 4, (4, 1)), Packed.of(x[:, :, :0], 4, (1, 8))),
        lambda x: (Packed.of(x.repeat(1, 1, 1, 40), 4, (4, 1)), Packed.of(x, 4, (1, 8))),
        lambda x: (x, x),
    ],
    ids=["six tokens", "two groupings", "uneven heads", "empty", "320 channels", "tensors"],
)
def test_what_does_not_fit(make):
    assert not kernels.fits(*make(torch.randn(1, 2, 9, 8)))


# -- heads of different lengths ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lengths", "share", "d", "width", "dtype"),
    [
        ([[150, 3], [1, 77]], 2, 64, 64, torch.float32),
        ([[64, 65, 63]], 1, 16, 32, torch.float32),
        ([[40], [129]], 5, 128, 128, torch.float16),
        ([[40, 200]], 4, 96, 96, torch.bfloat16),
        ([[9, 300]], 8, 256, 256, torch.float16),
        ([[9, 300]], 8, 128, 96, torch.float32),
    ],
)
@pytest.mark.parametrize("tail", [1, 70])
def test_segments(lengths, share, d, width, dtype, tail):
    """Against the loop over heads, in fp32; padding among the newest tokens of one row."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g).to(DEVICE, dtype)
    B, H, total = len(lengths), len(lengths[0]), sum(map(sum, lengths))
    query = 2 * draw(B, H * share, 1, d)
    body = Ragged(draw(total, d), lengths), Ragged(draw(total, width), lengths)
    newest = draw(B, H, tail, d), draw(B, H, tail, width)
    valid = torch.ones(B, tail, dtype=torch.bool, device=DEVICE)
    valid[-1, : tail // 2] = False
    wide = [Ragged(part.flat.float(), lengths) for part in body]
    for seen in (None, valid):
        see = None if seen is None else seen[:, None, None]
        expected = ragged.attend(query.float(), d**-0.5, *wide, tuple(t.float() for t in newest), see)
        got = segments.attend(query, d**-0.5, *body, newest, seen, SEVERAL)
        assert got.shape == expected.shape and got.dtype == dtype
        assert (got.float() - expected).abs().max() <= BOUND[dtype]


# -- whole models ---------------------------------------------------------------------------------------------------
@pytest.fixture
def counted(monkeypatch):
    """The kernel on any device, and how often it was asked."""
    calls = []
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(kernels, "usable", lambda device: True)
    run = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *args: calls.append(args) or run(*args))
    return calls


def short_llama():
    """Two layers of the tiny LLaMA."""
    model = fresh("llama").to(DEVICE)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    return model


def prompts(*lengths):
    """Random tokens, padded on the left."""
    ids = torch.randint(3, 90, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


@pytest.mark.parametrize(
    ("method", "knobs", "lengths", "new"),
    [
        ("kivi", dict(bits=4, group=4, residual=3), (34, 21), 7),  # packs four more on the way
        ("kivi", dict(bits=2, group=8, residual=3), (40,), 3),
        ("snapkv", dict(ratio=0.6, store="kivi8", window=4), (150, 150), 2),
        ("snapkv", dict(ratio=0.5, heads="adaptive", window=4), (60, 33), 4),
    ],
)
def test_generate(method, knobs, lengths, new, counted, monkeypatch):
    """The same tokens as with everything unpacked, over a left-padded batch, and nearly the same logits."""
    model, batch = short_llama(), prompts(*lengths)
    kwargs = dict(GREEDY, max_new_tokens=new, return_dict_in_generate=True, output_logits=True)
    hf_compress.compress(model, method, **knobs)
    fused = model.generate(**batch, **kwargs)
    assert len(counted) == 2 * (new - 1)
    monkeypatch.setattr(kernels, "usable", lambda device: False)
    unpacked = model.generate(**batch, **kwargs)
    assert len(counted) == 2 * (new - 1)
    assert torch.equal(fused.sequences, unpacked.sequences)
    for a, b in zip(fused.logits, unpacked.logits):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_rows_chosen_anew(counted):
    """Beams reorder packed rows."""
    model, batch = short_llama(), prompts(20)
    hf_compress.compress(model, "kivi", bits=4, group=4, residual=4)
    with_kernel = model.generate(**batch, **dict(GREEDY, max_new_tokens=3), num_beams=3)
    assert len(counted) == 2 * 2
    hf_compress.decompress(model)
    hf_compress.compress(model, "kivi", bits=4, group=4, residual=4)
    model.set_attn_implementation("eager")
    assert torch.equal(with_kernel, model.generate(**batch, **dict(GREEDY, max_new_tokens=3), num_beams=3))
    assert len(counted) == 2 * 2


@pytest.mark.parametrize("kind", ["eager", "gradients", "several tokens", "mixed bits"])
def test_what_is_not_served_is_unpacked(kind, counted):
    model, batch = short_llama(), prompts(40)
    if kind == "mixed bits":
        hf_compress.compress(model, "mikv")
    else:
        hf_compress.compress(model, "kivi", bits=4, group=4, residual=4)
    if kind == "eager":
        model.set_attn_implementation("eager")
    with torch.no_grad():
        cache = model(**batch).past_key_values
    tokens = torch.ones(1, 2 if kind == "several tokens" else 1, dtype=torch.int64, device=DEVICE)
    with torch.set_grad_enabled(kind == "gradients"):
        model(input_ids=tokens, past_key_values=cache)
    assert not counted
