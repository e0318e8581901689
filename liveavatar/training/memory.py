"""What training takes: bytes on each GPU, FLOP per step, a refusal with the numbers; and the option that needs less.

Bytes of weights, optimiser and averages are counted, from the names and shapes of the very modules. Activations are
estimated: what autograd keeps per token and channel was counted on these layers (saved_tensors_hooks, two sizes of
everything; tests/test_memory.py counts again) and holds within ACTIVATION_FACTOR on a CPU; a GPU's allocator adds
FRAGMENTATION. What the CUDA libraries take is CONTEXT.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from rich.table import Table
from torch.utils.checkpoint import checkpoint

from liveavatar.core import ConfigError
from liveavatar.models.lora import lora_targets
from liveavatar.models.s2v import CausalS2V, S2VConfig, stored_dtype
from liveavatar.training.optimiser import is_matrix

ACTIVATION_FACTOR = 1.15
FRAGMENTATION = 0.05
CONTEXT = 1_500_000_000  # CUDA context, cuBLAS workspaces, NCCL buffers
# Bytes that autograd keeps of a block: per token (noisy and sink) and channel, per token and channel of its ffn, per key
# and channel of the windows that blocks of a clip attend to, per text row and channel. Of an injector: per noisy token and
# channel, per audio token and channel. By bytes of the compute dtype and whether the weights are trained or only adapters.
KEPT = {(4, True): (89.0, 8.1, 8.0, 18.7, 28.0, 27.0), (4, False): (64.0, 8.0, 8.0, 16.0, 20.3, 27.0),
        (2, True): (79.0, 5.0, 4.0, 16.0, 22.7, 36.0), (2, False): (58.0, 5.0, 4.0, 16.5, 16.5, 27.0)}  # fmt: skip
# The same outside of blocks (embeddings, audio encoder, head): per noisy token and channel, per latent and channel.
OUTSIDE = {True: (10.0, 650.0), False: (4.6, 100.0)}


# ---------------------------------------------------------------- blocks computed again


def compute_blocks_again(model: CausalS2V) -> None:
    """Keep only what enters each block and each injector; their inside is computed again when gradients need it, under the
    same adapter."""
    for part in (*model.blocks, model.audio_injector):
        if "forward" not in vars(part):
            part.forward = functools.partial(_again, part.forward)


def _again(forward, *args):
    # The backward pass may run elsewhere, in another thread or after other roles' forwards: take the context along.
    context = contextvars.copy_context()
    return checkpoint(lambda *a: context.copy().run(forward, *a), *args, use_reentrant=False, preserve_rng_state=False)


# ---------------------------------------------------------------- what is trained on


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Size of a training clip. height, width: pixels; latents: trained ones, a multiple of a block's; stride: pixels per cell."""

    height: int = 384
    width: int = 704
    latents: int = 21
    stride: int = 8

    def __post_init__(self):
        for name in ("height", "width"):
            if getattr(self, name) <= 0 or getattr(self, name) % (2 * self.stride):
                raise ConfigError(f"clip.{name}={getattr(self, name)}: must be a positive multiple of {2 * self.stride} pixels")
        if self.latents < 1:
            raise ConfigError(f"clip.latents={self.latents}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Load:
    """One batch on one GPU. tokens: noisy; sink: of all clips; keys: attended by all blocks of all clips; rows: of text."""

    model: S2VConfig
    clip: ClipConfig
    block_latents: int
    window_blocks: int
    batch: int

    @property
    def blocks(self) -> int:
        return self.clip.latents // self.block_latents

    @property
    def tokens_per_latent(self) -> int:
        return (self.clip.height // self.clip.stride // 2) * (self.clip.width // self.clip.stride // 2)

    @property
    def tokens(self) -> int:
        return self.batch * self.clip.latents * self.tokens_per_latent

    @property
    def sink_each(self) -> int:
        h, w = self.clip.height // self.clip.stride, self.clip.width // self.clip.stride
        return 2 * self.tokens_per_latent + (h // 4) * (w // 4) + 4 * (h // 8) * (w // 8)

    @property
    def sink(self) -> int:
        return self.batch * self.sink_each

    @property
    def rows(self) -> int:
        return self.batch * self.model.text_len

    def keys_each(self, causal: bool = True) -> int:
        """Keys that one block attends to, those before the start of a clip, which are masked, included."""
        own = self.block_latents * self.tokens_per_latent
        return self.sink_each + (self.window_blocks if causal else self.blocks) * own

    def block_bytes(self, compute: int, trained: bool) -> float:
        """Kept of one block's forward, sink included."""
        token, ffn, key, text, *_ = KEPT[compute, trained]
        keys = self.batch * self.blocks * self.keys_each()
        both = self.tokens + self.sink
        return self.model.dim * (token * both + key * keys + text * self.rows) + self.model.ffn_dim * ffn * both

    def injector_bytes(self, compute: int, trained: bool) -> float:
        """Kept of one audio injector's forward."""
        *_, token, audio = KEPT[compute, trained]
        return self.model.dim * (token * self.tokens + audio * self.batch * self.clip.latents * (self.model.num_audio_token + 1))

    def graph_bytes(self, compute: int, stored: int, trained: bool, again: bool) -> tuple[float, float]:
        """(bytes a forward leaves for its backward, bytes the backward adds at its worst). stored: of the dtype between blocks.
        again: blocks are computed again."""
        m = self.model
        token, latent = OUTSIDE[trained]
        outside = m.dim * (token * self.tokens + latent * self.batch * self.clip.latents)
        if not again:
            inside = m.num_layers * self.block_bytes(compute, trained) + len(m.audio_inject_layers) * self.injector_bytes(compute, trained)
            return inside + outside, 0.0
        # What enters, keys and values of sink and text, modulation (fp32, of every block of the clip).
        entered = m.dim * (stored * (self.tokens + self.sink) + compute * 2 * self.sink + KEPT[compute, trained][3] * self.rows
                           + 4 * 6 * 2 * self.batch * self.blocks)
        between = m.dim * stored * self.tokens * len(m.audio_inject_layers)
        return m.num_layers * entered + between + outside, max(self.block_bytes(compute, trained), self.injector_bytes(compute, trained))

    def forward_flops(self, causal: bool = True) -> float:
        """One forward of all blocks of the batch, its sink's prefill and its text included (model.md section 18)."""
        m, n, s, d = self.model, self.tokens, self.sink, self.model.dim
        attended = self.batch * self.blocks * self.keys_each(causal) * self.block_latents * self.tokens_per_latent
        both = n + s
        layer = (12 * both * d * d + 4 * both * m.text_len * d + 4 * both * d * m.ffn_dim + 4 * self.rows * d * d
                 + 4 * d * (attended + self.batch * self.sink_each**2))
        audio = self.batch * self.clip.latents * (m.num_audio_token + 1)
        injector = 4 * n * d * d + 4 * audio * d * d + 4 * n * (m.num_audio_token + 1) * d + 4 * self.batch * self.clip.latents * d * d
        return m.num_layers * layer + len(m.audio_inject_layers) * injector


# ---------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Sizes:
    """Of one transformer: bytes as stored, parameters that a role trains, those of them that Muon takes. largest: the
    parameters of the unit that shards gather whole."""

    frozen: int
    trained: int
    matrices: int
    largest: int
    stored: int


@functools.lru_cache(maxsize=8)
def sizes_of(model: S2VConfig, rank: int, dtype: torch.dtype) -> Sizes:
    """rank: of adapters over a frozen base in `dtype`; 0: everything is trained, in fp32."""
    with torch.device("meta"):
        module = CausalS2V(model)
    shapes = dict(module.named_parameters())
    largest = max(sum(p.numel() for p in block.parameters()) for block in module.blocks)
    if not rank:
        count = sum(p.numel() for p in shapes.values())
        return Sizes(0, count, sum(p.numel() for p in shapes.values() if is_matrix(p)), largest, 4)
    adapter = sum(rank * (rows + columns) for rows, columns in lora_targets(module).values())
    frozen = sum(p.numel() * stored_dtype(name, dtype).itemsize for name, p in shapes.items())
    return Sizes(frozen, adapter, adapter, largest, dtype.itemsize)


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage on one GPU. parts: bytes by name, whatever is alive together at the worst moment; flops: per step, all GPUs."""

    stage: str
    strategy: str
    gpus: int
    batch: int
    parts: dict[str, int] = field(default_factory=dict)
    flops: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def problem(self, memory: int) -> str | None:
        """Why it does not fit into GPUs of so many bytes, with numbers and ways out; None when it does."""
        if self.total <= memory:
            return None
        name, size = max(self.parts.items(), key=lambda part: part[1])
        ways = ["a smaller clip", "more or larger GPUs" if self.gpus > 1 or self.strategy != "single" else "more GPUs with strategy fsdp2"]
        ways = (["a smaller batch"] if self.batch > 1 else []) + ways + ([] if "activations, blocks again" in self.parts else ["checkpointing: true"])
        return (f"stage {self.stage} needs {gigabytes(self.total)} on each of {self.gpus} GPU(s) of {gigabytes(memory)} "
                f"({name}: {gigabytes(size)}): try {', '.join(ways)}")


def stage_plan(stage: str, loop, load: Load, sizes: Sizes, gpus: int, *, roles: int = 1, graphs: int = 1, frozen_copies: int = 0,
               flops: float = 0.0) -> StagePlan:
    """Bytes of a stage that trains `roles` roles, the first with an average, and keeps `graphs` forwards for their backward
    passes at once. frozen_copies: further whole models that are not trained (none over a base)."""
    compute, adapters = 2 if loop.bf16 else 4, sizes.frozen > 0
    sharded, sliced = (gpus if loop.strategy == "fsdp2" else 1), (1 if loop.strategy == "single" else gpus)
    count = sizes.trained
    slots = 4 * sizes.matrices + 8 * (count - sizes.matrices) if loop.muon else 8 * count
    parts = {"base" if adapters else "frozen copies": (sizes.frozen + frozen_copies * 4 * count) // sharded,
             "adapters" if adapters else "weights": roles * 4 * count // sharded, "gradients": 4 * count // sharded,
             "optimiser": roles * slots // sliced, "average": 4 * count // sharded}
    if loop.strategy == "fsdp2":
        parts["gathered blocks"] = 2 * compute * (sizes.largest + (roles * count // load.model.num_layers if adapters else 0))
    if loop.strategy == "single" and gpus > 1:
        parts["gradients, in one message"] = 8 * count
    if loop.strategy == "deepspeed":
        parts["slices of the engine"] = roles * 4 * count // gpus + 4 * count + 4 * count // gpus  # masters; gradients again, whole and reduced
    left, added = load.graph_bytes(compute, sizes.stored, not adapters, loop.checkpointing)
    name = "activations, blocks again" if loop.checkpointing else "activations"
    parts[name] = round(ACTIVATION_FACTOR * (graphs * left + added))
    parts = {key: size for key, size in parts.items() if size}
    parts["allocator, libraries"] = round(FRAGMENTATION * sum(parts.values())) + CONTEXT
    return StagePlan(stage=stage, strategy=loop.strategy, gpus=gpus, batch=loop.batch, parts=parts, flops=flops * gpus)


def learning_flops(forward: float, adapters: bool, again: bool) -> float:
    """A forward and its backward: gradients of activations, those of weights unless only adapters learn, blocks once more."""
    return forward * (2 + (not adapters) + again)


def table(plans: Sequence[StagePlan], memory: int | None) -> Table:
    """For people: one row a stage."""
    made = Table(title="training, bytes on each GPU" + (f" of {gigabytes(memory)}" if memory else ""))
    for column in ("stage", "bytes", "together", "FLOP per step"):
        made.add_column(column, no_wrap=True)
    for p in plans:
        listing = "\n".join(f"{name} {gigabytes(size)}" for name, size in p.parts.items())
        where = f"{p.stage}\n{p.strategy}\n{p.gpus} GPU(s)\nbatch {p.batch} each"
        made.add_row(where, listing, gigabytes(p.total), f"{p.flops:.3g}")
    return made


def gigabytes(size: int) -> str:
    """Bytes for people; decimal units, as memory is sold."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
