"""Rows to FP8 E4M3 with one scale each, what a linear eats; GELU on the way where one stands before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _quantise_rows(x, out, scale, width, x_stride, GELU: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:  # its tanh form: x (1 + tanh u) / 2 = x sigmoid(2 u)
        value = value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    unit = tl.maximum(tl.max(tl.abs(value), axis=0) / LARGEST, SMALLEST)
    tl.store(scale + row, unit)
    tl.store(out + row * width + column, tl.clamp(value / unit, -LARGEST, LARGEST).to(out.dtype.element_ty), mask=inside)


def quantise_rows(x: torch.Tensor, largest: float, smallest: float, gelu: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """x, or GELU(x) in its tanh form, -> (E4M3 [T, D], fp32 [T, 1]), equal to out * scale up to rounding (to nearest, ties to even).

    x: [T, D], fp32 or bf16, last axis contiguous. largest: the value a row's maximum is mapped to (448); smallest: least scale,
    for rows of zeros.
    """
    rows, width = x.shape
    assert x.stride(1) == 1, x.stride()
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    _quantise_rows[(rows,)](x, out, scale, width, x.stride(0), GELU=gelu, LARGEST=largest, SMALLEST=smallest,
                            BLOCK=triton.next_power_of_2(width), num_warps=8)  # fmt: skip
    return out, scale
