"""Stage `dmd` (Stage 2): the student's own rollouts pulled to the teacher's distribution (training.md 2.5).

Three roles, as copies of the transformer or adapters over one (casting.py): the teacher (averages of the
bidirectional `teacher` or of `forcing`, frozen), the critic (starts as the teacher and sees what it sees, learns the
student's distribution by flow matching at every iteration) and the student (every `ratio`-th iteration). The student
learns on the rollouts it is run with: same step function, same levels as the exported sampler, same transitions
(Euler), same history.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from liveavatar.config import one_of
from liveavatar.core import ConfigError
from liveavatar.diffusion.rollout import ClipCondition, HistoryMode, cached_clips, exit_table, level_parallel
from liveavatar.models.encoders import TextEncoder
from liveavatar.training import losses
from liveavatar.training.casting import Copies, Transformer, cast_of
from liveavatar.training.checkpoints import checkpoint_path, save_checkpoint
from liveavatar.training.forcing import Batch, EncodedReader, ForcingConfig, clip_loss, draw_position, forcing_levels
from liveavatar.training.guidance import Guidance
from liveavatar.training.judging import Judge, JudgeConfig
from liveavatar.training.levels import score_levels
from liveavatar.training.loop import Draws, Learner, LoopConfig, Trainer, agreed, draws_of, learning_rate, shared_draws
from liveavatar.training.replay import replay
from liveavatar.training.strategy import strategy_of


STARTS = ("forcing", "ode", "consistency")  # stages that a student can begin with
AGGRESSIVE = Guidance(text=6.0, audio=6.0)  # conventional; LiveTalk's file says 5


@dataclass(frozen=True, kw_only=True)
class DmdConfig:
    """Stage 2. loop: the critic's iterations, of which the student takes every `ratio`-th after `critic_warmup`;
    its lr and ema are the student's, the rest serves both."""

    loop: LoopConfig
    critic_lr: float = 2e-4
    start: str = "forcing"  # stage whose averages the student starts from: forcing, ode or consistency
    teacher: str = "forcing"  # stage whose averages teach: teacher (bidirectional) or forcing (causal)
    ratio: int = 5
    critic_warmup: int = 20
    guidance: Guidance = field(default_factory=Guidance)
    shift: float = 5.0  # of tau
    history: str = "per_step"  # clean | fixed:t | random:t | per_step, as HistoryMode
    history_grad: str = "through"  # or detach; shared banks and refreshed sinks always detach
    refresh_share: float = 0.0  # of the iterations show the student its own first latent as sink after block 0 (AAS)
    forward_kl: float = 0.0  # weight of the forcing loss on real clips beside the reverse divergence
    curated_share: float = 1.0  # only this share of the spoken clips, those that move most, gives conditions (LiveTalk)
    keep_steps: int = 50  # of the student, after which its averages are also kept as RUN/dmd_STEPS.pt, to choose from
    judge: JudgeConfig | None = None  # over a base: what says which averages are the best, and when to stop
    aggressive: bool = False  # LiveTalk's schedule: both learning rates doubled, guidance of the teacher AGGRESSIVE

    def __post_init__(self):
        one_of("dmd.start", self.start, STARTS)
        one_of("dmd.teacher", self.teacher, ("forcing", "teacher"))
        one_of("dmd.history_grad", self.history_grad, ("through", "detach"))
        HistoryMode.parse(self.history)
        for name, lowest in (("critic_lr", 0), ("ratio", 1), ("critic_warmup", 0), ("shift", 1), ("forward_kl", 0), ("keep_steps", 1)):
            if getattr(self, name) < lowest:
                raise ConfigError(f"dmd.{name}={getattr(self, name)}: must be at least {lowest}")
        if not 0 <= self.refresh_share <= 1 or not 0 < self.curated_share <= 1:
            raise ConfigError(f"dmd.refresh_share={self.refresh_share}, curated_share={self.curated_share}: must be in 0..1, the latter above 0")

    @property
    def rate_factor(self) -> float:
        """What learning rates are multiplied by."""
        return 2.0 if self.aggressive else 1.0

    @property
    def teacher_guidance(self) -> Guidance:
        """The guidance that is used."""
        return AGGRESSIVE if self.aggressive else self.guidance

    def student_turn(self, iteration: int) -> bool:
        """True when the student is updated in this iteration (from 0)."""
        return self.student_steps(iteration + 1) > self.student_steps(iteration)

    def student_steps(self, iterations: int) -> int:
        """Updates of the student in so many iterations."""
        return max(0, iterations - self.critic_warmup) // self.ratio


@dataclass(frozen=True)
class Plan:
    """What all ranks of an iteration do alike, because it shapes the graph. steps: of the table until the exit."""

    steps: int
    sink_distance: int
    first_block: int
    refresh: bool
    seed: int

    @classmethod
    def draw(cls, config: DmdConfig, forcing: ForcingConfig, levels: int, draws: Draws) -> "Plan":
        """One plan from the draws that all ranks share."""
        distance, first = draw_position(forcing, draws.numpy)
        return cls(1 + int(draws.numpy.integers(levels)), distance, first, bool(draws.numpy.random() < config.refresh_share),
                   int(draws.numpy.integers(1 << 31)))


Backward = Callable[[torch.Tensor], None]


def roll(model: Transformer, condition: ClipCondition, sigmas: Sequence[float], noise: torch.Tensor, blocks: int, history: HistoryMode,
         seed: int, through: bool) -> tuple[torch.Tensor, Backward]:
    """Clips [B,C,F,h,w] from noise, and what carries a gradient at them back to the parameters.

    Level-parallel where that is possible (per-step banks, one sink), else cached, with replay of its blocks.
    """
    if history.shared or condition.refresh_block:
        rolled = cached_clips(model, sigmas, noise, condition, blocks, history=history, seed=seed)
        return rolled.latents, functools.partial(replay, model, rolled)
    made = level_parallel(condition.velocity(model, history_grad=through), sigmas, noise, blocks)
    return made.detach(), made.backward


class Distillation:
    """The iteration of Stage 2 over its three models."""

    def __init__(self, config: DmdConfig, forcing: ForcingConfig, sigmas: Sequence[float], run: str | Path, seed: int,
                 reader: EncodedReader, cast: Copies | None = None, judge: Judge | None = None):
        self.config, self.forcing, self.sigmas, self.reader, self.judge = config, forcing, tuple(sigmas), reader, judge
        self.history = HistoryMode.parse(config.history)
        cast = cast or cast_of(forcing, run, seed)
        self.teacher, critic, student = cast.teacher(config.teacher), cast.critic(config.teacher), cast.averaged(config.start, "student")[0]
        strategy_of(config.loop).wrap(self.teacher)
        self.critic = Learner(critic, config.loop, average=False)
        self.trainer = Trainer("dmd", student, config.loop, run, seed, {"critic": self.critic})
        self.student = self.trainer.learner

    def step(self) -> dict[str, float]:
        """One iteration: the critic learns from new clips; in its turn the student from the same ones."""
        i, seed = self.trainer.iteration, self.trainer.seed
        draws = draws_of(seed, "dmd", i, self.trainer.rank)
        plan = Plan.draw(self.config, self.forcing, len(self.sigmas) - 1, shared_draws(seed, "dmd", i))
        agreed(steps=plan.steps, sink_distance=plan.sink_distance, first_block=plan.first_block, refresh=int(plan.refresh))
        batch, turn = self.reader.batch(draws, self.config.loop.batch).to(self.trainer.device), self.config.student_turn(i)
        # Without the cache of casts: one made under no_grad would cut the graph of the step that learns.
        with self.trainer.autocast(cache_enabled=False):
            condition = self._condition(batch, plan)
            with torch.set_grad_enabled(turn):
                made, backward = self._roll(condition, batch, plan, draws)
            # Scores are given the portrait.
            condition = replace(condition, refresh_block=0, causal=self.config.teacher == "forcing")
            metrics = self._learn_critic(condition, made, draws, i)
            if turn:
                metrics |= self._learn_student(condition, made, backward, batch, draws, i)
                self._keep(self.config.student_steps(i + 1))
        return metrics

    def _keep(self, steps: int) -> None:
        name, judged = f"dmd_{steps:06d}", self.judge is not None and self.judge.due(steps)
        if judged or steps % self.config.keep_steps == 0:
            averages = {f"ema/{name}": value for name, value in self.student.ema.values.items()}
            save_checkpoint(checkpoint_path(self.trainer.folder, name), averages | {"iteration": torch.tensor(self.trainer.iteration + 1)})
        if judged:
            self.trainer.stopped = self.judge(name)

    def _rate(self, iteration: int) -> float:
        return learning_rate(self.config.loop, iteration) * self.config.rate_factor

    def _blocks(self, x: torch.Tensor) -> int:
        return x.shape[2] // self.forcing.block_latents

    def _condition(self, batch: Batch, plan: Plan) -> ClipCondition:
        return ClipCondition(batch.features, batch.context, batch.reference, batch.motion, self.forcing.window_blocks,
                             plan.sink_distance, plan.first_block, int(plan.refresh))

    def _roll(self, condition: ClipCondition, batch: Batch, plan: Plan, draws: Draws) -> tuple[torch.Tensor, Backward]:
        noise = torch.randn(batch.latents.shape, generator=draws.torch).to(batch.latents)
        return roll(self.student.module, condition, exit_table(self.sigmas, plan.steps), noise, self._blocks(noise), self.history,
                    plan.seed, self.config.history_grad == "through")

    def _noised(self, made: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        tau = score_levels(draws.numpy, len(made), self._blocks(made), self.config.shift)
        return tau, torch.randn(made.shape, generator=draws.torch).to(made)

    def _learn_critic(self, condition: ClipCondition, made: torch.Tensor, draws: Draws, iteration: int) -> dict[str, float]:
        loss = losses.critic_loss(condition.velocity(self.critic.module), made, *self._noised(made, draws))
        loss.backward()
        rate = self._rate(iteration) * self.config.critic_lr / self.config.loop.lr
        return {"loss": float(loss.detach()), "norm": self.critic.update(rate, iteration + 1), "lr": rate}

    def _learn_student(self, condition: ClipCondition, made: torch.Tensor, backward: Backward, batch: Batch, draws: Draws,
                       iteration: int) -> dict[str, float]:
        real = self.config.teacher_guidance.velocity(self.teacher, condition, self.reader.silence, self.reader.rows_of(""))
        direction = losses.dmd_gradient(made, real, condition.velocity(self.critic.module), *self._noised(made, draws))
        clips = made.clone().requires_grad_(True)
        loss = losses.matching_loss(clips, direction)
        loss.backward()
        backward(clips.grad)
        metrics = {"student": float(loss.detach()), "contrast": float(made.std() / batch.latents.std())}
        if self.config.forward_kl:
            forward, _ = clip_loss(self.student.module, self.forcing, batch, draws, forcing_levels(self.forcing, batch, draws))
            (self.config.forward_kl * forward).backward()
            metrics["forward"] = float(forward.detach())
        rate = self._rate(iteration)
        norm = self.student.update(rate, self.config.student_steps(iteration + 1))
        return metrics | {"student_norm": norm}


def train_dmd(config: DmdConfig, forcing: ForcingConfig, sigmas: Sequence[float], run: str | Path, seed: int, text: TextEncoder,
              default_identity: int, stop_after: int | None = None, judge: Judge | None = None) -> list[float]:
    """Distil (or go on distilling) RUN/forcing.pt into RUN/dmd.pt; returns the critic's losses of this call.

    sigmas: the sampler's table, ends in 0. judge: sees what it starts from first. Raises WeightsError without the checkpoint to
    start from, ConfigError where the judge cannot judge that.
    """
    reader = EncodedReader(run, forcing, text, default_identity, config.curated_share)
    work = Distillation(config, forcing, sigmas, run, seed, reader, judge=judge)
    work.trainer.stopped = judge is not None and judge(config.start)
    return work.trainer.run_steps(work.step, stop_after)
