"""What a loaded transformer may be turned into before it runs: packed projections, FP8 linears and caches, compiled halves of a block.

Each is asked for in the config (model.fast). tests/test_fast.py checks it against the plain model, on the CPU and with a compiler backend
that changes nothing; bench/accuracy.py measures how far it lies from it, compiled and on a GPU too where there is one (tests/test_gpu.py).
A changed model is for inference alone: it has other tensors than its checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from liveavatar import ops
from liveavatar.config import FastConfig
from liveavatar.models.layers import TransformerBlock
from liveavatar.models.s2v import CausalS2V

FP8_PARTS = ("blocks.", "audio_injector.")  # every linear in them: the 460 of model.md section 15.3 (448, and 12 AdaIN)


class Fp8Linear(nn.Module):
    """A linear whose weight is E4M3 with one scale per output row; each token is quantised as it comes, if it was not made so (ops.fp8_linear)."""

    def __init__(self, weight: ops.Rounded, bias: nn.Parameter):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight.values)
        self.register_buffer("scale", weight.scale)
        self.bias = bias

    @classmethod
    def of(cls, linear: nn.Linear) -> Fp8Linear:
        """`linear`, rounded."""
        return cls(ops.Rounded(*ops.quantise_rows(linear.weight.detach())), linear.bias)

    def forward(self, x: torch.Tensor | ops.Rounded) -> torch.Tensor:
        """[..., in] -> [..., out] in the bias's dtype, as bf16 weights would give it up to rounding."""
        return ops.fp8_linear(x, self.weight, self.scale, self.bias)


@torch.no_grad()
def pack(blocks: Iterable[TransformerBlock]) -> None:
    """One matmul for q, k and v of every self-attention, plain or FP8."""
    for block in blocks:
        attention = block.self_attn
        attention.pack(_side_by_side([attention.q, attention.k, attention.v]))


def _side_by_side(parts: Sequence[nn.Module]) -> nn.Module:
    """A linear whose rows are those of `parts`, one after the other."""
    join = lambda name: torch.cat([getattr(part, name) for part in parts])  # noqa: E731
    bias = nn.Parameter(join("bias"), requires_grad=False)
    if isinstance(parts[0], Fp8Linear):
        values = torch.cat([part.weight.view(torch.uint8) for part in parts]).view(ops.E4M3)  # not every device joins E4M3
        return Fp8Linear(ops.Rounded(values, join("scale")), bias)
    with torch.device("meta"):
        made = nn.Linear(parts[0].in_features, len(bias))
    made.weight, made.bias = nn.Parameter(join("weight"), requires_grad=False), bias
    return made


def fp8_linears(model: nn.Module, parts: tuple[str, ...] = FP8_PARTS) -> list[str]:
    """Names of the linears under `parts` that are not FP8 yet."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(parts)]


@torch.no_grad()
def to_fp8(model: nn.Module, parts: tuple[str, ...] = FP8_PARTS) -> int:
    """Replace every linear under `parts` by an Fp8Linear, one after the other, so that both kinds of weights never lie side by
    side as a whole; returns how many. Merge a LoRA before. What weights.load_transformer has rounded as it read is left alone."""
    names = fp8_linears(model, parts)
    for name in names:
        _replace(model, name, Fp8Linear.of(model.get_submodule(name)))
    return len(names)


def with_scales(model: nn.Module, scales: Mapping[str, torch.Tensor]) -> None:
    """Make Fp8Linears of the linears whose weights were read as E4M3. scales: fp32 [out, 1] by the linear's name."""
    for name, scale in scales.items():
        linear = model.get_submodule(name)
        _replace(model, name, Fp8Linear(ops.Rounded(linear.weight.detach(), scale), linear.bias))


def _replace(model: nn.Module, name: str, by: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, by)


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
        pack(model.blocks)
    if fast.fp8:
        to_fp8(model)
    if fast.fp8_cache:
        model.cache_dtype = ops.E4M3
    if fast.compile:
        compile_halves(model)
    return model
