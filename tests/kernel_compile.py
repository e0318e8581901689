"""Compile every Triton kernel for compute capability 9.0, which needs no GPU: run by test_kernels.py in a process of its own.
Prints JSON: kernel -> bytes of its machine code."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
TENSORS = {"unit": "*fp32", "shift": "*fp32", "scale": "*fp32", "gate": "*fp32", "angles": "*fp32"}  # all other pointers are bf16
E4M3 = {("quantise_rows", "out"), ("round_heads", "out"), ("norm_round", "out"), ("restore_heads", "x"), *(("attention_fp8", name) for name in "qkv")}
NUMBERS = {"width", "run", "tokens", "pairs", "head_pairs", "eps", "size", "heads", "keys", "queries", "factor"}
FILES = {"restore_heads": "round_heads", "norm_round": "norm_modulate"}
CONSTANTS = {"BLOCK": 128, "LARGEST": 448.0, "SMALLEST": 1e-12, "ROWS": 64, "COLUMNS": 64, "TURN": True, "GELU": True, "PLUS": 1.0}


def kind(kernel: str, argument: str) -> str:
    """The type of an argument in Triton's spelling."""
    if argument in CONSTANTS:
        return "constexpr"
    if argument in NUMBERS and (kernel, argument) != ("rope_cache", "keys") or argument.endswith(("stride", "_head", "_element")):
        return "fp32" if argument in ("eps", "factor") else "i32"
    return "*fp8e4nv" if (kernel, argument) in E4M3 else "*fp32" if argument.endswith("_scale") else TENSORS.get(argument, "*bf16")


def main() -> None:
    made = {}
    for name in ("norm_modulate", "gate_residual", "rms_rows", "rotate_rows", "rope_cache", "quantise_rows", "round_heads", "restore_heads", "attention_fp8",
                 "norm_round"):
        function = getattr(import_module(f"liveavatar_kernels.{FILES.get(name, name)}"), "_" + name)
        types = {argument: kind(name, argument) for argument in function.arg_names}
        source = ASTSource(fn=function, signature=types, constexprs={a: CONSTANTS[a] for a, t in types.items() if t == "constexpr"})
        made[name] = len(triton.compile(source, target=HOPPER).asm["cubin"])
    json.dump(made, sys.stdout)


if __name__ == "__main__":
    main()
