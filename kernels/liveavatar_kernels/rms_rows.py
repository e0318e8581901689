"""Root-mean-square norm of rows with a weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_rows(x, weight, out, eps, width, x_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value, axis=0) / width + eps) * gain
    tl.store(out + row * width + column, normed.to(out.dtype.element_ty), mask=inside)


def rms_rows(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last axis, computed in fp32.

    x: [..., D], fp32 or bf16, last axis contiguous, the other axes mergeable without a copy: a third of a packed q, k, v is
    such a view. weight: [D], contiguous, any float. Returns x's dtype, contiguous.
    """
    width = x.shape[-1]
    rows = x.view(-1, width)
    assert rows.stride(1) == 1 and weight.shape == (width,), (x.shape, x.stride(), weight.shape)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_rows[(rows.shape[0],)](rows, weight, out, eps, width, rows.stride(0), BLOCK=triton.next_power_of_2(width), num_warps=8)
    return out
