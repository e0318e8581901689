"""Kernels one forward of the 14B model launches, counted without a GPU: the model runs on torch's meta device (shapes without
memory), and every operation that is no view counts as one launch, as does each of our kernels and each attention.

    python bench/launches.py [--out bench/results/launches.json]

An estimate of what torch's profiler finds on a GPU (bench/step.py): a library's matmul may be two kernels, a copy may vanish.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import torch
import torch.nn.functional as F
from liveavatar import ops
from liveavatar.config import FastConfig
from liveavatar.core import Geometry
from liveavatar.models import layers
from liveavatar.models.audio_encoder import AudioTokens
from liveavatar.models.cache import Sink
from liveavatar.models.fast import prepare
from liveavatar.models.s2v import CausalS2V, S2VConfig, TextCache
from liveavatar.ops import Rounded
from torch.utils._python_dispatch import TorchDispatchMode

from measured import earlier, parser_of, show, write

FREE = {"empty", "empty_like", "empty_strided", "detach", "alias", "lift_fresh", "_unsafe_view"}
WAYS = {"plain": FastConfig(kernels=False), "packed": FastConfig(kernels=False, packed_qkv=True), "kernels": FastConfig(),
        "kernels, packed": FastConfig(packed_qkv=True), "kernels, packed, fp8": FastConfig(packed_qkv=True, fp8=True),
        "kernels, packed, fp8, cache": FastConfig(packed_qkv=True, fp8=True, fp8_cache=True),
        "kernels, packed, fp8, attention": FastConfig(packed_qkv=True, fp8=True, fp8_cache=True, attention="fp8")}  # fmt: skip
# Our kernels: argument whose shape the result has, and where its dtype is given (None: that argument's).
KERNELS = {"norm_modulate": 4, "layer_norm": 4, "gelu": 1, "gate_residual": 3, "rms_norm": None, "rotate_into": None, "put": None, "rope_cache": None}
CACHE = torch.bfloat16


class Launches(TorchDispatchMode):
    """Counts by name what reaches the device."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if not operation.is_view and name not in FREE:
            self.counts[name] += 1
        return operation(*args, **(kwargs or {}))


def stand_in(counts: Counter, name: str, dtype_at: int | None):
    """An op that counts as one launch and gives nothing but a shape."""
    def call(*args):
        counts[name] += 1
        dtype = args[0].dtype if dtype_at is None else args[dtype_at]
        made = torch.empty(args[0].shape, dtype=dtype, device="meta")
        return Rounded(made, made[..., :1]) if dtype == ops.E4M3 else made

    return call


def stand_ins(counts: Counter, way: FastConfig) -> dict[str, Callable]:
    """What takes the place of ops that are one launch of ours or of a library, by name."""
    ours = KERNELS.keys() - ({"rope_cache"} if way.fp8_cache else set()) if way.kernels else ()  # an FP8 cache is written in three launches

    def linear(x, weight, scale, bias):
        counts["_scaled_mm"] += 1
        counts["quantise_rows"] += isinstance(x, torch.Tensor)
        return torch.empty((*x.shape[:-1], len(weight)), dtype=bias.dtype, device="meta")

    def attention(q, k, v):
        counts["attention"] += 1
        if isinstance(k, Rounded):
            counts["round_heads" if way.attention == "fp8" else "restore_heads"] += 1 if way.attention == "fp8" else 2
        return torch.empty_like(q)

    return {"attention": attention, "fp8_linear": linear, **{name: stand_in(counts, name, KERNELS[name]) for name in ours}}


@torch.no_grad()  # inference mode would hide what a composite operation is made of
def count(way: FastConfig, geometry: Geometry = Geometry(height=384, width=704), config: S2VConfig | None = None) -> Counter[str]:
    """Launches of one block of a stream whose ring is full, by name."""
    with torch.device("meta"):
        model = prepare(CausalS2V(config or S2VConfig()).cast(CACHE).eval().requires_grad_(False), way)
    c, g, empty = model.config, geometry, lambda *shape, dtype=CACHE: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    cache = model.new_cache(g.latent_height, g.latent_width, g.block_latents, g.ring_blocks)
    kept = (c.num_layers, cache.sink_tokens, c.num_heads, c.head_dim)
    cache.sink, cache.written = Sink(empty(*kept), empty(*kept)), 20
    text = TextCache(((empty(1, c.text_len, c.num_heads, c.head_dim),) * 2,) * c.num_layers)
    audio = AudioTokens(empty(1, g.block_latents, 5, c.dim, dtype=torch.float32), empty(1, g.block_latents, c.dim, dtype=torch.float32))
    x, mode = empty(c.in_dim, g.block_latents, g.latent_height, g.latent_width), Launches()
    plain = mock.patch.object(layers, "fp32_linear", lambda linear, x: F.linear(x.float(), linear.weight.float(), linear.bias.float()))
    with ExitStack() as stack:
        stack.enter_context(plain)  # autocast knows no meta device
        for name, op in stand_ins(mode.counts, way).items():
            stack.enter_context(mock.patch.object(ops, name, op))
        modulation = model.modulation(602.15)
        for number in (20, 21):  # rotations of rows and columns are made once
            mode.counts.clear()
            with mode:
                model(x, modulation, audio, text, cache, block=number, sink_distance=30)
    return mode.counts


def main() -> None:
    parser = parser_of(__doc__, "launches.json")
    args = parser.parse_args()
    rows = []
    for name, way in WAYS.items():
        found = count(way)
        rows.append({"way": name, "launches": found.total(), "most": ", ".join(f"{n} {what}" for what, n in found.most_common(6))})
    show("launches of one forward, 14B, before graphs", rows, {"way": "", "launches": ",d", "most": ""}, ("way",), earlier(args.compare, ("way",)), ("launches",))
    write(args.out, config={"model": S2VConfig().to_dict(), "size": "704x384"}, rows=rows)


if __name__ == "__main__":
    main()
