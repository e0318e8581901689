"""Compile every Triton kernel for compute capability 9.0 as the 14B model launches it: widths, tiles, warps, stages. Needs no GPU; run by
test_kernels.py in a process of its own. Prints JSON: kernel -> [bytes of machine code, of shared memory] of each of its launches."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import triton
from liveavatar import ops
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import kernel_times

HOPPER = GPUTarget("cuda", 90, 32)
KINDS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float8_e4m3fn: "*fp8e4nv", int: "i32", float: "fp32"}
ALIGNED = [["tt.divisibility", 16]]
TOKENS = 32
made: dict[str, dict[str, list[int]]] = {}


def launch(kernel: JITFunction, given: tuple, options: dict) -> None:
    """In place of a launch: what Triton would compile for these arguments on a GPU."""
    arguments = dict(zip(kernel.arg_names, given)) | {name: value for name, value in options.items() if name in kernel.arg_names}
    constants = {name: value for name, value in arguments.items() if name.isupper() or (isinstance(value, int) and value == 1)}
    types = {name: "constexpr" if name in constants else KINDS[value.dtype if isinstance(value, torch.Tensor) else type(value)]
             for name, value in arguments.items()}  # fmt: skip
    even = {(at,): ALIGNED for at, (name, value) in enumerate(arguments.items())
            if name not in constants and (isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0))}  # fmt: skip
    asked = {name: value for name, value in options.items() if name not in kernel.arg_names}
    key = str((types, constants, even.keys(), asked))
    if key not in (mine := made.setdefault(kernel.__name__, {})):
        found = triton.compile(ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=even), target=HOPPER, options=asked)
        mine[key] = [len(found.asm["cubin"]), found.metadata.shared]


@torch.inference_mode()
def main() -> None:
    JITFunction.__getitem__ = lambda kernel, grid: lambda *given, **options: launch(kernel, given, options)
    kernel_times.KEYS = 512
    cases = kernel_times.cases(TOKENS, torch.device("cpu"))
    keys = torch.randn(TOKENS, kernel_times.HEADS, 128).bfloat16()
    ops._fused, ops.fp8_matmul_available = lambda *tensors: True, lambda index=None: True
    ops.use_attention("fp8")
    for call, _ in cases.values():
        call()
    ops.put(keys, ops.Rounded.zeros(*keys.shape, device="cpu"))  # values, which are not turned
    ops.quantise_rows(torch.randn(TOKENS, kernel_times.WIDTH).bfloat16())
    json.dump({name: list(launches.values()) for name, launches in made.items()}, sys.stdout)


if __name__ == "__main__":
    main()
