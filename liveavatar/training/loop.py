"""One plain training loop for every stage and scale: AdamW, warm-up, flat, cool-down, EMA, JSONL, exact resume.

Every draw of iteration i comes from generators seeded with (seed, stage, i), so nothing but weights,
optimiser, EMA and the iteration number has to be stored, and a killed run that resumes gives the same
losses. Batches are functions of the iteration too; they change only when the corpus does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from liveavatar.config import one_of
from liveavatar.core import ConfigError
from liveavatar.diffusion.denoise import draw_seed
from liveavatar.training import strategy
from liveavatar.training.adapters import Role
from liveavatar.training.checkpoints import State, Stored, checkpoint_path, load_average, load_checkpoint, save_checkpoint
from liveavatar.training.groups import agreed, decided, meet, rank_and_world
from liveavatar.training.optimiser import local
from liveavatar.training.progress import row_told

__all__ = [
    "Draws", "Ema", "Learner", "LoopConfig", "Trainer", "agreed", "checkpoint_path", "draws_of", "learning_rate",
    "load_average", "load_checkpoint", "meet", "rank_and_world", "shared_draws",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how fast. cooldown: share of the iterations in which lr falls linearly to lr * floor."""

    iterations: int
    batch: int = 8
    lr: float = 1e-3
    warmup: int = 50
    cooldown: float = 0.5
    floor: float = 0.03
    audio_factor: float = 1.0  # the audio injectors, or what a speech encoder begins as, learn at so much of lr
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    muon: bool = False  # matrices by Muon instead of AdamW: far fewer iterations for small networks
    clip: float = 1.0
    ema: float = 0.998
    checkpoint_seconds: float = 180.0
    log_every: int = 10
    threads: int = 2
    bf16: bool = True
    device: str = "auto"  # auto | cpu | cuda; auto: the GPU of this process where there is one
    strategy: str = "single"  # single | fsdp2 | deepspeed, see strategy.py
    checkpointing: bool = False  # blocks of the transformer are computed again in the backward pass: a third more time, little memory

    def __post_init__(self):
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        one_of("strategy", self.strategy, strategy.NAMES)
        if self.muon and self.strategy != "single":
            raise ConfigError(f"muon with strategy={self.strategy!r}: it needs whole matrices where they are sharded; say muon: false")
        for name in ("iterations", "batch", "lr", "clip", "log_every", "threads"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be positive")
        for name in ("cooldown", "floor", "ema", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be in 0..1")


@dataclass(frozen=True)
class Draws:
    """The generators of one iteration."""

    iteration: int
    numpy: np.random.Generator
    torch: torch.Generator


def draws_of(seed: int, stage: str, iteration: int, rank: int = 0) -> Draws:
    """Generators that are a pure function of their arguments; every rank draws its own batch."""
    key = draw_seed("train", seed, stage, iteration, rank)
    return Draws(iteration, np.random.default_rng(key), torch.Generator().manual_seed(key))


def shared_draws(seed: int, stage: str, iteration: int) -> Draws:
    """Generators for what all ranks must draw alike: exit level, sink distance, coins. Ranks that run different
    graphs wait for each other for ever; see `agreed`."""
    key = draw_seed("train", seed, stage, iteration, "all ranks")
    return Draws(iteration, np.random.default_rng(key), torch.Generator().manual_seed(key))


LossOf = Callable[[Draws], tuple[torch.Tensor, dict[str, float]]]


def learning_rate(config: LoopConfig, iteration: int) -> float:
    """Warm-up, flat, then linear to lr * floor at the last iteration."""
    rise = min(1.0, (iteration + 1) / max(1, config.warmup))
    length = max(1.0, config.cooldown * config.iterations)
    left = min(1.0, max(0.0, (config.iterations - iteration) / length))
    return config.lr * rise * (config.floor + (1 - config.floor) * left)


class Ema:
    """Exponential moving average of a module's trained parameters, fp32, sharded as they are."""

    def __init__(self, module: nn.Module | Role, decay: float):
        self.decay = decay
        self.values = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module | Role, iteration: int) -> None:
        """Move towards the module; young averages forget faster so that the start does not linger."""
        keep = min(self.decay, (1 + iteration) / (10 + iteration))
        for name, p in module.named_parameters():
            local(self.values[name]).lerp_(local(p.detach()).float(), 1 - keep)


class Learner:
    """A module (or an adapter on one) with its optimiser and, where one is wanted, its average."""

    def __init__(self, module: nn.Module | Role, config: LoopConfig, average: bool = True):
        self.module, self.config = module, config
        self.strategy = strategy.strategy_of(config)
        self.strategy.wrap(module)
        self.strategy.start(module)
        self.ema = Ema(module, config.ema) if average else None

    def update(self, rate: float, count: int) -> float:
        """Step number `count` (from 1) by the gradients at hand, averaged over ranks; forgets them. Returns their norm."""
        norm = self.strategy.update(rate)
        if self.ema:
            self.ema.update(self.module, count)
        return norm

    def _tensors(self, prefix: str) -> State:
        state = {f"{prefix}model/{name}": p.detach() for name, p in self.module.named_parameters()}
        return state | {f"{prefix}ema/{name}": value for name, value in (self.ema.values if self.ema else {}).items()}

    def state(self, prefix: str = "") -> State:
        """What a checkpoint keeps, each rank its part."""
        slots = self.strategy.optimiser_state()
        return self._tensors(prefix) | {f"{prefix}optimiser/{name}/{key}": t for name, of in slots.items() for key, t in of.items()}

    def load(self, stored: Stored, prefix: str = "") -> None:
        """Go on from a checkpoint, whatever number of ranks wrote it. Raises WeightsError."""
        into, slots = self._tensors(prefix), {}
        for name, _ in self.module.named_parameters():
            keys = stored.below(f"{prefix}optimiser/{name}/")
            like = {key: f"{prefix}optimiser/{name}/{key}" for key in keys}
            slots |= {name: {key: self.strategy.slot_like(name, stored.shapes[at], stored.dtypes[at]) for key, at in like.items()}} if keys else {}
        stored.read(into | {f"{prefix}optimiser/{name}/{key}": t for name, of in slots.items() for key, t in of.items()})
        self.strategy.load_optimiser_state(slots)


class Trainer:
    """One stage's module with optimiser and EMA, resumable. In a process group every rank has its own batch.
    others: further learners of the stage, kept in the same checkpoint, so that they cannot part. stopped: a step may set it to
    end the stage early; on all ranks."""

    def __init__(self, stage: str, module: nn.Module | Role, config: LoopConfig, folder: str | Path, seed: int,
                 others: dict[str, Learner] | None = None):
        self.stage, self.config, self.seed = stage, config, seed
        self.learner, self.others = Learner(module, config), others or {}
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.iteration, self.stopped = 0, False
        self.rank, self.world = rank_and_world()
        if self.path.exists():
            self._resume()

    @property
    def path(self) -> Path:
        return checkpoint_path(self.folder, self.stage)

    @property
    def device(self) -> torch.device:
        """Where batches belong."""
        return self.learner.strategy.device

    def _resume(self) -> None:
        stored = Stored(self.path)
        self.learner.load(stored)
        for name, other in self.others.items():
            other.load(stored, f"{name}/")
        self.iteration = stored.iteration

    def save(self) -> None:
        """Checkpoint: weights, EMA, optimiser, iteration; of every learner. All ranks call it."""
        state = self.learner.state()
        for name, other in self.others.items():
            state |= other.state(f"{name}/")
        save_checkpoint(self.path, state | {"iteration": torch.tensor(self.iteration), "seed": torch.tensor(self.seed)})

    def autocast(self, **how) -> torch.autocast:
        """The precision of forwards."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16, **how)

    def step(self, loss_of: LossOf, keep_casts: bool = True) -> dict[str, float]:
        """One iteration; returns its metrics."""
        rate = learning_rate(self.config, self.iteration)
        with self.autocast(cache_enabled=keep_casts):
            loss, metrics = loss_of(draws_of(self.seed, self.stage, self.iteration, self.rank))
        loss.backward()
        norm = self.learner.update(rate, self.iteration + 1)
        return {"loss": float(loss.detach()), "norm": norm, "lr": rate, **metrics}

    def run(self, loss_of: LossOf, stop_after: int | None = None, keep_casts: bool = True) -> list[float]:
        """Iterate one loss to the end (or `stop_after` iterations more); returns the losses of this call. keep_casts: False where the
        trained module is run without gradients first: casts made there would cut the graph of the forward that learns."""
        return self.run_steps(lambda: self.step(loss_of, keep_casts), stop_after)

    def run_steps(self, step: Callable[[], dict[str, float]], stop_after: int | None = None) -> list[float]:
        """As run, where an iteration is more than one loss. step: does iteration `self.iteration`, returns metrics with "loss"."""
        torch.set_num_threads(self.config.threads)
        losses, end = [], self.config.iterations
        if stop_after is not None:
            end = min(end, self.iteration + stop_after)
        saved = started = time.monotonic()
        with open(self.folder / f"{self.stage}.jsonl", "a", encoding="utf-8") as log:
            while self.iteration < end and not self.stopped:
                metrics = step()
                self.iteration += 1
                losses.append(metrics["loss"])
                now = time.monotonic()
                if not self.rank and (self.iteration % self.config.log_every == 0 or self.iteration == end):
                    row = {"iteration": self.iteration, "seconds": round(now - started, 1), **metrics}
                    log.write(json.dumps({k: float(f"{v:.5g}") for k, v in row.items()}) + "\n")
                    log.flush()
                    row_told(self.stage, self.config.iterations, row)
                if decided(now - saved > self.config.checkpoint_seconds):
                    self.save()
                    saved = now
        self.save()
        return losses
