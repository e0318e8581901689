"""What a loaded transformer may be turned into before it runs: packed projections, FP8 linears and caches, compiled halves of a block.

Each is asked for in the config (model.fast) and checked against the plain model by bench/accuracy.py and tests/test_fast.py.
A changed model is for inference alone: it has other tensors than its checkpoint.
"""

from __future__ import annotations

import torch
from torch import nn

from liveavatar import ops
from liveavatar.config import FastConfig
from liveavatar.models.s2v import CausalS2V

FP8_PARTS = ("blocks.", "audio_injector.")  # every linear in them: the 460 of model.md section 15.3 (448, and 12 AdaIN)


class Fp8Linear(nn.Module):
    """A linear whose weight is E4M3 with one scale per output row; each token is quantised as it comes, if it was not made so (ops.fp8_linear)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = ops.quantise_rows(linear.weight.detach())
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor | ops.Rounded) -> torch.Tensor:
        """[..., in] -> [..., out] in the bias's dtype, as bf16 weights would give it up to rounding."""
        return ops.fp8_linear(x, self.weight, self.scale, self.bias)


@torch.no_grad()
def pack(model: CausalS2V) -> None:
    """One matmul for q, k and v of every self-attention."""
    for block in model.blocks:
        block.self_attn.pack()


@torch.no_grad()
def to_fp8(model: nn.Module, parts: tuple[str, ...] = FP8_PARTS) -> int:
    """Replace every linear under `parts` by an Fp8Linear, one after the other, so that both kinds of weights never lie side by
    side as a whole; returns how many. Merge a LoRA before."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(parts)]
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, leaf, Fp8Linear(holder.get_submodule(leaf)))
    return len(linears)


def compile_halves(model: CausalS2V, **options) -> None:
    """torch.compile what stands before and after self-attention in a block; all blocks share the result.

    options: of torch.compile, e.g. backend. Shapes are taken as constant: a new size is compiled again.
    """
    for block in model.blocks:
        block.before = torch.compile(block.before, fullgraph=True, dynamic=False, **options)
        block.after = torch.compile(block.after, fullgraph=True, dynamic=False, **options)


def prepare(model: CausalS2V, fast: FastConfig) -> CausalS2V:
    """`model` changed in place as the config asks; graphs are not its business (runtime/graphs.py)."""
    if fast.packed_qkv:
        pack(model)
    if fast.fp8:
        to_fp8(model)
    if fast.fp8_cache:
        model.cache_dtype = ops.E4M3
    if fast.compile:
        compile_halves(model)
    return model
