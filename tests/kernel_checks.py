"""Every Triton kernel against its torch reference, in Triton's interpreter: run by test_kernels.py in a process of its own,
because the interpreter is chosen when Triton is imported. Prints one JSON line: name -> largest error over the largest value."""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from liveavatar import ops
from triton.runtime import interpreter

KEYS = 150  # more than attention_fp8 takes at a time
SHAPES = {"even": (1, 6, 64, 2), "odd": (2, 9, 84, 3)}  # batch, tokens, width, heads


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.dtype == expected.dtype and got.shape == expected.shape, (got.dtype, expected.dtype, got.shape, expected.shape)
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max())


def both(op, *arguments):
    """The op as it is on a CPU, and as it would be on a GPU."""
    plain, ops._fused = op(*arguments), lambda *tensors: True
    try:
        return op(*arguments), plain
    finally:
        ops._fused = NEVER


NEVER = ops._fused
ops.fp8_matmul_available = lambda index=None: True
FLOATS = {tl.float32: torch.float32, tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float8e4nv: torch.float8_e4m3fn}


def as_a_gpu_rounds(given: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
    """Triton 3.9's interpreter cuts bf16, and of E4M3 it loses the bit that carries into the exponent; a GPU rounds to nearest, even."""
    bits = torch.from_numpy(np.ascontiguousarray(given).view(f"int{source.primitive_bitwidth}"))
    return bits.view(FLOATS[source]).to(FLOATS[target]).view(getattr(torch, f"int{target.primitive_bitwidth}")).numpy().view(f"uint{target.primitive_bitwidth}")


interpreter._convert_float = as_a_gpu_rounds


def rows(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pointwise(batch: int, tokens: int, width: int, heads: int, dtype: torch.dtype) -> dict[str, float]:
    x, y = rows((batch, tokens, width), dtype, 0) * 3 + 1, rows((batch, tokens, width), dtype, 1)
    groups = 3 if tokens % 3 == 0 else 1
    shift, scale, gate = rows((batch, groups, 6, width), torch.float32, 2).unbind(2)[:3]  # strided, as modulate gives them
    packed = rows((batch, tokens, 3 * width), dtype, 3)
    return {"norm_modulate": error(*both(ops.norm_modulate, x, shift, scale, 1e-6, dtype)),
            "gate_residual": error(*both(ops.gate_residual, x.float(), y, gate, dtype)),
            "rms_norm of a third": error(*both(ops.rms_norm, packed.chunk(3, dim=-1)[1], rows((width,), dtype, 4), 1e-6))}


def rotations(batch: int, tokens: int, width: int, heads: int, dtype: torch.dtype) -> dict[str, float]:
    q, k, v = rows((tokens, 3 * width), dtype, 5).chunk(3, dim=-1)  # thirds of a packed projection
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    angle = rows((tokens, width // heads // 2), torch.float32, 6)
    angles, found = torch.stack([angle.cos(), angle.sin()]), {}
    stores = [[torch.zeros(3 * tokens, heads, width // heads, dtype=dtype) for _ in "kv"] for _ in "fp"]
    results = []
    for store, fused in zip(stores, (True, False)):
        ops._fused = lambda *tensors, fused=fused: fused
        own = [part[tokens : 2 * tokens] for part in store]  # the middle of a ring
        results.append(ops.rope_cache(q, k, v, angles, *own))
        ops.rotate_into(k, angles, store[0][2 * tokens :])
    ops._fused = NEVER
    found["rope_cache q"] = error(*results)
    found["rope_cache and rotate_into, the whole ring"] = max(error(a, b) for a, b in zip(*stores))
    return found


def fp8(batch: int, tokens: int, width: int, heads: int, dtype: torch.dtype) -> dict[str, float]:
    x = rows((tokens, width), dtype, 7)
    x[1] = 0
    (got, scale), (expected, other) = both(ops.quantise_rows, x)
    wide, (y, z) = rows((batch, tokens, width), dtype, 12), both(ops.gelu, rows((batch, tokens, width), dtype, 13), ops.E4M3)
    groups = 3 if tokens % 3 == 0 else 1
    shift, gain = rows((batch, groups, 2, width), torch.float32, 14).unbind(2)
    weight, bias = rows((2, width), dtype, 15)
    found = {"fp8 modulated": both(ops.norm_modulate, wide, shift, gain, 1e-6, ops.E4M3), "fp8 gelu": (y, z),
             "fp8 normed": both(ops.layer_norm, wide.float(), weight, bias, 1e-6, ops.E4M3)}  # fmt: skip
    return {"fp8 rows": error(got, expected), "fp8 scales": error(scale, other),
            "layer_norm": error(*both(ops.layer_norm, wide.float(), weight, bias, 1e-6, dtype)),
            **{name: max(error(a.values, b.values), error(a.scale, b.scale)) for name, (a, b) in found.items()}}  # fmt: skip


def fp8_cache(batch: int, tokens: int, width: int, heads: int, dtype: torch.dtype) -> dict[str, float]:
    """Keys and values into the middle of a ring, out of it again, and attention over it."""
    from liveavatar.models.cache import _along_tokens, _stored

    q, k, v = (part.unflatten(-1, (heads, -1)) for part in rows((tokens, 3 * width), dtype, 8).chunk(3, dim=-1))
    angle = rows((tokens, width // heads // 2), torch.float32, 9)
    angles, stores, found = torch.stack([angle.cos(), angle.sin()]), [], {}
    for fused in (True, False):
        ops._fused = lambda *tensors, fused=fused: fused
        store = [_stored(1, KEYS, heads, width // heads, ops.E4M3, "cpu")[0], _along_tokens(_stored(1, KEYS, heads, width // heads, ops.E4M3, "cpu"))[0]]
        turned = ops.rope_cache(q, k, v, angles, *(part[tokens : 2 * tokens] for part in store))
        for part, seed in zip(store, (10, 11)):
            ops.put(rows((KEYS - 2 * tokens, heads, width // heads), dtype, seed), part[2 * tokens :])
        stores.append([turned, *store])
    ops._fused = NEVER
    found["fp8 cache"] = max(error(getattr(a, part), getattr(b, part)) for a, b in zip(stores[0][1:], stores[1][1:]) for part in ("values", "scale"))
    _, keys, values = stores[1]
    found["fp8 cache restored"] = max(error(*both(ops.restored, part, dtype)) for part in (keys, values))
    ops.use_attention("fp8")
    found["fp8 attention"] = error(*both(ops.attention, 3 * turned[None], keys[None, tokens:], values[None, tokens:]))
    ops.use_attention("auto")
    return found


def whole_forward() -> dict[str, float]:
    """Three blocks of the tiny transformer with every op a kernel, packed q, k, v: the wiring."""
    from conftest import tiny_model
    from liveavatar.models.fast import pack

    def stream(fused: bool) -> torch.Tensor:
        model, draw = tiny_model(), torch.Generator().manual_seed(1)
        text = model.encode_text(torch.randn(9, 16, generator=draw))
        cache = model.new_cache(8, 8, 3, 2, 1)
        if fused:
            pack(model.blocks)
        ops._fused = (lambda *tensors: True) if fused else NEVER
        model.set_sink(cache, model.prefill(torch.randn(16, 1, 8, 8, generator=draw), torch.randn(16, 3, 8, 8, generator=draw), text), 8, 8)
        modulation, audio = model.modulation(602.15), model.encode_audio(torch.randn(1, 400, 12, generator=draw))
        return torch.stack([model(torch.randn(16, 3, 8, 8, generator=draw), modulation, audio, text, cache, block=n, sink_distance=30)
                            for n in (20, 21, 22)])

    with torch.inference_mode():
        return {"three blocks": error(stream(True), stream(False))}


def main() -> None:
    found = {f"{name} {kind} {str(dtype).removeprefix('torch.')}": value
             for kind, shape in SHAPES.items() for dtype in (torch.float32, torch.bfloat16)
             for part in (pointwise, rotations, fp8, fp8_cache) for name, value in part(*shape, dtype).items()}
    found |= {f"{name} float32": value for name, value in whole_forward().items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
