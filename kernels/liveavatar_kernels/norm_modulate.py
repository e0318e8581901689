"""LayerNorm without parameters, scaled and shifted per group of tokens, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _norm_modulate(x, shift, scale, out, eps, width, run, shift_stride, scale_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = row // run
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    up = tl.load(shift + group * shift_stride + column, mask=inside, other=0.0)
    gain = tl.load(scale + group * scale_stride + column, mask=inside, other=0.0)
    tl.store(out + row * width + column, (normed * (1 + gain) + up).to(out.dtype.element_ty), mask=inside)


def norm_modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """LN(x) (1 + scale) + shift, computed in fp32.

    x: [B, T, D], contiguous, fp32 or bf16. shift, scale: fp32 [B, G, D], T = G * n, last axis contiguous, B and G mergeable
    without a copy. Returns dtype [B, T, D]. One program per token holds its whole row; D <= 65536.
    """
    batch, tokens, width = x.shape
    assert x.is_contiguous() and tokens % shift.shape[1] == 0 and shift.shape == scale.shape, (x.shape, shift.shape, scale.shape)
    shift, scale = shift.view(-1, width), scale.view(-1, width)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _norm_modulate[(batch * tokens,)](x, shift, scale, out, eps, width, batch * tokens // shift.shape[0], shift.stride(0), scale.stride(0),
                                      BLOCK=triton.next_power_of_2(width), num_warps=8)  # fmt: skip
    return out
