"""Attention of one new token over packed keys and values, read as they are: split-K decoding in Triton.

Every program reads one stretch of the slots of one KV head for all its query heads, unpacks it in registers and keeps a
running softmax; one more reads the dense tail. A second kernel joins what they found (FlashDecoding,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The packed layer is read once and nothing of it is written.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_compress.stores.packed import Packed
from hf_compress.tensors.pack import BITS

LOG2E = 1.4426950408889634
MOST_PARTS = 255  # the second kernel reads all of a head at once


def _assembly(bits: int) -> str:
    """PTX that makes fp16 numbers of the codes in four bytes: of the first code of each byte, then of the second ...

    A code of b bits at bit s of a byte is or'ed into the mantissa of 1024, which makes it 1024 + code 2^s; times 2^-s,
    less 1024 2^-s, it is the code, exactly. Two numbers are made at a time: 1.25 instructions per number of 4 bits.
    """
    half = lambda x: int(torch.tensor(x, dtype=torch.float16).view(torch.int16)) & 0xFFFF
    pair = lambda x: f"0x{half(x) * 0x10001:08x}"
    parts = 8 // bits
    out = ["{", ".reg .b32 a, b, low, one, sub;"]
    out += [f"prmt.b32 {r}, ${2 * parts}, 0, {order};" for r, order in (("a", "0x4140"), ("b", "0x4342"))]
    for part in range(parts):
        shift = part * bits
        mask = f"0x{((2**bits - 1) << shift) * 0x10001:08x}"
        out += [f"mov.b32 one, {pair(2.0**-shift)};", f"mov.b32 sub, {pair(-1024 * 2.0**-shift)};"]
        for i, source in enumerate("ab"):
            out += [f"lop3.b32 low, {source}, {mask}, 0x64006400, 0xea;"]
            out += [f"fma.rn.f16x2 ${2 * part + i}, low, one, sub;"]
    return "\n".join([*out, "}"])


ASSEMBLY = {bits: _assembly(bits) for bits in BITS}


@triton.jit
def _beside(a, b):
    """(N, 2 C): the columns of two (N, C), one after the other. Moves no number between threads."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _part(x, PART: tl.constexpr, BITS: tl.constexpr):
    """(N, C) fp32: of every byte the PART-th code. It goes into the mantissa of 2^23: exact, and no conversion."""
    return (((x >> (PART * BITS)) & (2**BITS - 1)).to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _numbers(x, BITS: tl.constexpr, ASM: tl.constexpr):
    """(N, D) codes as numbers from bytes (N, C): of all bytes the first code, then of all bytes the second ...

    ASM is PTX that makes them in fp16; without it they are made in fp32.
    """
    if BITS == 8:
        if ASM == "":
            y = _part(x, 0, 8)
        else:
            y = tl.inline_asm_elementwise(ASM, "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4)
    elif BITS == 4:
        if ASM == "":
            a, b = _part(x, 0, 4), _part(x, 1, 4)
        else:
            a, b = tl.inline_asm_elementwise(
                ASM, "=r,=r,=r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
        y = _beside(a, b)
    elif BITS == 2:
        if ASM == "":
            a, b, c, d = _part(x, 0, 2), _part(x, 1, 2), _part(x, 2, 2), _part(x, 3, 2)
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r", [x],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4,
            )  # fmt: skip
        y = _beside(_beside(a, b), _beside(c, d))
    else:
        if ASM == "":
            a, b, c, d = _part(x, 0, 1), _part(x, 1, 1), _part(x, 2, 1), _part(x, 3, 1)
            e, f, g, h = _part(x, 4, 1), _part(x, 5, 1), _part(x, 6, 1), _part(x, 7, 1)
        else:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                ASM, "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r", [x],
                dtype=(
                    tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16,
                ),
                is_pure=True, pack=4,
            )  # fmt: skip
        y = _beside(_beside(_beside(a, b), _beside(c, d)), _beside(_beside(e, f), _beside(g, h)))
    return y


@triton.jit
def _pin(x):
    """The same fp16 numbers, where they are: the compiler would rather bring bytes into the layout of the matrix units
    than numbers, and make numbers of them one by one there."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float16, is_pure=False, pack=2)


@triton.jit
def _channels(D: tl.constexpr, BITS: tl.constexpr):
    """(D,) channels in the order of `_numbers`."""
    column = tl.arange(0, D)
    return column % (D * BITS // 8) * (8 // BITS) + column // (D * BITS // 8)


@triton.jit
def _ordered(x, D: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """(M, D) in the order of `_channels`, bytes of P codes, from one number (M, D / C) for every C channels."""
    M: tl.constexpr = x.shape[0]
    if C < P:
        x = tl.reshape(tl.broadcast_to(x[:, :, None], (M, D // C, C)), (M, D // P, P))
        x = tl.reshape(tl.permute(x, (0, 2, 1)), (M, D))
    elif C > 1:  # every part of the columns runs through all groups of channels
        x = tl.reshape(tl.broadcast_to(x[:, None, :, None], (M, P, D // C, C // P)), (M, D))
    return x


@triton.jit
def _read(
    codes, step, low, head, n, lead, start,
    N: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """(N, D) numbers of the slots from `start` on, counted with the `lead` that their first group misses.

    SIZE channels are stored; D is the next power of two, and their order is that of `_numbers`.
    """
    R: tl.constexpr = G if G < N else N  # tokens of this tile that share a group
    BYTES: tl.constexpr = SIZE * BITS // 8
    P: tl.constexpr = 8 // BITS
    slot = start + tl.arange(0, N) - lead
    byte = tl.arange(0, D * BITS // 8)
    there = ((slot >= 0) & (slot < n))[:, None] & (byte < BYTES)[None, :]
    packed = tl.load(codes + (head * n + slot)[:, None] * BYTES + byte[None, :], mask=there, other=0)
    x = _numbers(packed, BITS, ASM)
    group, groups = slot, n
    if G > 1:
        group, groups = start // G + tl.arange(0, N // R), (n + lead) // G
    column = tl.arange(0, D // C)
    there = ((group >= 0) & (group < groups))[:, None] & (column < SIZE // C)[None, :]
    place = (head * groups + group)[:, None] * (SIZE // C) + column[None, :]
    steps, lows = tl.load(step + place, mask=there, other=0.0), tl.load(low + place, mask=there, other=0.0)
    steps, lows = _ordered(steps, D, C, P), _ordered(lows, D, C, P)
    if R > 1:
        steps = tl.reshape(tl.broadcast_to(steps[:, None, :], (N // R, R, D)), (N, D))
        lows = tl.reshape(tl.broadcast_to(lows[:, None, :], (N // R, R, D)), (N, D))
    x = x * steps.to(x.dtype) + lows.to(x.dtype)
    return x if ASM == "" else _pin(x)


@triton.jit
def _queries(query, head, scale, row, channel, SHARE: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr):
    """(H, D) queries of one KV head, times `scale`, their channels in the order of `channel`."""
    at = (head * SHARE + row)[:, None] * SIZE + channel[None, :]
    q = tl.load(query + at, mask=(row < SHARE)[:, None] & (channel < SIZE)[None, :], other=0.0)
    return (q.to(tl.float32) * scale).to(tl.float16 if HALF else tl.float32)


@triton.jit
def _absorb(q, k, v, seen, top, total, acc):
    """The running softmax (in powers of two) of (H, DK) queries after N more keys and values."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    logits = tl.where(seen[None, :], logits, float("-inf"))
    new = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(logits - base[:, None])
    fade = tl.exp2(top - base)
    acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return new, total * fade[:, None] + p, acc


@triton.jit
def _dense(
    q, keys, values, valid, length, key_slot, value_slot, channel, wide, top, total, acc,
    N: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The softmax after `length` more slots as they are, the last of which is the token itself."""
    for start in tl.range(0, length, N, num_stages=1):
        slot = start + tl.arange(0, N)
        seen = slot < length
        there = seen[:, None] & (channel < KEY_SIZE)[None, :]
        k = tl.load(keys + slot[:, None] * key_slot + channel[None, :], mask=there, other=0.0)
        there = seen[:, None] & (wide < VALUE_SIZE)[None, :]
        v = tl.load(values + slot[:, None] * value_slot + wide[None, :], mask=there, other=0.0)
        if MASKED:  # the token itself is seen, whatever it is
            seen = (slot == length - 1) | (seen & (tl.load(valid + slot, mask=seen, other=0) != 0))
        top, total, acc = _absorb(q, k.to(q.dtype), v.to(q.dtype), seen, top, total, acc)
    return top, total, acc


@triton.jit
def _leave(out, peak, head, part, parts, row, wide, top, total, acc, SHARE: tl.constexpr, VALUE_SIZE: tl.constexpr):
    """Store what one program found, and how much it weighs."""
    total = tl.sum(total, 1)
    some = row < SHARE
    place = (head * SHARE + row) * parts + part
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + place[:, None] * VALUE_SIZE + wide[None, :], acc, mask=some[:, None] & (wide < VALUE_SIZE)[None, :])
    tl.store(peak + place, top + tl.log2(tl.where(total > 0, total, 1.0)), mask=some)


@triton.jit(do_not_specialize=["n", "lead", "stretch", "tail_length", "valid_row", "valid_head"])
def _split(
    query, key_codes, key_step, key_low, value_codes, value_step, value_low, tail_keys, tail_values, valid, out, peak,
    scale, n, lead, stretch, tail_length, key_row, key_head, key_slot, value_row, value_head,
    value_slot, valid_row, valid_head,
    HEADS: tl.constexpr, SHARE: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    KEY_SIZE: tl.constexpr, KEY_D: tl.constexpr, KEY_BITS: tl.constexpr, KEY_G: tl.constexpr, KEY_C: tl.constexpr,
    VALUE_SIZE: tl.constexpr, VALUE_D: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_G: tl.constexpr,
    VALUE_C: tl.constexpr, MASKED: tl.constexpr, HALF: tl.constexpr,
    KEY_ASM: tl.constexpr, VALUE_ASM: tl.constexpr,
):  # fmt: skip
    """One stretch of one KV head of one row; the last program along the first axis reads the dense tail."""
    part, parts, head = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    b, h = head // HEADS, head % HEADS
    row = tl.arange(0, H)
    top = tl.full((H,), float("-inf"), tl.float32)
    total = tl.zeros((H, N), tl.float32)
    acc = tl.zeros((H, VALUE_D), tl.float32)
    valid += b * valid_row + h * valid_head
    if part < parts - 1:
        channel, wide = _channels(KEY_D, KEY_BITS), _channels(VALUE_D, VALUE_BITS)
        q = _queries(query, head, scale, row, channel, SHARE, KEY_SIZE, HALF)
        begin = part * stretch
        end = tl.minimum(begin + stretch, n + lead)
        for start in range(begin, end, N):
            slot = start + tl.arange(0, N) - lead
            seen = (slot >= 0) & (slot < n)
            if MASKED:
                seen = seen & (tl.load(valid + slot, mask=seen, other=0) != 0)
            k = _read(
                key_codes, key_step, key_low, head, n, lead, start,
                N, KEY_SIZE, KEY_D, KEY_BITS, KEY_G, KEY_C, KEY_ASM,
            )  # fmt: skip
            v = _read(
                value_codes, value_step, value_low, head, n, lead, start,
                N, VALUE_SIZE, VALUE_D, VALUE_BITS, VALUE_G, VALUE_C, VALUE_ASM,
            )  # fmt: skip
            top, total, acc = _absorb(q, k.to(q.dtype), v.to(q.dtype), seen, top, total, acc)
    else:
        channel, wide = tl.arange(0, KEY_D), tl.arange(0, VALUE_D)
        q = _queries(query, head, scale, row, channel, SHARE, KEY_SIZE, HALF)
        tail_keys += b * key_row + h * key_head
        tail_values += b * value_row + h * value_head
        top, total, acc = _dense(
            q, tail_keys, tail_values, valid + n, tail_length, key_slot, value_slot, channel, wide, top, total, acc,
            N, KEY_SIZE, VALUE_SIZE, MASKED,
        )  # fmt: skip
    _leave(out, peak, head, part, parts, row, wide, top, total, acc, SHARE, VALUE_SIZE)


@triton.jit(do_not_specialize=["parts"])
def _join(partial, peak, out, parts, P: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr):
    """C channels of one query head: the mean of its `parts`, each with the weight 2^peak."""
    head = tl.program_id(0).to(tl.int64)
    part, channel = tl.arange(0, P), tl.program_id(1) * C + tl.arange(0, C)
    peaks = tl.load(peak + head * parts + part, mask=part < parts, other=float("-inf"))
    weight = tl.exp2(peaks - tl.max(peaks, 0))
    at = (head * parts + part)[:, None] * SIZE + channel[None, :]
    x = tl.load(partial + at, mask=(part < parts)[:, None] & (channel < SIZE)[None, :], other=0.0)
    x = tl.sum(x * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + head * SIZE + channel, x.to(out.dtype.element_ty), mask=channel < SIZE)


@dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Args:
        tile: slots read at a time; a power of two, at least 16.
        warps, stages: of a program: how wide it is, and how many tiles are on their way.
        programs: in all, about; on CUDA per multiprocessor.
    """

    tile: int = 64
    warps: int = 4
    stages: int = 3
    programs: int = 4

    def cut(self, slots: int, heads: int, device: torch.device) -> tuple[int, int]:
        """Slots of each stretch, and how many there are, of `slots` in each of so many heads."""
        tiles = triton.cdiv(slots, self.tile)
        parts = min(triton.cdiv(self.programs * _multiprocessors(device), heads), tiles, MOST_PARTS)
        stretch = triton.cdiv(tiles, parts)
        return stretch * self.tile, triton.cdiv(tiles, stretch)


def attend(
    query: Tensor,
    scaling: float,
    keys: Packed,
    values: Packed,
    tail: tuple[Tensor, Tensor],
    valid: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Attention of the newest token of every row over packed entries and a dense tail that ends with its own.

    Queries of 16 bits meet the packed numbers in fp16, in which steps and minima are stored, those of 32 bits in fp32;
    sums are in fp32.

    Args:
        query: (B, Hq, 1, d), of bf16, fp16 or fp32; query head h belongs to KV head h // (Hq // Hkv).
        keys, values: of (B, Hkv, n, d) and (B, Hkv, n, d'), n >= 1, as `hf_compress.kernels.fits` says.
        tail: keys and values (B, Hkv, T, d) and (B, Hkv, T, d'), T >= 1, of the query's dtype.
        valid: (B, 1 or Hkv, n + T) bool, which slots count, the token itself always; None: all.

    Returns:
        (B, 1, Hq, d').
    """
    B, Hq, _, d = query.shape
    H, T = tail[0].shape[1:3]
    n, width, share = len(keys), tail[1].shape[3], Hq // H
    plan = plan or Plan(tile=64 if max(d, width) <= 128 else 32)
    lead = -n % max(keys.group[0], values.group[0])
    stretch, parts = plan.cut(n + lead, B * H, query.device)
    parts += 1  # the tail
    tail_keys, tail_values = (t if t.stride(3) == 1 else t.contiguous() for t in tail)
    partial = query.new_empty(B * Hq, parts, width, dtype=torch.float32)
    peak = query.new_empty(B * Hq, parts, dtype=torch.float32)
    out = query.new_empty(B, 1, Hq, width)
    half = query.dtype.itemsize == 2
    asm = half and query.device.type == "cuda"
    seen = query if valid is None else valid.contiguous().view(torch.uint8)
    rows = (0, 0) if valid is None else (seen.stride(0), seen.stride(1) if seen.shape[1] > 1 else 0)
    with torch.cuda.device(query.device) if query.device.type == "cuda" else nullcontext():  # kernels go to the current
        _split[(parts, B * H)](
            query.contiguous(), keys.codes, keys.step, keys.low, values.codes, values.step, values.low, tail_keys,
            tail_values, seen, partial, peak, scaling * LOG2E, n, lead, stretch, T,
            *tail_keys.stride()[:3], *tail_values.stride()[:3], *rows,
            HEADS=H, SHARE=share, H=max(16, triton.next_power_of_2(share)), N=plan.tile, KEY_SIZE=d, KEY_D=columns(d),
            KEY_BITS=keys.bits, KEY_G=keys.group[0], KEY_C=keys.group[1], VALUE_SIZE=width, VALUE_D=columns(width),
            VALUE_BITS=values.bits, VALUE_G=values.group[0], VALUE_C=values.group[1], MASKED=valid is not None,
            HALF=half, KEY_ASM=ASSEMBLY[keys.bits] if asm else "", VALUE_ASM=ASSEMBLY[values.bits] if asm else "",
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
        join(partial, peak, out)
    return out


def join(partial: Tensor, peak: Tensor, out: Tensor) -> None:
    """Put together what all programs found: (B Hq, parts, d) and (B Hq, parts), into `out` of (B Hq) rows of d."""
    parts, width = partial.shape[1:]
    channels = min(32, triton.next_power_of_2(width))
    _join[(len(partial), triton.cdiv(width, channels))](
        partial, peak, out, parts, P=triton.next_power_of_2(parts), SIZE=width, C=channels
    )


def columns(size: int) -> int:
    """Channels of a tile that holds so many: matrix units want powers of two from 16 on."""
    return max(16, triton.next_power_of_2(size))


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
