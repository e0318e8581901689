"""The whole chain on one GPU with random weights, through the runtime's own roles: ms of a block, all steps and decode, against its 480.

    python bench/chain.py                       # 14B and Wan2.1's decoder at 704x384; 4 steps and finish_after 3
    python bench/chain.py --scale               # a small model on a CPU, without graphs, to show that it runs

A rank's pump runs conditioner, steps and decoder as it does in a stream; audio features are given, so the audio encoder is not in it.
seconds: from picture to picture where blocks always wait; alone: of a block that has no company, from its features to its pictures
on the host. beside: runtime.decode_beside. of_block: seconds over the time a block plays, real time below 100 %.
"""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch
from liveavatar.config import Config, FastConfig, ModelConfig, RuntimeConfig, SamplerConfig
from liveavatar.core import Audio, Close, Frames, Geometry, Open, Opened
from liveavatar.diffusion.schedule import sigmas, timesteps_of
from liveavatar.models.fast import prepare
from liveavatar.models.s2v import S2VConfig
from liveavatar.models.vae import compile_decoder
from liveavatar.runtime import stage_roles
from liveavatar.runtime.links import QueueLink
from liveavatar.runtime.placement import WAN_VAE
from liveavatar.runtime.pump import Pump
from liveavatar.runtime.sources import SINK_DISTANCE

import decode
import step
from measured import Rows, earlier, parser_of, show, spread_of

WAYS = {
    "fp8": FastConfig(packed_qkv=True, graphs=True, fp8=True),  # what configs/serve_1gpu.yaml says
    "bf16": FastConfig(packed_qkv=True, graphs=True),
    "fp8 cache": FastConfig(packed_qkv=True, graphs=True, fp8=True, fp8_cache=True),
    "fp8 attention": FastConfig(packed_qkv=True, graphs=True, fp8=True, fp8_cache=True, attention="fp8"),
    "fp8 compiled": FastConfig(packed_qkv=True, graphs=True, fp8=True, compile=True),
}
KEYS = ("size", "way", "steps", "beside")
COLUMNS = {"size": "", "way": "", "steps": "d", "beside": "", "seconds": ".4f", "worst": ".4f", "fps": ".1f", "of_block": ".0%", "alone": ".4f",
           "memory_gb": ".1f", "problem": ""}  # fmt: skip
WARM, ALONE = 8, 3  # blocks: the ring is full after 4; what is captured is so since the rank was built


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class GivenFeatures:
    """An audio front end that has heard already, and its stream."""

    def __init__(self, features: torch.Tensor):
        self.given = features

    def new_stream(self) -> GivenFeatures:
        return self

    def push(self, pcm: torch.Tensor | None) -> None:
        """Nothing to hear."""

    def features(self, index: int) -> torch.Tensor:
        return self.given


class RandomSource:
    """A StageSource (runtime/sources.py) without a checkpoint."""

    has_vae, observe, lids, head_motion, sink_policy, lookahead_samples, text_encoder_bytes = True, False, False, None, SINK_DISTANCE, 0, 0

    def __init__(self, config: Config, model: S2VConfig, vae: dict, geometry: Geometry):
        self.model_config, self.geometry, self.chain = model, geometry, config.chain
        self.fast, self.vae_config = config.model.fast, vae
        self.sigmas = sigmas(config.sampler.steps, config.sampler.shift)[: config.steps_run] + [0.0]
        self.timesteps = timesteps_of(self.sigmas)

    def dtype(self, device: torch.device) -> torch.dtype:
        return torch.bfloat16

    def transformer(self, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
        return prepare(step.random_model(self.model_config, dtype, device), self.fast)

    def vae(self, dtype: torch.dtype, device: torch.device):
        vae = decode.random_vae(self.vae_config, True, device, dtype)
        if self.fast.compile:
            compile_decoder(vae)
        return vae

    def front_end(self, device: torch.device) -> GivenFeatures:
        return GivenFeatures(noise(self.model_config.audio_layers, self.model_config.audio_dim, self.geometry.frames_per_block))

    def prompt_encoder(self, dtype: torch.dtype, device: torch.device) -> None:
        return None


class Running:
    """A pump on a thread, as a rank has it."""

    def __init__(self, inbox: QueueLink, came: queue.SimpleQueue, over: Future):
        self.inbox, self.came, self.over = inbox, came, over

    def next(self, kind: type) -> float:
        """When the next message of this kind came up. Raises what a role raised."""
        while True:
            try:
                message, when = self.came.get(timeout=0.5)
            except queue.Empty:
                if self.over.done():
                    raise self.over.exception() or EOFError("the pump has ended") from None
                continue
            if isinstance(message, kind):
                return when


@contextmanager
def running(roles: list) -> Iterator[Running]:
    """The roles at work until the block ends."""
    inbox, came = QueueLink(64), queue.SimpleQueue()
    pump = Pump(roles, inbox, None, lambda message: came.put((message, time.perf_counter())))
    with ThreadPoolExecutor(1) as thread:
        try:
            yield Running(inbox, came, thread.submit(pump.run))
        finally:
            pump.stop()


@torch.inference_mode()
def measure(config: Config, source: RandomSource, device: torch.device, blocks: int) -> dict:
    """One row."""
    if device.type == "cuda":
        torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats(device)
    torch._dynamo.reset()
    stage_roles.open_source = lambda config: source
    m, g, numbers = source.model_config, source.geometry, itertools.count()
    block, latents = lambda: Audio("s", index=next(numbers)), (g.latent_height, g.latent_width)
    with running(stage_roles.build_stage(config, config.chain, device)) as rank:
        rank.inbox.send(Open("s", context=noise(40, m.text_dim), reference=noise(m.in_dim, 1, *latents), motion=noise(m.in_dim, 19, *latents)))
        rank.next(Opened)
        for _ in range(WARM):
            rank.inbox.send(block())
            rank.next(Frames)
        alone = []
        for _ in range(ALONE):
            began = time.perf_counter()
            rank.inbox.send(block())
            alone.append(rank.next(Frames) - began)
        for _ in range(blocks + 1):
            rank.inbox.send(block())
        came = [rank.next(Frames) for _ in range(blocks + 1)]
        rank.inbox.send(Close("s"))
    row = spread_of([after - before for before, after in itertools.pairwise(came)])
    mean = (came[-1] - came[0]) / blocks  # beside the steps pictures may come in pairs
    return row | {"seconds": mean, "fps": g.frames_per_block / mean, "of_block": mean / float(g.block_seconds), "alone": spread_of(alone)["seconds"],
                  "memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, "chain.json", resume=True)
    parser.add_argument("--size", metavar="WIDTHxHEIGHT", help="default: 704x384; with --scale 64x64")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", nargs="+", type=int, default=[3, 4], help="of 4: less is sampler.finish_after")
    parser.add_argument("--decode", nargs="+", choices=("after", "beside"), default=["after", "beside"])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--scale", action="store_true", help="small models, on whatever device there is")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.scale:
        parser.error("no GPU here: the 14B model wants one; --scale runs a small model on the CPU")
    model, vae = (step.SCALED, dict(decode.SCALED)) if args.scale else (S2VConfig(), dict(WAN_VAE))
    size = args.size or ("64x64" if args.scale else "704x384")
    width, height = map(int, size.split("x"))
    geometry = Geometry(height=height, width=width)
    said = {"config": {"model": model.to_dict(), "vae": vae, "dtype": str(torch.bfloat16), "blocks": args.blocks, "scaled": args.scale}}
    rows, before = Rows(args.out, KEYS, device, said, args.resume), earlier(args.compare, KEYS)
    for way, where, steps in itertools.product(args.ways, args.decode, args.steps):
        fast = replace(WAYS[way], graphs=device.type == "cuda")
        config = Config(model=ModelConfig(device=device.type, fast=fast), sampler=SamplerConfig(finish_after=steps),
                        runtime=RuntimeConfig(decode_beside=where == "beside", sessions=1))  # fmt: skip
        rows.add({"size": size, "way": way, "steps": steps, "beside": where == "beside"},
                 lambda: measure(config, RandomSource(config, model, vae, geometry), device, args.blocks),
                 "needs a GPU" if where == "beside" and device.type == "cpu" else None)  # fmt: skip
    show("the chain on one device", rows.made, COLUMNS, KEYS, before)
    rows.write()


if __name__ == "__main__":
    main()
