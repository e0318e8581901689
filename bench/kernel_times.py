"""Each Triton kernel at the sizes of the 14B model: error against its torch reference, microseconds of both, GB/s. Needs a GPU.

    python bench/kernel_times.py [--tokens 3168] [--out bench/results/kernels.json]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from liveavatar import ops

from measured import Rows, earlier, parser_of, seconds, show

WIDTH, HEADS, KEYS = 5120, 40, 15_312
LONGEST = 0.05  # seconds of a timing: so many calls, up to 100, that launches do not count
COLUMNS = {"kernel": "", "error": ".2e", "seconds": ".2e", "reference_seconds": ".2e", "gain": ".1f", "gb_per_second": ",.0f", "problem": ""}


def cases(tokens: int, device: torch.device) -> dict[str, tuple[Callable[[], object], int]]:
    """name -> (call, bytes it must move)."""
    draw = torch.Generator(device).manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=draw, device=device)  # noqa: E731
    x, y, packed = randn(1, tokens, WIDTH), randn(1, tokens, WIDTH).bfloat16(), randn(1, tokens, 3 * WIDTH).bfloat16()
    shift, scale, gate = randn(1, 1, 6, WIDTH).unbind(2)[:3]
    weight, wide = randn(WIDTH).bfloat16(), randn(tokens, 13824).bfloat16()
    q, k, v = (part[0].unflatten(-1, (HEADS, -1)) for part in packed.chunk(3, dim=-1))
    angle = randn(tokens, WIDTH // HEADS // 2)
    angles, keys, values = torch.stack([angle.cos(), angle.sin()]), torch.zeros_like(q), torch.zeros_like(v)
    row, small, kept = tokens * WIDTH, ops.Rounded.zeros(*k.shape, device=device), [ops.rounded(randn(1, KEYS, HEADS, WIDTH // HEADS)) for _ in "kv"]
    kept[1] = ops.Rounded(kept[1].values.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), kept[1].scale)  # along the tokens, as a cache keeps them
    return {"norm_modulate": (lambda: ops.norm_modulate(x, shift, scale, 1e-6, torch.bfloat16), 6 * row),
            "gate_residual": (lambda: ops.gate_residual(x, y, gate, torch.bfloat16), 8 * row),
            "rms_norm": (lambda: ops.rms_norm(packed.chunk(3, dim=-1)[0], weight, 1e-6), 4 * row),
            "rotate_into": (lambda: (ops.rotate_into(k, angles, keys), keys)[1], 4 * row),
            "rope_cache": (lambda: torch.cat([ops.rope_cache(q, k, v, angles, keys, values).flatten(), keys.flatten(), values.flatten()]), 12 * row),
            "quantise_rows": (lambda: ops.quantise_rows(wide)[0], 3 * tokens * 13824),
            "round_heads": (lambda: (ops.put(k, small, angles), small.values)[1], 3 * row),
            "restore_heads": (lambda: ops.restored(kept[0][0, :tokens], torch.bfloat16), 3 * row),
            "norm_round": (lambda: ops.norm_modulate(x, shift, scale, 1e-6, ops.E4M3).values, 5 * row),
            "layer_norm": (lambda: ops.layer_norm(x, weight, weight, 1e-6, torch.bfloat16), 6 * row),
            "gelu and quantise_rows": (lambda: ops.gelu(wide[None], ops.E4M3).values, 3 * tokens * 13824),
            "attention_fp8": (lambda: ops.attention(q[None], *kept), 6 * row + 2 * KEYS * WIDTH)}  # fmt: skip


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, launches hidden behind each other."""
    once = statistics.median(seconds(call, device, 3, warm=1))
    inner = max(1, min(100, int(LONGEST / once)))
    return statistics.median(seconds(lambda: [call() for _ in range(inner)], device, 5, warm=2)) / inner


def measure(call: Callable[[], object], size: int, device: torch.device) -> dict:
    """One row."""
    got, took = call().clone().float(), timed(call, device)
    with ops.own_kernels(False):
        expected, plain = call().clone().float(), timed(call, device)
    return {"error": float((got - expected).abs().max() / expected.abs().max()), "seconds": took, "reference_seconds": plain, "gain": plain / took,
            "gb_per_second": size / took / 1e9}  # fmt: skip


@torch.inference_mode()
def main() -> None:
    parser = parser_of(__doc__, "kernels.json", resume=True)
    parser.add_argument("--tokens", type=int, default=3168)
    args = parser.parse_args()
    if not torch.cuda.is_available() or not ops.own_kernels_available():
        parser.error("needs a GPU and Triton; on a CPU tests/test_kernels.py runs the kernels in Triton's interpreter")
    ops.use_attention("fp8")
    device, before = torch.device("cuda"), earlier(args.compare, ("kernel",))
    rows = Rows(args.out, ("kernel",), device, {"config": {"tokens": args.tokens, "width": WIDTH}}, args.resume)
    for name, (call, size) in cases(args.tokens, device).items():
        rows.add({"kernel": name}, lambda: measure(call, size, device))
    show(f"kernels at {args.tokens} tokens of {WIDTH}", rows.made, COLUMNS, ("kernel",), before)
    rows.write()


if __name__ == "__main__":
    main()
