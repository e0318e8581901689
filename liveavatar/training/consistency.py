"""Optional stage `consistency`: a few-step student without stored trajectories (training.md 2.3, Causal-Forcing 2602.02214).

Neighbouring levels of a fine grid must give the same clean estimate. The state at the higher level is a real clip
noised; that at the lower one is one guided Euler step of the frozen Stage 1 model away from it, and is judged by the
student's own average. All blocks at levels of their own or alike, under the causal mask, as in `forcing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from liveavatar.core import ConfigError
from liveavatar.diffusion.rollout import ClipCondition, Velocity
from liveavatar.models.encoders import TextEncoder
from liveavatar.training.casting import cast_of
from liveavatar.training.forcing import EncodedReader, ForcingConfig, draw_position
from liveavatar.training.guidance import Guidance
from liveavatar.training.levels import mix, per_latent, teacher_grid
from liveavatar.training.losses import clean_estimate
from liveavatar.training.loop import Draws, LoopConfig, Trainer
from liveavatar.training.strategy import strategy_of


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """pieces: intervals of the grid between two levels of the student, even before `shift`: 12 of 4 steps are 48."""

    loop: LoopConfig
    pieces: int = 12
    shift: float = 5.0
    guidance: Guidance = field(default_factory=lambda: Guidance(text=3.0, audio=3.0))
    same_share: float = 0.7  # of the clips with one level in all blocks, as at inference

    def __post_init__(self):
        if self.pieces < 1 or self.shift < 1 or not 0 <= self.same_share <= 1:
            raise ConfigError(f"consistency: pieces={self.pieces}, shift={self.shift}: at least 1; same_share={self.same_share}: in 0..1")


def draw_intervals(rng: np.random.Generator, batch: int, blocks: int, intervals: int, same_share: float) -> torch.Tensor:
    """int64 [B,N]: which interval of the grid every block is in."""
    drawn = rng.integers(intervals, size=(batch, blocks))
    return torch.from_numpy(np.where(rng.random((batch, 1)) < same_share, drawn[:, :1], drawn))


def consistency_loss(student: Velocity, average: Velocity, teacher: Velocity, latents: torch.Tensor, noise: torch.Tensor,
                     grid: Sequence[float], drawn: torch.Tensor) -> torch.Tensor:
    """Mean of |f_student(x_t, t) - sg f_average(x_t-, t-)|^2, where x_t- is the teacher's Euler step from x_t and f the
    clean estimate. latents, noise: [B,C,F,h,w]; grid: levels from 1 to 0; drawn: [B,N] indices of t in it."""
    levels = torch.tensor(list(grid), dtype=torch.float32)
    sigma, after = levels[drawn], levels[drawn + 1]
    x = mix(latents, noise, sigma)
    with torch.no_grad():
        nearer = x + per_latent(after - sigma, x) * teacher(x, sigma).float()
        target = clean_estimate(average, nearer, after)  # at level 0 this is `nearer` itself
    return (clean_estimate(student, x, sigma) - target).square().mean()


def train_consistency(config: ConsistencyConfig, forcing: ForcingConfig, sigmas: Sequence[float], run: str | Path, seed: int,
                      text: TextEncoder, default_identity: int, stop_after: int | None = None) -> list[float]:
    """Train (or go on training) RUN/consistency.pt from RUN/forcing.pt; returns the losses of this call."""
    if config.loop.strategy == "fsdp2":
        raise ConfigError("consistency with strategy fsdp2: the average is run as a model here, which its shards are not; use single or deepspeed")
    cast = cast_of(forcing, run, seed)
    teacher, model, average = (cast.averaged("forcing", role)[0] for role in ("guide", "student", "average"))
    teacher.requires_grad_(False), average.requires_grad_(False)
    strategy_of(config.loop).wrap(teacher)
    trainer = Trainer("consistency", model, config.loop, run, seed)
    for name, p in average.named_parameters():
        p.data = trainer.learner.ema.values[name]  # the same numbers, as they move
    reader = EncodedReader(run, forcing, text, default_identity)
    grid = teacher_grid(sigmas, config.pieces, config.shift)

    def loss_of(draws: Draws):
        batch = reader.batch(draws, config.loop.batch).to(trainer.device)
        condition = ClipCondition(batch.features, batch.context, batch.reference, batch.motion, forcing.window_blocks,
                                  *draw_position(forcing, draws.numpy))
        noise = torch.randn(batch.latents.shape, generator=draws.torch).to(batch.latents)
        drawn = draw_intervals(draws.numpy, len(noise), noise.shape[2] // forcing.block_latents, len(grid) - 1, config.same_share)
        guided = config.guidance.velocity(teacher, condition, reader.silence, reader.rows_of(""))
        return consistency_loss(condition.velocity(model), condition.velocity(average), guided, batch.latents, noise, grid, drawn), {}

    return trainer.run(loss_of, stop_after)
