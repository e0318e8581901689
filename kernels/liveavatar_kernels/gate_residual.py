"""x + gate * y, one gate row per group of tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _gate_residual(x, y, gate, out, width, run, gate_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    kept = tl.load(x + row * width + column, mask=inside).to(tl.float32)
    added = tl.load(y + row * width + column, mask=inside).to(tl.float32)
    share = tl.load(gate + row // run * gate_stride + column, mask=inside)
    tl.store(out + row * width + column, (kept + added * share).to(out.dtype.element_ty), mask=inside)


def gate_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x + gate * y, computed in fp32.

    x, y: [B, T, D], contiguous, fp32 or bf16 (each its own). gate: fp32 [B, G, D], T = G * n, last axis contiguous, B and G
    mergeable without a copy. Returns dtype [B, T, D].
    """
    batch, tokens, width = x.shape
    assert x.is_contiguous() and y.is_contiguous() and x.shape == y.shape and tokens % gate.shape[1] == 0, (x.shape, y.shape, gate.shape)
    gate = gate.view(-1, width)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(width))
    _gate_residual[(batch * tokens, triton.cdiv(width, block))](x, y, gate, out, width, batch * tokens // gate.shape[0], gate.stride(0),
                                                                BLOCK=block, num_warps=4)  # fmt: skip
    return out
