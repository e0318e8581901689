"""Rotary rotation of a tensor into a place that is there already (the reference keys of a cache)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def turn_row(source, target, cosine, sine, pairs, head_pairs, BLOCK: tl.constexpr):
    """Rotate one token's interleaved pairs, all heads. BLOCK: pairs held, a power of two >= pairs."""
    element = tl.arange(0, 2 * BLOCK)
    pair = tl.arange(0, BLOCK)
    value = tl.load(source + element, mask=element < 2 * pairs, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, (BLOCK, 2)))
    c = tl.load(cosine + pair % head_pairs, mask=pair < pairs, other=0.0)
    s = tl.load(sine + pair % head_pairs, mask=pair < pairs, other=0.0)
    turned = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (2 * BLOCK,))
    tl.store(target + element, turned.to(target.dtype.element_ty), mask=element < 2 * pairs)


@triton.jit
def _rotate_rows(x, angles, out, x_stride, out_stride, tokens, pairs, head_pairs, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cosine = angles + row * head_pairs
    turn_row(x + row * x_stride, out + row * out_stride, cosine, cosine + tokens * head_pairs, pairs, head_pairs, BLOCK)


def rotate_rows(x: torch.Tensor, angles: torch.Tensor, out: torch.Tensor) -> None:
    """out = x with interleaved pairs turned by angles, computed in fp32.

    x, out: [T, heads, d], fp32 or bf16, heads and d contiguous (any stride over T), not overlapping. angles: fp32 [2, T, d/2],
    contiguous: cosine, sine.
    """
    tokens, heads, size = x.shape
    assert out.shape == x.shape and angles.shape == (2, tokens, size // 2) and angles.is_contiguous(), (x.shape, out.shape, angles.shape)
    assert x.stride()[1:] == out.stride()[1:] == (size, 1), (x.stride(), out.stride())
    pairs = heads * size // 2
    _rotate_rows[(tokens,)](x, angles, out, x.stride(0), out.stride(0), tokens, pairs, size // 2, BLOCK=triton.next_power_of_2(pairs), num_warps=8)
