"""How far each fast path lies from the plain one: on the parity fixture, on one layer of full width and on a stream of two, random weights.

    python bench/accuracy.py [--fixture tests/golden/causal_s2v] [--width 5120] [--out bench/results/accuracy-cpu.json]

References: the fixture itself; for layer and stream what this machine makes of them in fp32 without our kernels, without TF32, with the
attention written out. Of a layer the update it makes is compared, not what it is added to. The stream is long enough for every
CUDA graph of its full ring to be captured and then replayed. FP8 linears and FP8 attention run by their dequantising references where
there are no FP8 units: the same rounding, summed in another order. Attention by name is that backend alone, and no other in its place.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from liveavatar import ops
from liveavatar.config import FastConfig
from liveavatar.models.fast import compile_halves, pack, to_fp8
from liveavatar.models.fast import prepare as prepared
from liveavatar.core import Geometry
from liveavatar.models.layers import BlockModulation, TransformerBlock
from liveavatar.models.s2v import S2VConfig
from liveavatar.runtime.parity import Forwards
from liveavatar.runtime.sources import Fixture
from torch.nn.attention import SDPBackend, sdpa_kernel

from measured import HERE, Rows, earlier, parser_of, show
from step import Stream, random_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16, FP32 = torch.bfloat16, torch.float32
PLAIN = FastConfig(kernels=False, attention="torch")
PATHS = {
    "plain fp32": (FP32, PLAIN),
    "packed fp32": (FP32, FastConfig(kernels=False, attention="torch", packed_qkv=True)),
    "fp8 fp32": (FP32, FastConfig(kernels=False, attention="torch", fp8=True)),
    "plain bf16": (BF16, PLAIN),
    "packed bf16": (BF16, FastConfig(kernels=False, attention="torch", packed_qkv=True)),
    "fp8 bf16": (BF16, FastConfig(kernels=False, attention="torch", packed_qkv=True, fp8=True)),
    "fp8 cache fp32": (FP32, FastConfig(kernels=False, attention="torch", fp8_cache=True)),
    "fp8 attention fp32": (FP32, FastConfig(kernels=False, attention="fp8", fp8_cache=True)),
    "fp8 cache bf16": (BF16, FastConfig(kernels=False, attention="torch", fp8_cache=True)),
    "fp8 attention bf16": (BF16, FastConfig(kernels=False, attention="fp8", fp8_cache=True)),
    "fp8 all bf16": (BF16, FastConfig(kernels=False, attention="fp8", packed_qkv=True, fp8=True, fp8_cache=True)),
    "kernels bf16": (BF16, FastConfig(packed_qkv=True)),
    "kernels fp8 bf16": (BF16, FastConfig(packed_qkv=True, fp8=True)),
    "kernels fp8 all bf16": (BF16, FastConfig(packed_qkv=True, fp8=True, fp8_cache=True, attention="fp8")),
    **{f"attention {name} bf16": (BF16, FastConfig(kernels=False, attention=name)) for name in ("torch", "cudnn", "flash2", "flash3")},
    "graphs bf16": (BF16, FastConfig(kernels=False, attention="torch", graphs=True)),
    "kernels graphs bf16": (BF16, FastConfig(packed_qkv=True, graphs=True)),
    "kernels graphs fp8 bf16": (BF16, FastConfig(packed_qkv=True, fp8=True, graphs=True)),
    "kernels graphs fp8 all bf16": (BF16, FastConfig(packed_qkv=True, fp8=True, fp8_cache=True, attention="fp8", graphs=True)),
    "compiled bf16": (BF16, FastConfig(kernels=False, attention="torch", compile=True)),  # last: it takes longest
}
COLUMNS = {"where": "", "path": "", "cosine": ".6f", "max_error": ".2e", "rms_error": ".2e", "problem": ""}
TOKENS, KEYS, TEXT = 64, 256, 64
BLOCKS = 16  # of the stream: a ring of 4 is full after 4, the last of its places is captured at block 10


@contextmanager
def reference() -> Iterator[None]:
    """Nothing fast: what the others are compared with."""
    ops.use_attention("torch")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # and so it stays
    with ops.own_kernels(False), sdpa_kernel(SDPBackend.MATH):
        yield


def needs_gpu(name: str) -> bool:
    """On a CPU the path would be another one."""
    return "kernels" in name or "graphs" in name or name.startswith("attention ")


def distance(got: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Cosine, largest error over the largest value, root mean square of the error over that of the values."""
    got, expected = got.float().flatten().cpu(), expected.float().flatten().cpu()
    d = got - expected
    return {"cosine": float(F.cosine_similarity(got.double(), expected.double(), dim=0)),
            "max_error": float(d.abs().max() / expected.abs().max()), "rms_error": float(d.norm() / expected.norm())}  # fmt: skip


@torch.inference_mode()
def on_fixture(path: Path, dtype: torch.dtype, way: FastConfig) -> dict[str, float]:
    """Velocities of all blocks of a causal fixture in sequence, each over the ring the ones before it left."""
    fixture = Fixture(path)
    calls = Forwards(fixture)
    prepared(calls.model.cast(dtype).to(DEVICE), way)
    calls.text = calls.model.encode_text(fixture.tensor("in.context"))
    modulation, cache = calls.model.modulation(fixture.facts["timestep"]), calls.cache(calls.prefill("in.ref0"))
    got, expected = [], []
    for block, distance_of_sink in enumerate(fixture.facts["rel_per_block"]):
        if block == fixture.facts.get("sink_reprefill_before_block"):
            calls.set_sink(cache, calls.prefill("in.ref1"))
        velocity = calls.velocity(cache, modulation, block, distance_of_sink)
        if (name := f"block.{block}.v") in fixture:
            got.append(velocity), expected.append(fixture.tensor(name))
    return distance(torch.stack(got), torch.stack(expected))


class FullWidth:
    """One layer with random weights and inputs, and the update it makes in plain fp32."""

    def __init__(self, dim: int):
        heads, self.dim = dim // 128, dim
        torch.manual_seed(0)
        self.block = TransformerBlock(dim, int(2.7 * dim), heads, 1e-6).eval().requires_grad_(False)
        for norm in (m for name, m in self.block.named_modules() if "norm" in name):
            norm.weight.data.uniform_(0.5, 1.5)
        self.x = torch.randn(1, TOKENS, dim)
        self.modulation = BlockModulation(*(0.3 * torch.randn(1, 1, dim) + (row in (2, 5)) for row in range(6)))
        self.past = [torch.randn(1, KEYS, heads, 128) for _ in "kv"]
        self.text = tuple(torch.randn(1, TEXT, heads, 128) for _ in "kv")
        with reference():
            self.expected = self.update(self.block, PLAIN)

    @torch.inference_mode()
    def update(self, block: TransformerBlock, way: FastConfig) -> torch.Tensor:
        dtype = block.dtype

        def attend(q, k, v):
            keys, values = (torch.cat([past.to(dtype), own], dim=1) for past, own in zip(self.past, (k, v)))
            return ops.attention(q, *(ops.rounded(x) for x in (keys, values)) if way.fp8_cache else (keys, values))

        x = self.x.to(dtype)
        return block(x, self.modulation, attend, tuple(t.to(dtype) for t in self.text)).float() - x.float()

    def row(self, dtype: torch.dtype, way: FastConfig) -> dict[str, float]:
        state = {name: tensor.to(dtype) for name, tensor in self.block.state_dict().items()}
        with torch.device("meta"):
            block = TransformerBlock(self.dim, int(2.7 * self.dim), self.dim // 128, 1e-6)
        block.load_state_dict(state, assign=True)
        block.requires_grad_(False)
        if way.packed_qkv:
            pack([block])
        if way.fp8:
            to_fp8(block, ("",))
        if way.compile:
            compile_halves(torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([block])}))
        return distance(self.update(block, way), self.expected)


class ShortStream:
    """A model of two layers with random weights, and the velocities of BLOCKS blocks in plain fp32."""

    def __init__(self, dim: int):
        config = replace(S2VConfig(), dim=dim, ffn_dim=round(2.7 * dim / 128) * 128, num_heads=dim // 128, num_layers=2, audio_inject_layers=(0, 1))
        self.model = random_model(config, FP32, DEVICE)
        with reference():
            self.expected = self.velocities(self.model, PLAIN)

    @torch.inference_mode()
    def velocities(self, model: torch.nn.Module, way: FastConfig) -> torch.Tensor:
        stream = Stream(model, Geometry(height=64, width=64), way.graphs)
        return torch.stack([stream.block() for _ in range(BLOCKS)])

    def row(self, dtype: torch.dtype, way: FastConfig) -> dict[str, float]:
        return distance(self.velocities(prepared(copy.deepcopy(self.model).cast(dtype), way), way), self.expected)


def measure(distance_at: Callable[[torch.dtype, FastConfig], dict], dtype: torch.dtype, way: FastConfig) -> dict:
    """One row."""
    torch._dynamo.reset()
    ops.use_attention(way.attention)
    if way.attention == "cudnn":  # ops falls back where it refuses; here that is an error
        q = torch.zeros(1, 8, TOKENS, 128, dtype=dtype, device=DEVICE)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(q, q, q)
    with ops.own_kernels(way.kernels):
        return distance_at(dtype, way)


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, "accuracy-cpu.json", resume=True)
    parser.add_argument("--fixture", type=Path, default=HERE.parent / "tests" / "golden" / "causal_s2v")
    parser.add_argument("--width", type=int, default=5120)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=[name for name in PATHS if DEVICE.type == "cuda" or not needs_gpu(name)])
    args = parser.parse_args(arguments)
    with DEVICE:
        layer, stream = FullWidth(args.width), ShortStream(args.width)
    places = {args.fixture.name: lambda dtype, way: on_fixture(args.fixture, dtype, way), f"a layer of {args.width}": layer.row,
              f"a stream of {BLOCKS} blocks": stream.row}  # fmt: skip
    said = {"config": {"fixture": args.fixture.name, "width": args.width, "tokens": TOKENS, "keys": KEYS + TOKENS}}
    rows, before = Rows(args.out, ("where", "path"), DEVICE, said, args.resume), earlier(args.compare, ("where", "path"))
    for name, (where, distance_at) in itertools.product(args.paths, places.items()):
        if PATHS[name][1].graphs and where != f"a stream of {BLOCKS} blocks":
            continue  # too short for a replay
        problem = "needs a GPU" if needs_gpu(name) and DEVICE.type == "cpu" else None
        rows.add({"where": where, "path": name}, lambda: measure(distance_at, *PATHS[name]), problem)
    show("distance from the plain path", rows.made, COLUMNS, ("where", "path"), before, ("rms_error",))
    rows.write()


if __name__ == "__main__":
    main()
