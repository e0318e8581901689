"""Softmax attention whose two products multiply FP8 E4M3: over keys and values that lie in a cache as such."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl


@triton.jit
def _attention_fp8(q, q_scale, k, k_scale, v, v_scale, out, factor, queries, keys, heads, size, k_stride, k_scale_stride, v_stride, v_head,
                   v_element, v_scale_stride, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    element = tl.arange(0, BLOCK)
    held = (row < queries)[:, None] & (element < size)[None, :]
    place = row[:, None] * (heads * size) + head * size + element[None, :]
    query = tl.load(q + place, mask=held, other=0.0)
    to_score = tl.load(q_scale + row * heads + head, mask=row < queries, other=0.0) * factor  # scores in units of log 2
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    made = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, keys, COLUMNS):
        column = first + tl.arange(0, COLUMNS).to(tl.int64)
        there = column < keys
        known = tl.load(k + column[None, :] * k_stride + head * size + element[:, None], mask=there[None, :] & (element < size)[:, None], other=0.0)
        score = tl.dot(query, known) * to_score[:, None] * tl.load(k_scale + column * k_scale_stride + head, mask=there, other=0.0)[None, :]
        score = tl.where(there[None, :], score, float("-inf"))
        higher = tl.maximum(best, tl.ceil(tl.max(score, axis=1)))  # whole: what is rounded does not depend on how keys are cut into tiles
        share = tl.exp2(score - higher[:, None])
        fade = tl.exp2(best - higher)
        total = total * fade + tl.sum(share, axis=1)
        # a share is at most 1: with the scales of the values on it, over a power of two, it fills the range of E4M3
        unit = tl.load(v_scale + column * v_scale_stride + head, mask=there, other=0.0)
        step = tl.exp2(tl.ceil(tl.log2(tl.maximum(tl.max(unit, axis=0) / LARGEST, SMALLEST))))
        value = tl.load(v + column[:, None] * v_stride + head * v_head + element[None, :] * v_element, mask=there[:, None] & (element < size)[None, :], other=0.0)
        weight = (share * (unit / step)[None, :]).to(v.dtype.element_ty)
        made = made * fade[:, None] + tl.dot(weight, value) * step
        best = higher
    tl.store(out + place, (made / total[:, None]).to(out.dtype.element_ty), mask=held)


def attention_fp8(q: torch.Tensor, q_scale: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, v: torch.Tensor, v_scale: torch.Tensor,
                  dtype: torch.dtype, largest: float, smallest: float) -> torch.Tensor:
    """softmax(q k / sqrt(d)) v of one sequence, in dtype [Tq, heads, d], contiguous.

    q: E4M3 [Tq, heads, d] with q_scale fp32 [Tq, heads, 1], both contiguous. k, v: E4M3 [Tk, heads, d] with scales fp32 [Tk, heads, 1],
    heads contiguous: slices of a cache. k: heads and d contiguous; v: any strides, but FP8 matrix units read it along the tokens, so
    where those do not lie side by side each tile is turned on the way. Sums in fp32; the weights of the values are rounded to E4M3.
    """
    queries, heads, size = q.shape
    assert q.is_contiguous() and q_scale.is_contiguous() and k.shape == v.shape and k.shape[1:] == q.shape[1:], (q.shape, k.shape, v.shape)
    assert k.stride()[1:] == (size, 1) and all(s.shape == (*k.shape[:2], 1) and s.stride(1) == 1 for s in (k_scale, v_scale)), k.stride()
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    rows, columns = 128, 128
    _attention_fp8[(triton.cdiv(queries, rows), heads)](
        q, q_scale, k, k_scale, v, v_scale, out, size**-0.5 / math.log(2), queries, k.shape[0], heads, size, k.stride(0), k_scale.stride(0),
        *v.stride(), v_scale.stride(0), LARGEST=largest, SMALLEST=smallest, ROWS=rows, COLUMNS=columns, BLOCK=max(32, triton.next_power_of_2(size)),
        num_warps=8, num_stages=3)  # fmt: skip
    return out
