"""Rotate a block's q and k and put k and v where they stay, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liveavatar_kernels.rotate_rows import turn_row


@triton.jit
def _rope_cache(q, k, v, angles, turned, keys, values, q_stride, k_stride, v_stride, keys_stride, values_stride, tokens, pairs, head_pairs,
                BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    cosine = angles + row * head_pairs
    sine = cosine + tokens * head_pairs
    if part == 0:
        turn_row(q + row * q_stride, turned + row * 2 * pairs, cosine, sine, pairs, head_pairs, BLOCK)
    elif part == 1:
        turn_row(k + row * k_stride, keys + row * keys_stride, cosine, sine, pairs, head_pairs, BLOCK)
    else:
        element = tl.arange(0, 2 * BLOCK)
        inside = element < 2 * pairs
        tl.store(values + row * values_stride + element, tl.load(v + row * v_stride + element, mask=inside), mask=inside)


def rope_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, angles: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """q turned by angles; k turned goes into keys, v as it is into values (views of a ring at the block's rows).

    q, k, v, keys, values: [T, heads, d], one dtype (fp32 or bf16), heads and d contiguous, any stride over T. angles: fp32
    [2, T, d/2], contiguous: cosine, sine. Returns a contiguous [T, heads, d] of q's dtype.
    """
    tokens, heads, size = q.shape
    for x in (q, k, v, keys, values):
        assert x.shape == q.shape and x.dtype == q.dtype and x.stride()[1:] == (size, 1), (x.shape, x.dtype, x.stride())
    assert angles.shape == (2, tokens, size // 2) and angles.is_contiguous(), (angles.shape, angles.stride())
    turned = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    pairs = heads * size // 2
    strides = (x.stride(0) for x in (q, k, v, keys, values))
    _rope_cache[(tokens, 3)](q, k, v, angles, turned, keys, values, *strides, tokens, pairs, size // 2, BLOCK=triton.next_power_of_2(pairs), num_warps=8)
    return turned
