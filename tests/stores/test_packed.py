"""Low-bit bodies: codes against loops in numpy, bytes against formulas, and what beams and batches do to them."""

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

from hf_compress.stores.blocks import Blocks
from hf_compress.stores.mixed import Joined, Mixed, choose, highest
from hf_compress.stores.packed import Dense, Packed, take
from hf_compress.stores.sparse import Corrected, Outliers
from hf_compress.tensors.lowrank import power_iteration
from hf_compress.tensors.pack import (
    BITS,
    bits_per_element,
    dequantize,
    divisor,
    nearest_valid,
    pack,
    quantize,
    unpack,
)


def slow(numbers, bits):
    """One group, number by number in fp32: what comes back."""
    numbers = np.asarray(numbers, np.float32)
    low = np.float32(np.float16(numbers.min()))
    step = np.float32(np.float16((numbers.max() - low) / np.float32(2**bits - 1)))
    step = step if step > 0 else np.float32(1)
    codes = [min(max(int(np.rint((x - low) / step)), 0), 2**bits - 1) for x in numbers]
    return [np.float32(c) * step + low for c in codes]


def slow_packed(x, bits, group):
    """(..., n, d), group by group; groups of tokens are counted from the last one."""
    g, c = group
    out = torch.empty_like(x)
    n, d = x.shape[-2:]
    for flat, result in zip(x.flatten(0, -3), out.flatten(0, -3)):
        for stop in range(n, 0, -g):
            rows = slice(max(0, stop - g), stop)
            for column in range(0, d, c):
                block = flat[rows, column : column + c]
                back = slow(block.flatten().tolist(), bits)
                result[rows, column : column + c] = torch.tensor(np.array(back)).view_as(block)
    return out


def stored(body):
    """Bytes of the storages behind a body, each counted once: views would show here."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in body.tensors()}.values())


def nbytes(body):
    return sum(t.numel() * t.element_size() for t in body.tensors())


# -- numbers to codes and back --------------------------------------------------------------------------------------
def test_kivi_card():
    """Group 0, 1, 2, 6 at 2 bits: step 2, codes 0, 0, 1, 3 (half to even), back to 0, 0, 2, 6."""
    codes, step, low = quantize(torch.tensor([[0.0, 1, 2, 6]]), 2, 4)
    assert (codes.tolist(), step.tolist(), low.tolist()) == ([[0, 0, 1, 3]], [[2]], [[0]])
    assert dequantize(codes, step, low, torch.float32).tolist() == [[0, 0, 2, 6]]
    assert pack(codes, 2).tolist() == [[0b11010000]]


@pytest.mark.parametrize("bits", BITS)
def test_pack_is_little_end_first(bits):
    codes = torch.randint(0, 2**bits, (3, 5, 16), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, 16 * bits // 8) and torch.equal(unpack(packed, bits), codes)
    per = 8 // bits
    for i, byte in enumerate(packed[0, 0].tolist()):
        assert byte == sum(c << (bits * j) for j, c in enumerate(codes[0, 0, i * per : (i + 1) * per].tolist()))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [(1, 4), (4, 1), (3, 2), (7, 1), (1, 8)])
@pytest.mark.parametrize("n", [12, 13, 2, 0])
def test_packed_is_the_slow_quantiser(bits, group, n):
    """To the last bit, the short first group included; bytes are bits and 32 / group, nothing else."""
    x = torch.randn(2, 3, n, 8) * torch.tensor([1e-3, 1, 1, 1, 30, 1, 1, 0.1])
    body = Packed.of(x, bits, group)
    assert len(body) == n and torch.equal(body.read(), slow_packed(x, bits, group))
    groups = -(-n // group[0]) * 8 // group[1]
    assert nbytes(body) == stored(body) == 6 * (n * bits + 4 * groups)


@pytest.mark.parametrize("bits", BITS)
def test_errors_are_half_a_step(bits):
    x = torch.randn(4, 64, 32)
    body = Packed.of(x, bits, (16, 1))
    step = body.step.float().repeat_interleave(16, 1)
    assert ((body.read() - x).abs() <= 0.5 * step * (1 + 2**-10) + 2**-9 * x.abs().max()).all()


def test_constant_groups():
    """Step 1, and nothing but the rounding of the minimum is lost."""
    for value in (0.0, 3.0, -0.5):
        x = torch.full((1, 1, 4, 8), value)
        assert torch.equal(Packed.of(x, 2, (4, 1)).read(), x)


def test_bits_per_element():
    """Removed fractions of the card by (bits, group)."""
    table = {(2, 32): 0.8125, (2, 64): 0.84375, (2, 128): 0.859375, (4, 32): 0.6875, (4, 64): 0.71875}
    table |= {(8, 64): 0.46875, (1, 32): 0.875}
    assert {key: 1 - bits_per_element(*key) / 16 for key in table} == table
    assert [divisor(d, 32) for d in (128, 80, 8, 7)] == [32, 20, 8, 7]


def test_nearest_valid():
    x = torch.arange(6.0).view(1, 1, 6, 1)
    valid = torch.tensor([[[False, True, False, True, True, False]]])
    assert nearest_valid(x, valid).flatten().tolist() == [1, 1, 1, 3, 4, 4]


# -- packed bodies --------------------------------------------------------------------------------------------------
def test_join_rows_and_copies():
    """Whole groups join to what they are apart; rows repeat and change places; copies share nothing."""
    x = torch.randn(3, 2, 22, 8)
    first, then = Packed.of(x[:, :, :6], 2, (4, 1)), Packed.of(x[:, :, 6:], 2, (4, 1))
    body = first.join(then)
    assert len(body) == 22 and torch.equal(body.read(), torch.cat([first.read(), then.read()], 2))
    which = torch.tensor([2, 0, 0, 1])
    assert torch.equal(body.rows(which).read(), body.read()[which])
    for other in (copy.deepcopy(body), pickle.loads(pickle.dumps(body)), body.to(torch.device("cpu"))):
        assert torch.equal(other.read(), body.read())
    assert all(t.device.type == "meta" for t in body.to(torch.device("meta")).tensors())


@pytest.mark.parametrize("group", [(4, 1), (1, 4)])
def test_heads_of_different_lengths(group):
    """Only what heads fill is stored; rows keep the number of slots, even if only short ones remain."""
    x, counts = torch.randn(2, 2, 11, 8), [[11, 3], [0, 6]]
    whole = Packed.of(x, 2, group)
    body = whole.tightened(counts)
    for b, h in ((0, 0), (0, 1), (1, 1)):
        n = counts[b][h]
        assert torch.equal(body.read()[b, h, 11 - n :], whole.read()[b, h, 11 - n :])
    tokens, groups = 20, sum(-(-n // group[0]) * 8 // group[1] for row in counts for n in row)
    assert nbytes(body) == stored(body) == tokens * 2 + 4 * groups
    row = body.rows(torch.tensor([1, 1]))
    assert len(row) == 11 and torch.equal(row.read()[:, 1, 5:], whole.read()[[1, 1], 1, 5:])
    assert torch.equal(row.read(), body.read()[[1, 1]])


# -- two kinds ------------------------------------------------------------------------------------------------------
def test_choose_and_highest():
    member = torch.tensor([[True, False, True, True], [False, False, True, False]])
    assert choose(member, 3).tolist() == [[0, 2, 3], [2, 2, 2]]
    valid = torch.tensor([[False, True, True, True]] * 2)
    assert choose(member, 3, valid).tolist() == [[2, 2, 3], [2, 2, 2]]  # the first is padding
    score = torch.tensor([[1.0, 3, 3, 2], [5, 5, 5, 5]])
    assert highest(score, torch.tensor([[2], [3]])).int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 0]]


def mixed(x, member, factor=None, high=16, low=2, group=(1, 4)):
    """Mixed by hand: counts as tensors allow."""
    most = int(member.sum(-1).max()), int((~member).sum(-1).max())
    y = x if factor is None else x / factor
    wide = take(x if high == 16 else y, choose(member, most[0]))
    wide = Dense(wide) if high == 16 else Packed.of(wide, high, group)
    return Mixed.of(member, wide, Packed.of(take(y, choose(~member, most[1])), low, group), factor)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("high", [16, 4])
def test_mixed_reads_in_the_order_of_the_slots(high, scaled):
    """Heads with different members, and different numbers of them."""
    x, member = torch.randn(2, 3, 13, 8), torch.rand(2, 3, 13) < 0.4
    factor = torch.rand(2, 3, 1, 8).add(0.5).half().float() if scaled else None
    body = mixed(x, member, factor, high)
    scale = 1 if factor is None else factor
    wide = x if high == 16 else slow_packed(x / scale, high, (1, 4)) * scale
    expected = torch.where(member[..., None], wide, slow_packed(x / scale, 2, (1, 4)) * scale)
    assert len(body) == 13 and torch.equal(body.read(), expected)
    which = torch.tensor([1, 0, 1])
    assert torch.equal(body.rows(which).read(), expected[which])
    assert torch.equal(body.members(), member)
    assert nbytes(body) == stored(body)


def test_all_or_nothing_mixed():
    x = torch.randn(1, 2, 9, 8)
    assert torch.equal(mixed(x, torch.ones(1, 2, 9, dtype=torch.bool)).read(), x)
    assert torch.equal(mixed(x, torch.zeros(1, 2, 9, dtype=torch.bool)).read(), slow_packed(x, 2, (1, 4)))


@pytest.mark.parametrize("high", [16, 8])
def test_demotion(high):
    """Tokens arrive, others leave: as if packed so from the start, except that who leaves 8 bits has lost some."""
    x = torch.randn(2, 2, 15, 8)
    member = torch.rand(2, 2, 12) < 0.5
    factor = torch.rand(2, 2, 1, 8).add(0.5).half().float()
    body = mixed(x[:, :, :12], member, factor, high)
    was = torch.cat([member, torch.ones(2, 2, 3, dtype=torch.bool)], -1)
    stay = was & (torch.rand(2, 2, 15) < 0.6)
    counts = [int(m.sum(-1).max()) for m in (stay, was & ~stay, ~stay)]
    late = Dense(x[:, :, 12:]) if high == 16 else Packed.of(x[:, :, 12:] / factor, high, (1, 4))
    got = body.demote(late, was, stay, (counts[0], counts[1], counts[2]))
    before = torch.cat([body.read(), x[:, :, 12:]], 2)
    if high == 8:
        before[:, :, 12:] = slow_packed(x[:, :, 12:] / factor, 8, (1, 4)) * factor
    left = slow_packed(before / factor, 2, (1, 4)) * factor
    expected = torch.where((was & ~stay)[..., None], left, before)
    torch.testing.assert_close(got.read(), expected, atol=1e-6 if high == 16 else 1e-3, rtol=0)
    assert torch.equal(got.members(), stay)


def test_joined_groups_run_over_heads():
    x = torch.randn(2, 3, 5, 8)
    flat = x.transpose(1, 2).flatten(2)[:, None]
    expected = slow_packed(flat, 4, (1, 24))[:, 0].unflatten(2, (3, 8)).transpose(1, 2)
    body = Joined.over(x, 4)
    assert torch.equal(body.read(), expected) and nbytes(body) == 2 * 5 * (24 // 2 + 4)


def test_blocks():
    """A prompt and three blocks, one after the other or two at once."""
    x = torch.randn(2, 2, 7 + 12, 8)
    block = lambda a, b, j: Packed.of(x[:, :, a:b].unflatten(2, (j, -1)), 2, (4, 1))
    body = Blocks(block(0, 7, 1)).grow(block(7, 11, 1), 1).grow(block(11, 19, 2), 2)
    expected = torch.cat([slow_packed(x[:, :, :7], 2, (4, 1)), slow_packed(x[:, :, 7:], 2, (4, 1))], 2)
    assert len(body) == 19 and torch.equal(body.read(), expected)
    assert torch.equal(body.rows(torch.tensor([1])).read(), expected[1:])


# -- low rank and outliers ------------------------------------------------------------------------------------------
def test_power_iteration():
    """Close to the best approximation where the spectrum falls, exact at full rank, padding rows stay zero."""
    u, v = torch.linalg.qr(torch.randn(3, 40, 8)).Q, torch.linalg.qr(torch.randn(3, 8, 8)).Q
    x = u * 4.0 ** -torch.arange(8) @ v.mT
    x[:, :5] = 0
    singular = torch.linalg.svdvals(x)
    for rank in (1, 2, 4):
        left, right = power_iteration(x, rank)
        torch.testing.assert_close(left.mT @ left, torch.eye(rank).expand(3, -1, -1), atol=1e-5, rtol=0)
        best = singular[:, rank:].square().sum(1).sqrt()
        assert ((x - left @ right.mT).norm(dim=(1, 2)) < 1.05 * best).all()
        assert not left[:, :5].abs().max() > 1e-6
    left, right = power_iteration(x, 8)
    torch.testing.assert_close(left @ right.mT, x, atol=1e-6, rtol=0)


def codes(bits, group):
    return lambda x: Packed.of(x, bits, group)


EVERY = torch.ones(2, 1, 21, dtype=torch.bool)


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_an_outlier(tokens, dtype):
    """s = 100 % restores 16-bit numbers exactly, whatever the codes are."""
    x = torch.randn(2, 2, 21, 8).to(dtype)
    body = Corrected.of(x, codes(1, (4, 1)), valid=EVERY, tokens=tokens, share=Fraction(1), rank=2, rounds=3)
    assert torch.equal(body.read().to(dtype), x)


@pytest.mark.parametrize("tokens", [True, False])
def test_full_rank(tokens):
    """r = d restores to the precision of 16 bits."""
    x = torch.randn(2, 2, 21, 8)
    body = Corrected.of(x, codes(2, (4, 1)), valid=EVERY, tokens=tokens, share=Fraction(0), rank=8, rounds=3)
    torch.testing.assert_close(body.read(), x, atol=4e-3, rtol=0)
    less = Corrected.of(x, codes(2, (4, 1)), valid=EVERY, tokens=tokens, share=Fraction(0), rank=3, rounds=3)
    none = Corrected.of(x, codes(2, (4, 1)), valid=EVERY, tokens=tokens, share=Fraction(0), rank=0, rounds=3)
    errors = [(b.read() - x).norm() for b in (body, less, none)]
    assert errors[0] < 0.01 * errors[2] and errors[1] < 0.8 * errors[2]


@pytest.mark.parametrize("tokens", [True, False])
def test_outliers_by_hand(tokens):
    """Half of them the lowest, half the highest of each line; their mean takes their place; they come back exactly."""
    x, valid, share = torch.randn(2, 2, 21, 8), EVERY.clone(), Fraction(1, 5)
    valid[1, :, :6] = False  # a padded sample: its channels are shorter
    body = Corrected.of(x, codes(2, (4, 1)), valid=valid, tokens=tokens, share=share, rank=0, rounds=3)
    got = body.read()
    for b in range(2):
        first = 0 if valid[b, 0, 0] else 6
        real = x[b, :, first:]
        expected = real.clone()
        lines = [(h, slice(None), c) for h in range(2) for c in range(8)] if tokens else range(21 - first)
        for line in lines:
            at = line if tokens else (slice(None), line)
            numbers = real[at].flatten()
            count = math.floor(numbers.numel() * share)
            order = numbers.argsort().tolist()
            out = order[: count // 2] + order[len(order) - (count - count // 2) :]
            rest = [i for i in range(len(order)) if i not in out]
            numbers = numbers.clone()
            numbers[out] = numbers[rest].mean()
            expected[at] = numbers.view_as(expected[at])
        expected = slow_packed(expected, 2, (4, 1))
        for line in lines:
            at = line if tokens else (slice(None), line)
            numbers, count = real[at].flatten(), math.floor(real[at].numel() * share)
            order = numbers.argsort().tolist()
            out = order[: count // 2] + order[len(order) - (count - count // 2) :]
            flat = expected[at].flatten()
            flat[out] = numbers[out].half().float()
            expected[at] = flat.view_as(expected[at])
        torch.testing.assert_close(got[b, :, first:], expected, atol=1e-3, rtol=0)


def test_places_beyond_half_of_16_bits():
    """Lines of up to 65536 tokens are indexed by 16 bits."""
    x = torch.zeros(1, 1, 65536, 8)
    spots = [0, 32767, 32768, 65535]
    x[0, 0, spots] = torch.tensor([-4.0, 3, -2, 5])[:, None]
    valid = torch.ones(1, 1, 65536, dtype=torch.bool)
    body = Outliers.of(x, Fraction(4, 65536), True, valid, torch.float16)
    assert body.at.dtype == torch.int16 and torch.equal(body.put_(torch.zeros_like(x), body.places(x)), x)
