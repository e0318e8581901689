"""Heads to FP8 E4M3 and back, one scale per token and head; on the way in they may be rotated."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 32  # tokens a program holds, of one head


@triton.jit
def _round_heads(x, angles, out, scale, x_stride, out_stride, out_head, out_element, scale_stride, tokens, size, TURN: tl.constexpr,
                 LARGEST: tl.constexpr, SMALLEST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    element = tl.arange(0, 2 * BLOCK)
    there = row < tokens
    inside = there[:, None] & (element < size)[None, :]
    value = tl.load(x + row[:, None] * x_stride + head * size + element[None, :], mask=inside, other=0.0).to(tl.float32)
    if TURN:
        pair = tl.arange(0, BLOCK)[None, :]
        at = angles + row[:, None] * (size // 2) + pair
        turns = there[:, None] & (pair < size // 2)
        c = tl.load(at, mask=turns, other=0.0)
        s = tl.load(at + tokens * (size // 2), mask=turns, other=0.0)
        even, odd = tl.split(tl.reshape(value, (ROWS, BLOCK, 2)))
        value = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ROWS, 2 * BLOCK))
    unit = tl.maximum(tl.max(tl.abs(value), axis=1) / LARGEST, SMALLEST)
    tl.store(scale + row * scale_stride + head, unit, mask=there)
    place = row[:, None] * out_stride + head * out_head + element[None, :] * out_element
    tl.store(out + place, tl.clamp(value / unit[:, None], -LARGEST, LARGEST).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _restore_heads(x, scale, out, x_stride, x_head, x_element, scale_stride, tokens, heads, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    element = tl.arange(0, BLOCK)
    inside = (row < tokens)[:, None] & (element < size)[None, :]
    unit = tl.load(scale + row * scale_stride + head, mask=row < tokens, other=0.0)
    place = row[:, None] * x_stride + head * x_head + element[None, :] * x_element
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * unit[:, None]
    tl.store(out + (row[:, None] * heads + head) * size + element[None, :], value.to(out.dtype.element_ty), mask=inside)


def round_heads(x: torch.Tensor, angles: torch.Tensor | None, out: torch.Tensor, scale: torch.Tensor, largest: float, smallest: float) -> None:
    """out * scale = x up to rounding (to nearest, ties to even), its interleaved pairs turned by angles first if there are any.

    x: [T, heads, d], fp32 or bf16, heads and d contiguous; out: E4M3 of that shape, any strides. scale: fp32 [T, heads, 1], heads
    contiguous. angles: fp32 [2, T, d/2], contiguous: cosine, sine. largest, smallest: as in quantise_rows.
    """
    tokens, heads, size = x.shape
    assert x.stride()[1:] == (size, 1) and out.shape == x.shape and size % 2 == 0, (x.shape, x.stride(), out.shape)
    assert scale.shape == (tokens, heads, 1) and scale.stride(1) == 1, (scale.shape, scale.stride())
    assert angles is None or (angles.shape == (2, tokens, size // 2) and angles.is_contiguous()), (angles.shape, angles.stride())
    _round_heads[(triton.cdiv(tokens, ROWS), heads)](x, angles if angles is not None else scale, out, scale, x.stride(0), *out.stride(),
                                                     scale.stride(0), tokens, size, TURN=angles is not None, LARGEST=largest, SMALLEST=smallest, ROWS=ROWS,
                                                     BLOCK=triton.next_power_of_2(size) // 2, num_warps=4)  # fmt: skip


def restore_heads(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x * scale in dtype, contiguous. x: E4M3 [T, heads, d], any strides; scale: fp32 [T, heads, 1], heads contiguous."""
    tokens, heads, size = x.shape
    assert scale.shape == (tokens, heads, 1) and scale.stride(1) == 1, (scale.shape, scale.stride())
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _restore_heads[(triton.cdiv(tokens, ROWS), heads)](x, scale, out, *x.stride(), scale.stride(0), tokens, heads, size, ROWS=ROWS,
                                                       BLOCK=triton.next_power_of_2(size), num_warps=4)  # fmt: skip
    return out
