"""One plain training loop for every stage: AdamW, warm-up, flat, cool-down, EMA, JSONL, exact resume.

Every draw of iteration i comes from generators seeded with (seed, stage, i), so nothing but weights,
optimiser, EMA and the iteration number has to be stored, and a killed run that resumes gives the same
losses. Batches are functions of the iteration too; they change only when the corpus does.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from liveavatar.core import ConfigError, WeightsError
from liveavatar.diffusion.denoise import draw_seed
from liveavatar.training.optimiser import Optimiser, groups_of


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how fast. cooldown: share of the iterations in which lr falls linearly to lr * floor."""

    iterations: int
    batch: int = 8
    lr: float = 1e-3
    warmup: int = 50
    cooldown: float = 0.5
    floor: float = 0.03
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

    def __post_init__(self):
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


def agreed(**drawn: int) -> None:
    """Compare what every rank drew. Raises ConfigError, on all ranks, where they differ (another seed or iteration)."""
    if not dist.is_initialized():
        return
    own = torch.tensor(list(drawn.values()))
    all_ranks = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, own)
    different = [name for i, name in enumerate(drawn) if len({int(r[i]) for r in all_ranks}) > 1]
    if different:
        raise ConfigError(f"ranks drew different {', '.join(different)}: {[r.tolist() for r in all_ranks]}; same seed and checkpoint everywhere?")


LossOf = Callable[[Draws], tuple[torch.Tensor, dict[str, float]]]


def learning_rate(config: LoopConfig, iteration: int) -> float:
    """Warm-up, flat, then linear to lr * floor at the last iteration."""
    rise = min(1.0, (iteration + 1) / max(1, config.warmup))
    length = max(1.0, config.cooldown * config.iterations)
    left = min(1.0, max(0.0, (config.iterations - iteration) / length))
    return config.lr * rise * (config.floor + (1 - config.floor) * left)


class Ema:
    """Exponential moving average of a module's parameters, fp32."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.values = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, iteration: int) -> None:
        """Move towards the module; young averages forget faster so that the start does not linger."""
        keep = min(self.decay, (1 + iteration) / (10 + iteration))
        for name, p in module.named_parameters():
            self.values[name].lerp_(p.detach().float(), 1 - keep)


def checkpoint_path(folder: str | Path, stage: str) -> Path:
    """Where a stage keeps its last checkpoint."""
    return Path(folder) / f"{stage}.pt"


def save_checkpoint(path: Path, **state) -> None:
    """Written whole or not at all."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def load_checkpoint(path: str | Path) -> dict:
    """State of save_checkpoint. Raises WeightsError when there is none."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise WeightsError(f"{path}: cannot read checkpoint: {error}") from None


def load_average(module: nn.Module, path: str | Path) -> int:
    """Put the EMA weights of a checkpoint into `module`; returns its iteration."""
    state = load_checkpoint(path)
    own = dict(module.named_parameters())
    if set(own) != set(state["ema"]):
        raise WeightsError(f"{path}: tensors differ from the recipe's model")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(state["ema"][name])
    return int(state["iteration"])


def rank_and_world() -> tuple[int, int]:
    """This process' place in the group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def meet() -> None:
    """Wait for the other ranks of the group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def average_gradients(module: nn.Module, world: int) -> None:
    """Mean of the gradients over all ranks, as one message. On a few CPU cores two processes of one
    thread each train faster than one of two: they meet once an iteration, not once an operator."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
    flat = torch.cat([g.float().flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    for p, part in zip(module.parameters(), flat.split([g.numel() for g in gradients])):
        p.grad = part.view(p.shape).to(p.dtype)


class Learner:
    """A module with its optimiser and, where one is wanted, its average."""

    def __init__(self, module: nn.Module, config: LoopConfig, average: bool = True):
        self.module, self.config = module, config
        groups = groups_of(module, config.weight_decay, config.muon)
        self.optimiser = Optimiser(groups, lr=config.lr, betas=(config.beta1, config.beta2))
        self.ema = Ema(module, config.ema) if average else None
        self.world = rank_and_world()[1]

    def update(self, rate: float, count: int) -> float:
        """Step number `count` (from 1) by the gradients at hand, averaged over ranks; forgets them. Returns their norm."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        if self.world > 1:
            average_gradients(self.module, self.world)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.module, count)
        return float(norm)

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"model": self.module.state_dict(), "optimiser": self.optimiser.state_dict(), "ema": self.ema.values if self.ema else {}}

    def load(self, state: dict) -> None:
        """Go on from `state`."""
        self.module.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.ema:
            self.ema.values = {name: value.clone() for name, value in state["ema"].items()}


class Trainer:
    """One stage's module with optimiser and EMA, resumable. In a process group every rank holds a
    whole copy and its own batch; rank 0 writes. others: further learners of the stage, kept in the
    same checkpoint, so that they cannot part."""

    def __init__(self, stage: str, module: nn.Module, config: LoopConfig, folder: str | Path, seed: int,
                 others: dict[str, Learner] | None = None):
        self.stage, self.config, self.seed = stage, config, seed
        self.learner, self.others = Learner(module, config), others or {}
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.iteration = 0
        self.rank, self.world = rank_and_world()
        if self.path.exists():
            self._resume()

    @property
    def path(self) -> Path:
        return checkpoint_path(self.folder, self.stage)

    def _resume(self) -> None:
        state = load_checkpoint(self.path)
        self.learner.load(state)
        for name, other in self.others.items():
            other.load(state[name])
        self.iteration = int(state["iteration"])

    def save(self) -> None:
        """Checkpoint: weights, EMA, optimiser, iteration; of every learner."""
        if self.rank:
            return
        others = {name: other.state() for name, other in self.others.items()}
        save_checkpoint(self.path, **self.learner.state(), **others, iteration=self.iteration, seed=self.seed)

    def step(self, loss_of: LossOf) -> dict[str, float]:
        """One iteration; returns its metrics."""
        rate = learning_rate(self.config, self.iteration)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
            loss, metrics = loss_of(draws_of(self.seed, self.stage, self.iteration, self.rank))
        loss.backward()
        norm = self.learner.update(rate, self.iteration + 1)
        return {"loss": float(loss.detach()), "norm": norm, "lr": rate, **metrics}

    def run(self, loss_of: LossOf, stop_after: int | None = None) -> list[float]:
        """Iterate one loss to the end (or `stop_after` iterations more); returns the losses of this call."""
        return self.run_steps(lambda: self.step(loss_of), stop_after)

    def run_steps(self, step: Callable[[], dict[str, float]], stop_after: int | None = None) -> list[float]:
        """As run, where an iteration is more than one loss. step: does iteration `self.iteration`, returns metrics with "loss"."""
        torch.set_num_threads(self.config.threads)
        losses, end = [], self.config.iterations
        if stop_after is not None:
            end = min(end, self.iteration + stop_after)
        saved = started = time.monotonic()
        with open(self.folder / f"{self.stage}.jsonl", "a", encoding="utf-8") as log:
            while self.iteration < end:
                metrics = step()
                self.iteration += 1
                losses.append(metrics["loss"])
                now = time.monotonic()
                if not self.rank and (self.iteration % self.config.log_every == 0 or self.iteration == end):
                    row = {"iteration": self.iteration, "seconds": round(now - started, 1), **metrics}
                    log.write(json.dumps({k: float(f"{v:.5g}") for k, v in row.items()}) + "\n")
                    log.flush()
                if now - saved > self.config.checkpoint_seconds:
                    self.save()
                    saved = now
        self.save()
        return losses
