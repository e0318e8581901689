"""Stage `teacher`: the bidirectional flow-matching model that Stage 2 distils (training.md section 1).

The same transformer without a mask: every block of a clip sees the whole clip. One noise level per clip; speech and
text are dropped for guidance, the portrait never. It is sampled with the schedulers of diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from liveavatar.config import one_of
from liveavatar.core import ConfigError
from liveavatar.diffusion.rollout import Velocity
from liveavatar.diffusion.schedule import TRAIN_TIMESTEPS
from liveavatar.models.encoders import TextEncoder
from liveavatar.training.casting import cast_of
from liveavatar.training.forcing import EncodedReader, ForcingConfig, clip_loss
from liveavatar.training.guidance import Guidance
from liveavatar.training.levels import shifted_levels
from liveavatar.training.loop import Draws, LoopConfig, Trainer


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a teacher is sampled. scheduler: of diffusers; steps: forwards of the model (times three under guidance)."""

    scheduler: str = "unipc"
    steps: int = 20
    shift: float = 5.0

    def __post_init__(self):
        one_of("sampler.scheduler", self.scheduler, SCHEDULERS)
        if self.steps < 1 or self.shift <= 0:
            raise ConfigError(f"sampler: steps={self.steps}, shift={self.shift}: must be positive")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Training of the teacher; what is not here is as in `forcing`. start: as ForcingConfig's."""

    loop: LoopConfig
    start: str = ""
    shift: float = 5.0
    silence_share: float = 0.15  # condition dropout: features of silence
    no_text_share: float = 0.10
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig())
    guidance: Guidance = field(default_factory=Guidance)

    def of(self, forcing: ForcingConfig) -> ForcingConfig:
        """`forcing` with the shares of this stage."""
        return replace(forcing, silence_share=self.silence_share, no_text_share=self.no_text_share)


SCHEDULERS = ("euler", "unipc", "dpm++")


def make_scheduler(config: SamplerConfig):
    """A diffusers scheduler for flow matching, its timesteps set."""
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": config.shift, "num_train_timesteps": TRAIN_TIMESTEPS}
    scheduler = {"euler": lambda: FlowMatchEulerDiscreteScheduler(TRAIN_TIMESTEPS, shift=config.shift),
                 "unipc": lambda: UniPCMultistepScheduler(**flow),
                 "dpm++": lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **flow)}[config.scheduler]()
    scheduler.set_timesteps(config.steps)
    return scheduler


@torch.no_grad()
def sample(velocity: Velocity, noise: torch.Tensor, blocks: int, config: SamplerConfig) -> torch.Tensor:
    """Clean latents [B,C,F,h,w] from noise of that shape, all blocks of a clip at one level."""
    scheduler, x = make_scheduler(config), noise.float()
    for i, t in enumerate(scheduler.timesteps):
        sigma = torch.full((len(x), blocks), float(scheduler.sigmas[i]))
        x = scheduler.step(velocity(x, sigma), t, x).prev_sample.float()
    return x


def train_teacher(config: TeacherConfig, forcing: ForcingConfig, run: str | Path, seed: int, text: TextEncoder,
                  default_identity: int, stop_after: int | None = None) -> list[float]:
    """Train (or go on training) RUN/teacher.pt; returns the losses of this call."""
    own = config.of(forcing)
    model = cast_of(own, run, seed).started("teacher", config.start)
    reader = EncodedReader(run, own, text, default_identity)
    trainer = Trainer("teacher", model, config.loop, run, seed)

    def loss_of(draws: Draws):
        batch = reader.batch(draws, config.loop.batch).to(trainer.device)
        count, blocks = len(batch.latents), batch.latents.shape[2] // own.block_latents
        sigma = torch.from_numpy(shifted_levels(draws.numpy, (count, 1), config.shift)).float().expand(-1, blocks)
        return clip_loss(model, own, batch, draws, sigma, causal=False)

    return trainer.run(loss_of, stop_after)
