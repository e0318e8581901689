"""One forward of the 14B transformer with random weights: seconds, TFLOP/s and share of the matmul roofline, launches, syncs, memory.

    python bench/step.py                                    # 704x384 and 384x256, every way of running; one GPU of 80 GB
    python bench/step.py --sizes 704x384 --ways plain all --compare bench/results/step-old.json
    python bench/step.py --scale                            # a small model on a CPU, to show that it runs

Ways: the plain forward, each optimisation alone, all together, and all together with FP8 linears, cache and attention. The ring is full, text keys
and modulation are ready, as in a stream that runs. A block is timed alone, from latents on the device to velocity, and waited for.
`liveavatar plan --measured` reads the rows: of the way whose options, "fast", are those of its config.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from liveavatar import ops
from liveavatar.config import FastConfig
from liveavatar.core import Geometry
from liveavatar.models.fast import prepare
from liveavatar.models.s2v import CausalS2V, S2VConfig
from liveavatar.runtime.graphs import GraphedForward
from liveavatar.runtime.placement import attention_flops, linear_flops

from measured import Rows, earlier, matmul_rate, parser_of, seconds, settle, show, spread_of

SCALED = S2VConfig(dim=256, ffn_dim=512, freq_dim=64, text_dim=64, text_len=64, num_heads=2, num_layers=4, audio_dim=64, audio_layers=2,
                   audio_inject_layers=(0, 2))  # fmt: skip
PLAIN = FastConfig(kernels=False, attention="torch")
TOGETHER = {"kernels": True, "packed_qkv": True}
WAYS = {
    "plain": PLAIN,
    "kernels": FastConfig(attention="torch"),
    "packed": FastConfig(kernels=False, attention="torch", packed_qkv=True),
    "attention": FastConfig(kernels=False),
    "compile": FastConfig(kernels=False, attention="torch", compile=True),
    "graphs": FastConfig(kernels=False, attention="torch", graphs=True),
    "fp8": FastConfig(kernels=False, attention="torch", fp8=True),
    "eager": FastConfig(**TOGETHER),  # everything in bf16 but graphs: where launches are counted
    "all": FastConfig(**TOGETHER, graphs=True),
    "all+compile": FastConfig(**TOGETHER, graphs=True, compile=True),
    "eager fp8": FastConfig(**TOGETHER, fp8=True),
    "all fp8": FastConfig(**TOGETHER, graphs=True, fp8=True),
    "all+compile fp8": FastConfig(**TOGETHER, graphs=True, compile=True, fp8=True),
    "all fp8 cache": FastConfig(**TOGETHER, graphs=True, fp8=True, fp8_cache=True),
    "all fp8 attention": FastConfig(**TOGETHER, graphs=True, fp8=True, fp8_cache=True, attention="fp8"),
}
WARM = 12  # blocks: the ring is full after 4, each of its slots is captured at the latest in block 10
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
COLUMNS = {"size": "", "way": "", "seconds": ".4f", "worst": ".4f", "tflops": ".0f", "matmul_share": ".1%", "roofline_share": ".1%",
           "host_seconds": ".4f", "launches": ",d", "kernels": ",d", "syncs": "d", "memory_gb": ".1f", "gain": ".2f", "problem": ""}  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """TFLOP/s of matmuls in this run; fp8: None where there is none."""

    bf16: float
    fp8: float | None


def random_model(config: S2VConfig, dtype: torch.dtype, device: torch.device) -> CausalS2V:
    """Weights of the right spread, made where they stay, the same every time."""
    with torch.device("meta"):
        model = CausalS2V(config).cast(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, p in model.named_parameters():
        p.data.fill_(1) if ".norm" in name and name.endswith("weight") else p.data.normal_(0, 0.5 / p[0].numel() ** 0.5 if p.dim() > 1 else 0.02, generator=generator)
    return model.eval().requires_grad_(False)


class Stream:
    """A session at one step, block after block of the same random input."""

    def __init__(self, model: CausalS2V, geometry: Geometry, graphs: bool):
        g, device = geometry, model.device
        h, w = g.latent_height, g.latent_width
        draw = torch.Generator(device).manual_seed(1)
        noise = lambda *shape: torch.randn(shape, generator=draw, device=device)  # noqa: E731
        c = model.config
        self.text = model.encode_text(noise(c.text_len, c.text_dim).to(model.dtype))
        self.cache = model.new_cache(h, w, g.block_latents, g.ring_blocks)
        model.set_sink(self.cache, model.prefill(noise(c.in_dim, 1, h, w).to(model.dtype), noise(c.in_dim, 19, h, w).to(model.dtype), self.text), h, w)
        self.x = noise(c.in_dim, g.block_latents, h, w).to(model.dtype)
        self.audio = model.encode_audio(noise(c.audio_layers, c.audio_dim, g.frames_per_block))
        self.modulation, self.forward, self.number = model.modulation(602.15), GraphedForward(model) if graphs else model, 0

    def block(self) -> torch.Tensor:
        self.number += 1
        return self.forward(self.x, self.modulation, self.audio, self.text, self.cache, block=self.number + 20, sink_distance=30)


@torch.inference_mode()
def measure(config: S2VConfig, geometry: Geometry, way: FastConfig, device: torch.device, dtype: torch.dtype, repeat: int, rates: Rates) -> dict:
    """One row: a model made for this way, a stream on it, timed, traced."""
    with ExitStack() as stack:
        stack.enter_context(ops.own_kernels(way.kernels))
        ops.use_attention(way.attention)
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats(device)
        stream = Stream(prepare(random_model(config, dtype, device), way), geometry, way.graphs)
        row = spread_of(seconds(stream.block, device, repeat, warm=WARM))
        row |= {"host_seconds": host_seconds(stream.block, device), **traced(stream.block, device)}
    linear, attention = linear_flops(config, geometry), attention_flops(config, geometry)
    best = sum(work / ((rates.fp8 if small and rates.fp8 else rates.bf16) * 1e12)
               for work, small in ((linear, way.fp8), (attention, way.attention == "fp8")))
    row["tflops"] = (linear + attention) / row["seconds"] / 1e12
    row |= {"matmul_share": row["tflops"] / rates.bf16, "roofline_seconds": best, "roofline_share": best / row["seconds"]}
    row["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return row


def host_seconds(call: Callable[[], object], device: torch.device) -> float | None:
    """How long the host is busy with giving one block to the device; None where the host is the device."""
    if device.type != "cuda":
        return None
    settle(device)
    began = time.perf_counter()
    call()
    taken = time.perf_counter() - began
    settle(device)
    return taken


def traced(call: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Of one block by torch's profiler: launches by the host, kernels on the device (more, with graphs), waits of the host."""
    if device.type != "cuda":
        return {}
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    settle(device)
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("block"):
            call()
        settle(device)
    events = profile.events()
    span = next(e.time_range for e in events if e.name == "block" and e.device_type == torch.autograd.DeviceType.CPU)
    inside = Counter(e.name for e in events if e.device_type == torch.autograd.DeviceType.CPU and span.start <= e.time_range.start < span.end)
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and e.name != "block"]
    return {"launches": sum(n for name, n in inside.items() if name.startswith(LAUNCHES)), "syncs": sum(inside[name] for name in SYNCS),
            "kernels": sum(not e.name.startswith(("Memcpy", "Memset")) for e in on_device)}  # fmt: skip


def refusal(way: FastConfig, device: torch.device, rates: Rates) -> str | None:
    """Why this machine cannot run it."""
    if way.graphs and device.type != "cuda":
        return "needs a GPU"
    return "no FP8 units" if (way.fp8 or way.fp8_cache) and device.type == "cuda" and rates.fp8 is None else None


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, "step.json", resume=True)
    parser.add_argument("--sizes", nargs="+", metavar="WIDTHxHEIGHT", help="default: 704x384 384x256; with --scale 64x64")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--layers", type=int, help="fewer layers of the same width, where memory is short")
    parser.add_argument("--scale", action="store_true", help="a small model, on whatever device there is")
    parser.add_argument("--reference", type=Path, help="JSON of bench/reference_adapter.py: its seconds over ours become a column")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.scale:
        parser.error("no GPU here: the 14B model wants one; --scale runs a small model on the CPU")
    config = SCALED if args.scale else S2VConfig(**({"num_layers": args.layers, "audio_inject_layers": tuple(
        i for i in S2VConfig().audio_inject_layers if i < args.layers)} if args.layers else {}))  # fmt: skip
    sizes, dtype = args.sizes or (["64x64"] if args.scale else ["704x384", "384x256"]), torch.bfloat16
    rates = Rates(matmul_rate(device, 512 if device.type == "cpu" else 8192), matmul_rate(device, 8192, fp8=True) if ops.fp8_matmul_available() else None)
    print(f"matmul: {rates.bf16:.4g} TFLOP/s bf16, {'no' if rates.fp8 is None else format(rates.fp8, '.4g')} FP8; attention by {ops.best_attention()}")
    before, theirs = earlier(args.compare, ("size", "way")), earlier(args.reference, ("size",))

    said = {"matmul_tflops": {"bf16": rates.bf16, "fp8": rates.fp8},
            "config": {"model": config.to_dict(), "dtype": str(dtype), "repeat": args.repeat, "scaled": args.scale}}  # fmt: skip

    def measured(size: str, way: FastConfig) -> dict:
        width, height = map(int, size.split("x"))
        row, reference = measure(config, Geometry(height=height, width=width), way, device, dtype, args.repeat, rates), theirs.get((size,))
        return row | {"gain": reference["seconds"] / row["seconds"] if reference else None, "role": "step", "fast": asdict(way)}

    rows = Rows(args.out, ("size", "way"), device, said, args.resume)
    for size, name in itertools.product(sizes, args.ways):
        rows.add({"size": size, "way": name}, lambda: measured(size, WAYS[name]), refusal(WAYS[name], device, rates))
    show("one forward", rows.made, COLUMNS, ("size", "way"), before)
    rows.write()


if __name__ == "__main__":
    main()
