"""LayerNorm, scaled and shifted per group of tokens, in one pass: to a float, or to FP8 for the linear that follows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def normed_row(x, shift, scale, eps, width, column, inside, PLUS: tl.constexpr):
    """One row of LN(x) (PLUS + scale) + shift in fp32; zeros outside."""
    value = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    up = tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    return normed * (PLUS + gain) + up


@triton.jit
def _norm_modulate(x, shift, scale, out, eps, width, run, shift_stride, scale_stride, PLUS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    made = normed_row(x + row * width, shift + row // run * shift_stride, scale + row // run * scale_stride, eps, width, column, inside, PLUS)
    tl.store(out + row * width + column, made.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_round(x, shift, scale, out, unit, eps, width, run, shift_stride, scale_stride, PLUS: tl.constexpr, LARGEST: tl.constexpr,
                SMALLEST: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    made = normed_row(x + row * width, shift + row // run * shift_stride, scale + row // run * scale_stride, eps, width, column, inside, PLUS)
    step = tl.maximum(tl.max(tl.abs(made), axis=0) / LARGEST, SMALLEST)
    tl.store(unit + row, step)
    tl.store(out + row * width + column, tl.clamp(made / step, -LARGEST, LARGEST).to(out.dtype.element_ty), mask=inside)


def norm_modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, dtype: torch.dtype, plus: float = 1.0) -> torch.Tensor:
    """LN(x) (plus + scale) + shift, computed in fp32.

    x: [B, T, D], contiguous, fp32 or bf16. shift, scale: any float [B, G, D] with T = G * n, or [1, 1, D]; last axis contiguous, B and
    G mergeable without a copy. Returns dtype [B, T, D]. One program per token holds its whole row; D <= 65536.
    """
    shift, scale, run = _by_run(x, shift, scale)
    out, width = torch.empty(x.shape, dtype=dtype, device=x.device), x.shape[2]
    _norm_modulate[(x.shape[0] * x.shape[1],)](x, shift, scale, out, eps, width, run, shift.stride(0), scale.stride(0), PLUS=plus,
                                               BLOCK=triton.next_power_of_2(width), num_warps=8)  # fmt: skip
    return out


def norm_round(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, plus: float, largest: float,
               smallest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """norm_modulate, its rows rounded as quantise_rows does: (E4M3 [B, T, D], fp32 [B, T, 1])."""
    shift, scale, run = _by_run(x, shift, scale)
    out, width = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device), x.shape[2]
    unit = torch.empty((*x.shape[:2], 1), dtype=torch.float32, device=x.device)
    _norm_round[(x.shape[0] * x.shape[1],)](x, shift, scale, out, unit, eps, width, run, shift.stride(0), scale.stride(0), PLUS=plus, LARGEST=largest,
                                            SMALLEST=smallest, BLOCK=triton.next_power_of_2(width), num_warps=8)  # fmt: skip
    return out, unit


def _by_run(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """shift and scale as rows, each for so many tokens in sequence."""
    batch, tokens, width = x.shape
    assert x.is_contiguous() and tokens % shift.shape[1] == 0 and shift.shape == scale.shape, (x.shape, shift.shape, scale.shape)
    shift, scale = shift.view(-1, width), scale.view(-1, width)
    return shift, scale, batch * tokens // shift.shape[0]
