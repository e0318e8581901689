"""Optional stage `ode`: a few-step student from trajectories of the guided Stage 1 model (training.md 2.2).

The trajectories come from the causal model itself, not from a bidirectional one: there a block's target
depends on future noise that the student cannot see, and it would learn a blurred mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from liveavatar.core import ConfigError
from liveavatar.diffusion.rollout import ClipCondition, Velocity, level_parallel
from liveavatar.models.encoders import TextEncoder
from liveavatar.training import shards
from liveavatar.training.casting import Transformer, cast_of
from liveavatar.training.forcing import EncodedReader, ForcingConfig, draw_position
from liveavatar.training.groups import meet, rank_and_world
from liveavatar.training.guidance import Guidance
from liveavatar.training.levels import per_latent, teacher_grid
from liveavatar.training.loop import Draws, LoopConfig, Trainer, draws_of
from liveavatar.training.progress import counted
from liveavatar.training.strategy import strategy_of


@dataclass(frozen=True, kw_only=True)
class OdeConfig:
    """Trajectory initialisation. batches: stored groups of loop.batch clips; pieces: teacher steps between two
    levels of the student, even before `shift`."""

    loop: LoopConfig
    batches: int = 16
    pieces: int = 6
    shift: float = 5.0
    guidance: Guidance = field(default_factory=Guidance)
    same_share: float = 0.5  # of the clips with one level in all blocks, as at inference
    clean_share: float = 0.1  # of the other clips' blocks are only context: clean, and not trained on

    def __post_init__(self):
        for name in ("batches", "pieces", "shift"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ode.{name}={getattr(self, name)}: must be at least 1")
        for name in ("same_share", "clean_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"ode.{name}={getattr(self, name)}: must be in 0..1")


@dataclass(frozen=True)
class Trajectories:
    """A stored batch. states: float32 [B,k+1,C,F,h,w], x at the student's k levels and the end."""

    states: torch.Tensor
    condition: ClipCondition

    def to(self, device: torch.device) -> Trajectories:
        """The same on another device."""
        return Trajectories(self.states.to(device), self.condition.to(device))


@torch.no_grad()
def integrate(velocity: Velocity, grid: Sequence[float], pieces: int, noise: torch.Tensor, blocks: int) -> torch.Tensor:
    """Euler over `grid` from noise [B,C,F,h,w]; the states at its start, after every `pieces` steps and at its end,
    [B,k+1,C,F,h,w]. grid: as levels.teacher_grid."""
    states = [noise]
    for first in range(0, len(grid) - 1, pieces):
        states.append(level_parallel(velocity, grid[first : first + pieces + 1], states[-1], blocks))
    return torch.stack(states, dim=1)


def draw_states(rng: np.random.Generator, batch: int, blocks: int, levels: int, same_share: float, clean_share: float) -> torch.Tensor:
    """int64 [B,N]: which state every block is shown; `levels` is the clean one."""
    drawn = rng.integers(levels, size=(batch, blocks))
    clean = rng.random((batch, blocks)) < clean_share
    same = rng.random((batch, 1)) < same_share
    return torch.from_numpy(np.where(same, drawn[:, :1], np.where(clean, levels, drawn)))


def ode_loss(velocity: Velocity, states: torch.Tensor, table: Sequence[float], shown: torch.Tensor) -> torch.Tensor:
    """Mean of |x - sigma v - x0|^2 over the blocks that are not clean. states: [B,k+1,C,F,h,w]; shown: [B,N]."""
    count, blocks = shown.shape
    pieces = states.unflatten(3, (blocks, -1)).movedim(3, 2)  # [B,k+1,N,C,F/N,h,w]
    x = pieces[torch.arange(count)[:, None], shown, torch.arange(blocks)[None]].movedim(1, 2).flatten(2, 3)
    sigma = torch.tensor(list(table), dtype=torch.float32)[shown].to(x.device)
    error = (x - per_latent(sigma, x) * velocity(x, sigma).float() - states[:, -1]).square()
    counted = per_latent((shown < len(table) - 1).float(), x).expand_as(error)
    return (error * counted).sum() / counted.sum().clamp_min(1)


# ---------------------------------------------------------------- files


def trajectory_path(run: str | Path, index: int) -> Path:
    """Where stored batch `index` lies."""
    return Path(run) / "trajectories" / f"batch_{index:05d}.npz"


def write_trajectories(path: Path, made: Trajectories, table: Sequence[float]) -> None:
    """States in fp16, conditions in fp32, positions and levels in the card."""
    c = made.condition
    card = {"levels": list(table), "window_blocks": c.window_blocks, "sink_distance": c.sink_distance, "first_block": c.first_block}
    text = {f"context{i}": rows.cpu().numpy() for i, rows in enumerate(c.context)}
    shards.write_arrays(path, card, states=made.states.half().cpu().numpy(), features=c.features.cpu().numpy(), reference=c.reference.cpu().numpy(),
                        motion=c.motion.cpu().numpy(), **text)


def read_trajectories(path: Path, table: Sequence[float]) -> Trajectories:
    """A stored batch. Raises InputError when it is none, ConfigError when it was made for other levels."""
    card, arrays = shards.read_arrays(path)
    if card["levels"] != list(table):
        raise ConfigError(f"{path}: made for levels {card['levels']}, the sampler has {list(table)}; delete {path.parent}")
    tensors = {name: torch.from_numpy(value).float() for name, value in arrays.items()}
    context = [tensors[f"context{i}"] for i in range(len(tensors["states"]))]
    condition = ClipCondition(tensors["features"], context, tensors["reference"], tensors["motion"], card["window_blocks"],
                              card["sink_distance"], card["first_block"])
    return Trajectories(tensors["states"], condition)


def store_trajectories(config: OdeConfig, forcing: ForcingConfig, sigmas: Sequence[float], run: str | Path, seed: int,
                       reader: EncodedReader, teacher: Transformer, device: torch.device) -> int:
    """Integrate what is not stored yet, shared between ranks; returns how many batches this one did. All do as many, a few
    twice if need be: where the weights are sharded a forward takes all ranks."""
    missing = [i for i in range(config.batches) if not trajectory_path(run, i).exists()]
    meet()
    rank, world = rank_and_world()
    todo = [missing[(first + rank) % len(missing)] for first in range(0, len(missing), world)]
    grid = teacher_grid(sigmas, config.pieces, config.shift)
    for index in counted(todo, "batches of trajectories"):
        draws = draws_of(seed, "trajectories", index)
        batch = reader.batch(draws, config.loop.batch).to(device)
        condition = ClipCondition(batch.features, batch.context, batch.reference, batch.motion, forcing.window_blocks,
                                  *draw_position(forcing, draws.numpy))
        velocity = config.guidance.velocity(teacher, condition, reader.silence, reader.rows_of(""))
        noise = torch.randn(batch.latents.shape, generator=draws.torch).to(device)
        states = integrate(velocity, grid, config.pieces, noise, batch.latents.shape[2] // forcing.block_latents)
        write_trajectories(trajectory_path(run, index), Trajectories(states, condition), sigmas)
    return len(todo)


# ---------------------------------------------------------------- the stage


def train_ode(config: OdeConfig, forcing: ForcingConfig, sigmas: Sequence[float], run: str | Path, seed: int, text: TextEncoder,
              default_identity: int, stop_after: int | None = None) -> list[float]:
    """Store the trajectories that are missing, then train RUN/ode.pt from RUN/forcing.pt; returns the losses of this call.
    Ranks share the storing and wait for each other before they train."""
    cast = cast_of(forcing, run, seed)
    model, guide = (cast.averaged("forcing", role)[0] for role in ("student", "guide"))
    trainer = Trainer("ode", model, config.loop, run, seed)
    strategy_of(config.loop).wrap(guide)
    reader = EncodedReader(run, forcing, text, default_identity)
    store_trajectories(config, forcing, sigmas, run, seed, reader, guide, trainer.device)
    meet()

    def loss_of(draws: Draws):
        stored = read_trajectories(trajectory_path(run, int(draws.numpy.integers(config.batches))), sigmas).to(trainer.device)
        blocks = stored.states.shape[3] // forcing.block_latents
        shown = draw_states(draws.numpy, len(stored.states), blocks, len(sigmas) - 1, config.same_share, config.clean_share)
        return ode_loss(stored.condition.velocity(model), stored.states, sigmas, shown), {}

    return trainer.run(loss_of, stop_after)
