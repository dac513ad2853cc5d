"""Attention of one new token over heads of different lengths, read where they lie end to end: split-K in Triton."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_compress.kernels.decode import LOG2E, Plan, _absorb, _dense, _leave, _queries, columns, join
from hf_compress.stores.ragged import Ragged


@triton.jit(do_not_specialize=["stretch", "tail_length", "valid_row"])
def _split(
    query, keys, values, bounds, tail_keys, tail_values, valid, out, peak, scale, stretch, tail_length,
    key_row, key_head, key_slot, value_row, value_head, value_slot, valid_row,
    HEADS: tl.constexpr, SHARE: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    KEY_SIZE: tl.constexpr, KEY_D: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_D: tl.constexpr,
    MASKED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One stretch of the segment of one KV head of one row; the last program along the first axis reads the tail."""
    part, parts, head = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    b, h = head // HEADS, head % HEADS
    row, channel, wide = tl.arange(0, H), tl.arange(0, KEY_D), tl.arange(0, VALUE_D)
    top = tl.full((H,), float("-inf"), tl.float32)
    total = tl.zeros((H, N), tl.float32)
    acc = tl.zeros((H, VALUE_D), tl.float32)
    q = _queries(query, head, scale, row, channel, SHARE, KEY_SIZE, HALF)
    if part < parts - 1:
        first, last = tl.load(bounds + head), tl.load(bounds + head + 1)
        end = tl.minimum((part + 1) * stretch, last - first)
        for start in range(part * stretch, end, N):
            slot = start + tl.arange(0, N)
            seen = slot < end
            there = seen[:, None] & (channel < KEY_SIZE)[None, :]
            k = tl.load(keys + (first + slot)[:, None] * KEY_SIZE + channel[None, :], mask=there, other=0.0)
            there = seen[:, None] & (wide < VALUE_SIZE)[None, :]
            v = tl.load(values + (first + slot)[:, None] * VALUE_SIZE + wide[None, :], mask=there, other=0.0)
            top, total, acc = _absorb(q, k.to(q.dtype), v.to(q.dtype), seen, top, total, acc)
    else:
        tail_keys += b * key_row + h * key_head
        tail_values += b * value_row + h * value_head
        top, total, acc = _dense(
            q, tail_keys, tail_values, valid + b * valid_row, tail_length, key_slot, value_slot, channel, wide,
            top, total, acc, N, KEY_SIZE, VALUE_SIZE, MASKED,
        )  # fmt: skip
    _leave(out, peak, head, part, parts, row, wide, top, total, acc, SHARE, VALUE_SIZE)


def attend(
    query: Tensor,
    scaling: float,
    keys: Ragged,
    values: Ragged,
    tail: tuple[Tensor, Tensor],
    valid: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Attention of the newest token of every row over segments and a dense tail that ends with its own.

    Queries, keys and values of 16 bits meet in fp16, those of 32 bits in fp32; sums are in fp32.

    Args:
        query: (B, Hq, 1, d), of bf16, fp16 or fp32; query head h belongs to KV head h // (Hq // Hkv).
        keys, values: segments of (B, Hkv) heads with d and d' channels, without `lead`.
        tail: keys and values (B, Hkv, T, d) and (B, Hkv, T, d'), T >= 1.
        valid: (B, T) bool, which slots of the tail count, the token itself always; None: all.

    Returns:
        (B, 1, Hq, d').
    """
    B, Hq, _, d = query.shape
    H, T = tail[0].shape[1:3]
    width, share = tail[1].shape[3], Hq // H
    plan = plan or Plan(tile=64 if max(d, width) <= 128 else 32)
    stretch, parts = plan.cut(max(len(keys), 1), B * H, query.device)
    parts += 1  # the tail
    tail_keys, tail_values = (t if t.stride(3) == 1 else t.contiguous() for t in tail)
    partial = query.new_empty(B * Hq, parts, width, dtype=torch.float32)
    peak = query.new_empty(B * Hq, parts, dtype=torch.float32)
    out = query.new_empty(B, 1, Hq, width)
    seen = query if valid is None else valid.contiguous().view(torch.uint8)
    with torch.cuda.device(query.device) if query.device.type == "cuda" else nullcontext():  # kernels go to the current
        _split[(parts, B * H)](
            query.contiguous(), keys.flat, values.flat, keys.bounds, tail_keys, tail_values, seen, partial, peak,
            scaling * LOG2E, stretch, T, *tail_keys.stride()[:3], *tail_values.stride()[:3],
            0 if valid is None else seen.stride(0),
            HEADS=H, SHARE=share, H=max(16, triton.next_power_of_2(share)), N=plan.tile, KEY_SIZE=d, KEY_D=columns(d),
            VALUE_SIZE=width, VALUE_D=columns(width), MASKED=valid is not None, HALF=query.dtype.itemsize == 2,
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
        join(partial, peak, out)
    return out
