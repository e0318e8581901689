"""What each rank of a cut chain loads and how much memory that takes, or a refusal with the numbers.

Sizes come from the very modules that will run, built on torch's "meta" device (shapes without memory), so
they cannot drift from the code; model.md section 18 has the same numbers by arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import psutil
import torch
from rich.table import Table

from liveavatar.config import Config, FastConfig
from liveavatar.core import FPS, ConfigError, Geometry, PlacementError
from liveavatar.models.cache import cache_bytes
from liveavatar.models.fast import prepare
from liveavatar.models.s2v import CausalS2V, S2VConfig
from liveavatar.ops import E4M3
from liveavatar.runtime.seats import Seat, seats_of

PROCESS_BYTES = 600_000_000  # a Python process with torch imported, on the host
CUDA_CONTEXT_BYTES = 800_000_000  # context, cuBLAS workspaces, communicator of one GPU rank
DEFAULT_COSTS = {"condition": 0.1, "step": 1.0, "decode": 0.4}  # relative time of a role, until measured
WAN_VAE = {"base_dim": 96, "z_dim": 16}  # AutoencoderKLWan's own defaults are Wan2.1's


# ---------------------------------------------------------------- cuts


def cut(chain: Sequence[str], ranks: int, costs: Mapping[str, float] | None = None) -> tuple[tuple[str, ...], ...]:
    """The cut of `chain` into `ranks` stages whose slowest stage is fastest.

    costs: relative seconds per role (or per kind: "step"). Raises PlacementError when there are more ranks
    than roles. Five ranks over four steps give the paper's cut, four let decode share the last rank.
    """
    if not 1 <= ranks <= len(chain):
        raise PlacementError(f"{ranks} ranks for a chain of {len(chain)} roles ({' '.join(chain)}): choose 1 to {len(chain)}")
    prices = [_cost(name, {**DEFAULT_COSTS, **(costs or {})}) for name in chain]

    @lru_cache(maxsize=None)
    def best(start: int, pieces: int) -> tuple[float, tuple[int, ...]]:
        if pieces == 1:
            return sum(prices[start:]), (len(chain),)
        options = []
        for end in range(start + 1, len(chain) - pieces + 2):
            slowest, ends = best(end, pieces - 1)
            options.append((max(sum(prices[start:end]), slowest), (end, *ends)))
        return min(options)

    ends = best(0, ranks)[1]
    return tuple(tuple(chain[a:b]) for a, b in zip((0, *ends), ends))


def _cost(name: str, costs: Mapping[str, float]) -> float:
    return costs[name] if name in costs else costs[name.rstrip("0123456789")]


def check_cut(stages: Sequence[Sequence[str]], chain: Sequence[str]) -> None:
    """Raise PlacementError naming the first wrong piece unless `stages` concatenate to `chain`."""
    expected = list(chain)
    for index, stage in enumerate(stages):
        if not stage:
            raise PlacementError(f"stages[{index}] is empty: every rank needs a role")
        for name in stage:
            wanted = expected.pop(0) if expected else "nothing (the chain is complete)"
            if name != wanted:
                raise PlacementError(f"stages[{index}]: found {name!r} where {wanted!r} must stand; the stages must "
                                     f"concatenate to {' '.join(chain)}")
    if expected:
        raise PlacementError(f"stages end too early: {expected[0]!r} is missing; the stages must concatenate to {' '.join(chain)}")


def steps_of(stage: Sequence[str]) -> int:
    """How many denoising steps a stage holds."""
    return sum(name.startswith("step") for name in stage)


def check_together(config: Config, stages: Sequence[Sequence[str]]) -> None:
    """Raise ConfigError where the register (runtime.shift_register, runtime.batch) could never move two blocks together, or graphs could not."""
    r = config.runtime
    if config.model.fast.graphs and (r.shift_register or r.batch > 1 or max(r.shards or (1,)) > 1):
        raise ConfigError("model.fast.graphs: a captured forward is of one block on one rank: not with runtime.shards, shift_register or batch")
    if r.shift_register and max(map(steps_of, stages)) < 2:
        raise ConfigError("runtime.shift_register: no stage holds several steps, so there is nothing to move together: "
                          "cut the chain into fewer stages, or leave it off")
    if r.batch > r.sessions:
        raise ConfigError(f"runtime.batch={r.batch}: more than runtime.sessions={r.sessions}, it could never be filled")


def check_shards(config: Config, stages: Sequence[Sequence[str]], model: S2VConfig, geometry: Geometry) -> None:
    """Raise ConfigError where the ranks of a stage cannot share its forwards (runtime.shards)."""
    for seat in seats_of(config, stages):
        if seat.shards == 1 or seat.shard:
            continue
        where, rows = f"runtime.shards: stage {seat.stage} ({'+'.join(seat.roles)}) over {seat.shards} ranks", geometry.latent_height // 2
        if steps_of(seat.roles) < len(seat.roles):
            raise ConfigError(f"{where}: a shared stage holds steps alone: give condition and decode stages of their own")
        if model.num_heads % seat.shards:
            raise ConfigError(f"{where}: the {model.num_heads} heads do not divide by {seat.shards}")
        if rows % seat.shards:
            raise ConfigError(f"{where}: the {rows} rows of tokens of {geometry.width}x{geometry.height} do not divide by {seat.shards}")
        if config.runtime.launcher == "inproc":
            raise ConfigError(f"{where}: ranks that share a stage are processes: say runtime.launcher=local, torchrun or ray")
        if config.runtime.shift_register or config.runtime.batch > 1:
            raise ConfigError(f"{where}: not together with runtime.shift_register or runtime.batch: what shares a forward there depends on "
                              "when messages come, and the ranks of a stage must agree on it")


def blocks_inside(stages: Sequence[Sequence[str]], shift_register: bool) -> int:
    """Blocks of one session a chain works on at once: one a stage, or one a step of a shift register."""
    return sum(max(1, steps_of(stage)) if shift_register else 1 for stage in stages)


def fewer_steps(config: Config) -> int | None:
    """Steps of a block without its last one (core.Audio.finish_after). config: stages written out. None where leaving it out makes
    nothing faster, since its rank does nothing else, or where steps move in a register."""
    last = sum(map(steps_of, config.stages)) - 1
    shared = any(f"step{last}" in stage and len(stage) > 1 for stage in config.stages)
    return last if last > 0 and shared and not config.runtime.shift_register and config.runtime.batch == 1 else None


# ---------------------------------------------------------------- devices


@dataclass(frozen=True, kw_only=True)
class Device:
    """One rank's place. memory: bytes free on it. rate: FLOP/s one forward reaches there, None: unknown."""

    name: str
    kind: str  # "cuda" | "cpu"
    memory: int
    rate: float | None = None


def host_memory() -> int:
    """Bytes of host RAM this process may still take (the cgroup's limit counts)."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def local_devices(kind: str, ranks: int) -> list[Device]:
    """The devices `ranks` ranks would get on this machine. kind: "auto" | "cpu" | "cuda". Raises PlacementError."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and kind != "cpu" else 0
    if kind == "cuda" and gpus < ranks:
        raise PlacementError(f"model.device: cuda with {ranks} stages needs {ranks} GPUs, this machine has {gpus}: "
                             "cut the chain into fewer stages, or say model.device=cpu (plan: --memory GB of each)")
    if gpus < ranks:
        return [Device(name="cpu", kind="cpu", memory=host_memory())] * ranks
    return [Device(name=f"cuda:{i} {torch.cuda.get_device_name(i)}", kind="cuda", memory=torch.cuda.mem_get_info(i)[0])
            for i in range(ranks)]


# ---------------------------------------------------------------- sizes


@lru_cache(maxsize=8)
def transformer_bytes(model: S2VConfig, dtype: torch.dtype, fp8: bool = False) -> int:
    """Bytes of all tensors of the transformer, kept in `dtype` but for the fp32 parts and, with fp8, the linears of blocks and injectors
    (E4M3 and a scale per row)."""
    with torch.device("meta"):
        made = prepare(CausalS2V(model).cast(dtype), FastConfig(fp8=fp8))
    return sum(tensor.nbytes for tensor in (*made.parameters(), *made.buffers()))


def vae_bytes(vae: Mapping, geometry: Geometry, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes of the weights, bytes of one session's decoder state) of an AutoencoderKLWan config."""
    from liveavatar.models.vae import StreamingVAE, build_module  # brings in diffusers: seconds

    with torch.device("meta"):
        module = build_module(dict(vae))
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    codec = StreamingVAE(module)
    state, latent = codec.new_state(), (codec.z_dim, 1, geometry.latent_height, geometry.latent_width)
    for _ in range(2):  # every cache entry has its final shape after the second latent
        codec.decode(torch.empty(latent, device="meta"), state)
    return sum(p.numel() for p in module.parameters()) * dtype.itemsize, state.nbytes


def linear_flops(model: S2VConfig, geometry: Geometry) -> float:
    """FLOPs of one block in the projections of the transformer with cached text (model.md section 18)."""
    n, d = geometry.block_tokens, model.dim
    layer = 12 * n * d * d + 4 * n * d * model.ffn_dim
    return model.num_layers * layer + len(model.audio_inject_layers) * 4 * n * d * d


def attention_flops(model: S2VConfig, geometry: Geometry) -> float:
    """FLOPs of one block in scores and sums of attention over [sink | ring] and over the text."""
    keys = geometry.ring_tokens + geometry.sink_tokens + model.text_len
    return model.num_layers * 4 * geometry.block_tokens * keys * model.dim


def forward_flops(model: S2VConfig, geometry: Geometry) -> float:
    """FLOPs of one block through the transformer."""
    return linear_flops(model, geometry) + attention_flops(model, geometry)


def decode_flops(vae: Mapping, geometry: Geometry) -> float:
    """FLOPs of decoding one block, scaled from 27.4 TFLOP at 704x384 and base width 96 (model.md section 12)."""
    width = vae.get("base_dim", 96) / 96 / (vae.get("patch_size") or 1)
    return 27.4e12 * geometry.block_latents / 3 * geometry.height * geometry.width / (704 * 384) * width**2


# ---------------------------------------------------------------- plan


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One rank. fixed: bytes by part, whatever the sessions; per_session: bytes each session adds. shard: 0 but for those that follow in a
    stage of several ranks."""

    rank: int
    shard: int = 0
    roles: tuple[str, ...]
    device: Device
    fixed: dict[str, int] = field(default_factory=dict)
    per_session: dict[str, int] = field(default_factory=dict)
    seconds: float | None = None  # of one block, predicted (a shared stage: without its exchange) or measured

    def bytes(self, sessions: int) -> int:
        """What it holds with so many sessions."""
        return sum(self.fixed.values()) + sessions * sum(self.per_session.values())

    @property
    def sessions_that_fit(self) -> int:
        left = self.device.memory - sum(self.fixed.values())
        each = sum(self.per_session.values())
        return max(0, left // each) if each else 1_000_000 * (left >= 0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A cut with what every rank loads. `refuse` raises when it does not fit; `table` prints it."""

    ranks: tuple[RankPlan, ...]
    sessions: int
    geometry: Geometry
    dtype: torch.dtype
    fast: FastConfig  # what is kept in FP8
    host_bytes: int  # host RAM all ranks and the head take
    host_memory: int

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        return tuple(r.roles for r in self.ranks if r.shard == 0)

    @property
    def slowest(self) -> RankPlan | None:
        """The bottleneck, when stage times are known."""
        known = [r for r in self.ranks if r.seconds is not None]
        return max(known, key=lambda r: r.seconds) if len(known) == len(self.ranks) else None

    @property
    def fps(self) -> float | None:
        """Pictures per second of one session alone: one block per slowest stage."""
        return self.geometry.frames_per_block / self.slowest.seconds if self.slowest else None

    @property
    def first_frame_seconds(self) -> float | None:
        """From the first block's audio to its pictures: one pass through the pipe."""
        return sum(r.seconds for r in self.ranks if r.shard == 0) if self.slowest else None

    @property
    def problems(self) -> list[str]:
        """Why it does not fit, with numbers; empty when it does."""
        found = []
        for r in self.ranks:
            if r.device.kind == "cuda" and r.bytes(self.sessions) > r.device.memory:
                found.append(f"rank {r.rank} ({'+'.join(r.roles)}) needs {gigabytes(r.bytes(self.sessions))} for {self.sessions} "
                             f"session(s) on {r.device.name}, which has {gigabytes(r.device.memory)} free; "
                             f"{r.sessions_that_fit} session(s) would fit")
        if self.host_bytes > self.host_memory:
            found.append(f"the host needs {gigabytes(self.host_bytes)} of RAM for {self.sessions} session(s), "
                         f"{gigabytes(self.host_memory)} are free")
        return found

    def refuse(self) -> None:
        """Raise PlacementError with every number that does not fit and the ways out."""
        if self.problems:
            raise PlacementError("; ".join(self.problems) + ". Lower runtime.sessions or the picture size, "
                                 "or cut the chain into more stages")

    def table(self) -> Table:
        """For people: one row a rank."""
        g = self.geometry
        small = [what for what, on in (("linears", self.fast.fp8), ("cache", self.fast.fp8_cache)) if on]
        numbers = str(self.dtype).removeprefix("torch.") + (f" with FP8 {' and '.join(small)}" if small else "")
        table = Table(title=f"{g.width}x{g.height}, {numbers}, {self.sessions} session(s)")
        for column in ("rank", "roles", "loads", "each session", "total of free", "ms/block"):
            table.add_column(column)
        for r in self.ranks:
            used = f"{gigabytes(r.bytes(self.sessions))}\nof {gigabytes(r.device.memory)}\n{r.device.name}"
            table.add_row(str(r.rank), "\n".join(r.roles), parts(r.fixed), parts(r.per_session), used,
                          "?" if r.seconds is None else f"{r.seconds * 1000:.0f}")
        table.caption = self.summary()
        return table

    def summary(self) -> str:
        """Host memory and, when stage times are known, speed; one line."""
        text = f"host {gigabytes(self.host_bytes)} of {gigabytes(self.host_memory)}"
        if self.slowest:
            wait = float(self.geometry.block_seconds)
            text += (f"; {self.fps:.1f} FPS ({self.fps / FPS:.2f}x real time), first frame {self.first_frame_seconds:.2f} s, "
                     f"turn {wait + self.first_frame_seconds:.2f} s, bottleneck rank {self.slowest.rank}")
        return text


def plan(config: Config, model_config: S2VConfig, geometry: Geometry, devices: Sequence[Device], *,
         stages: Sequence[Sequence[str]] | None = None, dtype: torch.dtype = torch.bfloat16, vae: Mapping | None = WAN_VAE,
         text_encoder_bytes: int = 0, times: Mapping[str, float] | None = None, host: int | None = None) -> Plan:
    """What every rank would load; raises PlacementError only for a cut that makes no sense (see Plan.refuse).

    stages: the cut (None: config.stages, or one stage per device). vae: its config, None: a chain without
    one. text_encoder_bytes: what the prompt encoder keeps. times: measured seconds per role; otherwise
    predicted from FLOPs where a device has a rate. host: bytes of free host RAM.
    """
    chain = config.chain if vae is not None else config.chain[:-1]
    stages = tuple(tuple(s) for s in (stages or config.stages or cut(chain, min(len(devices), len(chain)), times)))
    check_cut(stages, chain)
    seats = seats_of(config, stages)
    if len(devices) < len(seats):
        shared = "" if len(seats) == len(stages) else f" (runtime.shards: {len(seats)} ranks)"
        raise PlacementError(f"{len(stages)} stages{shared} need {len(seats)} devices, there are {len(devices)}")
    sizer = Sizer(config, model_config, geometry, dtype, vae, text_encoder_bytes)
    ranks = tuple(sizer.rank(seat, device, times) for seat, device in zip(seats, devices))
    sessions, on_host = config.runtime.sessions, [r for r in ranks if r.device.kind == "cpu"]
    processes = 1 if config.runtime.launcher == "inproc" else 1 + len(ranks)
    return Plan(ranks=ranks, sessions=sessions, geometry=geometry, dtype=dtype, fast=config.model.fast,
                host_bytes=processes * PROCESS_BYTES + sum(r.bytes(sessions) for r in on_host),
                host_memory=host_memory() if host is None else host)


class Sizer:
    """Bytes and seconds of roles for one config, model, size and dtype."""

    def __init__(self, config: Config, model: S2VConfig, geometry: Geometry, dtype: torch.dtype, vae: Mapping | None, text_encoder_bytes: int):
        self.runtime, self.fast, self.model, self.geometry, self.dtype = config.runtime, config.model.fast, model, geometry, dtype
        self.sliced = config.sampler.refresh_slices > 1
        self.vae, self.text_encoder_bytes = vae, text_encoder_bytes
        self.vae_weights, self.vae_state = vae_bytes(vae, geometry, dtype) if vae is not None else (0, 0)

    def rank(self, seat: Seat, device: Device, times: Mapping[str, float] | None) -> RankPlan:
        """The plan of the rank at `seat`."""
        roles, fixed, per_session = seat.roles, {}, {}
        steps = steps_of(roles)
        if {"condition", "decode"} & set(roles) and self.vae is not None:
            fixed["vae"] = self.vae_weights
        if "condition" in roles and self.text_encoder_bytes:
            fixed["text encoder"] = self.text_encoder_bytes
        if steps:
            fixed["transformer"] = transformer_bytes(self.model, self.dtype, self.fast.fp8)
            per_session |= self.step_caches(steps, seat.shards)
        if "decode" in roles:
            per_session["vae state"] = self.vae_state
        fixed["working"] = self.working(roles, seat.shards) + (CUDA_CONTEXT_BYTES if device.kind == "cuda" else 0)
        seconds = [self.seconds(r, device, times) for r in roles]
        return RankPlan(rank=seat.rank, shard=seat.shard, roles=roles, device=device, fixed=fixed, per_session=per_session,
                        seconds=None if None in seconds else sum(seconds) / seat.shards)

    def step_caches(self, steps: int, shards: int = 1) -> dict[str, int]:
        """Per session: [sink | ring] of each step and the stage's one un-rotated sink, a rank's share of the heads, and another while it is
        prefilled in slices; the prompt's K and V."""
        m, g, size = self.model, self.geometry, self.dtype.itemsize
        kept = E4M3 if self.fast.fp8_cache else self.dtype
        one = cache_bytes(m.num_layers, m.num_heads, m.head_dim, g.sink_tokens, g.ring_tokens, g.anchor_tokens, kept)
        sink = 2 * m.num_layers * m.dim * g.sink_tokens * size // shards
        return {f"{steps} x step cache": steps * one // shards, "sink": sink, **({"coming sink": sink} if self.sliced else {}),
                "text": 2 * m.num_layers * m.dim * m.text_len * size}

    def working(self, roles: tuple[str, ...], shards: int = 1) -> int:
        """Peak of activations, estimated: about 16 vectors of D and one of F a token; K and V of one layer where an FP8
        cache is restored for attention; 6 widest maps of the VAE."""
        m, g, size, need = self.model, self.geometry, self.dtype.itemsize, [0]
        if steps_of(roles):
            together = self.runtime.batch * (steps_of(roles) if self.runtime.shift_register else 1)  # blocks in one forward
            need.append(max(together * g.block_tokens // shards, g.sink_tokens) * (m.ffn_dim + 16 * m.dim) * size)
            if self.fast.fp8_cache and self.fast.attention != "fp8":
                need[-1] += 2 * (g.sink_tokens + g.ring_tokens) * m.dim * size // shards
        if self.vae is not None and {"condition", "decode"} & set(roles):
            pictures = g.frames_per_block if "decode" in roles else 4
            patch = self.vae.get("patch_size") or 1
            need.append(6 * pictures * g.height * g.width * self.vae.get("base_dim", 96) * size // patch**2)
        return max(need)

    def seconds(self, role: str, device: Device, times: Mapping[str, float] | None) -> float | None:
        """Seconds one block spends in `role`: measured, else by FLOPs and the device's rate, else None."""
        if times is not None:
            return _cost(role, times)
        if device.rate is None:
            return None
        flops = {"condition": 0.0, "decode": decode_flops(self.vae or WAN_VAE, self.geometry)}
        return flops.get(role, forward_flops(self.model, self.geometry)) / device.rate


def gigabytes(size: int) -> str:
    """Bytes for people; decimal units, as memory is sold and as model.md counts."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def parts(sizes: Mapping[str, int]) -> str:
    """Named sizes on one line each."""
    return "\n".join(f"{name} {gigabytes(size)}" for name, size in sizes.items()) or "-"
