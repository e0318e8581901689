"""Many blocks in sequence, in two orders proven equal (training.md 2.4).

Cached: block after block, each through all its levels; what streams. Level-parallel: level after level,
each for all blocks of a clip at once; possible because with one bank per level the context of a level
needs nothing from the others. `denoise_block` is the step function: the runtime's Denoiser and the cached
rollout both call it, so what is trained and evaluated is what is run.

Every rollout takes a table of levels that ends in 0. Leaving at level e is the table cut there: the Euler
step to 0 gives x - sigma v, the clean estimate. Only the last step of a table ever has gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from liveavatar.core import ConfigError, Geometry
from liveavatar.diffusion.denoise import draw_seed, euler, noise
from liveavatar.diffusion.schedule import TRAIN_TIMESTEPS, timesteps_of
from liveavatar.models.audio_encoder import AudioTokens
from liveavatar.models.cache import ClipHistory, StepCache
from liveavatar.models.clip import Clip
from liveavatar.models.s2v import CausalS2V, StepModulation, TextCache

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [B,C,F,h,w], sigma [B,N] of the N blocks of each clip) -> velocity like x; conditions and masks are bound in it."""


@dataclass(frozen=True)
class Step:
    """One denoising step: its level, where it goes and its constant modulation."""

    sigma: float
    sigma_next: float
    modulation: StepModulation


def make_steps(model: CausalS2V, sigmas: Sequence[float]) -> list[Step]:
    """The steps of a table of levels that ends in 0."""
    times = timesteps_of(list(sigmas))
    return [Step(s, n, model.modulation(t)) for s, n, t in zip(sigmas, sigmas[1:], times)]


def exit_table(sigmas: Sequence[float], steps: int) -> tuple[float, ...]:
    """The table that leaves after `steps` of its steps, at the clean estimate of that level."""
    return (*sigmas[:-1][:steps], 0.0)


def denoise_block(model: CausalS2V, step: Step, x: torch.Tensor, audio: AudioTokens, text: TextCache, cache: StepCache | ClipHistory, *,
                  block: int, sink_distance: int, pose: torch.Tensor | None = None, remember: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """One Euler step of one block, [16, F, h, w] or a batch of such. Returns (x at sigma_next, in x's dtype; fp32 velocity)."""
    v = model(x, step.modulation, audio, text, cache, block=block, sink_distance=sink_distance, pose=pose, remember=remember)
    return euler(x, v, step.sigma, step.sigma_next), v


# ---------------------------------------------------------------- what later blocks see


@dataclass(frozen=True)
class HistoryMode:
    """At which noise level later blocks see a block.

    per_step: at every level what was computed there, one bank per step, no extra forward; what the runtime
    does. clean, fixed, random: one bank for all steps, filled by one more forward of the finished block at
    timestep 0, t, or uniform in [0, t] (LiveTalk; history corrupt of Live Avatar).
    """

    kind: str
    t: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "HistoryMode":
        """"per_step", "clean", "fixed:t" or "random:t", t a timestep in (0, 1000]. Raises ConfigError."""
        kind, _, number = text.partition(":")
        if text in ("per_step", "clean"):
            return cls(kind)
        try:
            t = float(number)
        except ValueError:
            t = 0.0
        if kind not in ("fixed", "random") or not 0 < t <= TRAIN_TIMESTEPS:
            raise ConfigError(f"history={text!r}: must be clean, fixed:t, random:t (0 < t <= {TRAIN_TIMESTEPS}) or per_step")
        return cls(kind, t)

    @property
    def shared(self) -> bool:
        """One bank for all steps."""
        return self.kind != "per_step"

    def banks(self, steps: Sequence[Step]) -> Sequence[Step]:
        """The steps that have a bank of their own."""
        return steps[:1] if self.shared else steps

    def corruption(self, seed: int, block: int, shape: tuple[int, ...]) -> tuple[float, torch.Tensor] | None:
        """(sigma, noise) to remember a block at, a function of (seed, block); None: each step remembers by itself."""
        if not self.shared:
            return None
        share = draw_seed("history level", seed, block) / 2**63 if self.kind == "random" else 1.0
        return self.t / TRAIN_TIMESTEPS * share, noise(seed, "history", block, shape)


PER_STEP = HistoryMode("per_step")


# ---------------------------------------------------------------- cached order


def roll_block(model: CausalS2V, steps: Sequence[Step], banks: Sequence[StepCache | ClipHistory], x: torch.Tensor, audio: AudioTokens,
               text: TextCache, *, block: int, sink_distance: int, corruption: tuple[float, torch.Tensor] | None = None,
               pose: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """One block through all its steps: (clean latents, what entered the last step), both like x.

    banks: one per step; with a corruption (HistoryMode) a single one.
    """
    for step, bank in zip(steps, banks if corruption is None else [*banks] * len(steps), strict=True):
        entered = x
        x, _ = denoise_block(model, step, x, audio, text, bank, block=block, sink_distance=sink_distance, pose=pose,
                             remember=corruption is None)
    if corruption is not None:
        sigma, eps = corruption
        remembered = torch.lerp(x, eps.to(x), sigma)
        model(remembered, model.modulation(TRAIN_TIMESTEPS * sigma), audio, text, banks[0], block=block, sink_distance=sink_distance,
              pose=pose)
    return x, entered


@dataclass(frozen=True, kw_only=True)
class Course:
    """What the blocks of a stream see beside themselves.

    ring_blocks, anchor_blocks, first_block: as in Geometry. sink_distance: rel of the rolling reference. refresh_block: from this block
    of the rollout on the sink is its own first latent (AAS); 0: never. kind: of the caches, for ablations.
    """

    ring_blocks: int = 4
    anchor_blocks: int = 0
    first_block: int = 0
    sink_distance: int = 30
    refresh_block: int = 0
    history: HistoryMode = PER_STEP
    kind: type[StepCache] = StepCache

    @classmethod
    def of(cls, geometry: Geometry, sink_distance: int, refresh_block: int) -> Course:
        """As the runtime has it for streams of this geometry."""
        return cls(ring_blocks=geometry.ring_blocks, anchor_blocks=geometry.anchor_blocks, first_block=geometry.first_block,
                   sink_distance=sink_distance, refresh_block=refresh_block)


@torch.no_grad()
def cached_rollout(model: CausalS2V, sigmas: Sequence[float], noises: Iterable[torch.Tensor], features: Iterable[torch.Tensor],
                   context: torch.Tensor, reference: torch.Tensor, motion: torch.Tensor, course: Course = Course(), seed: int = 0,
                   poses: Iterable[torch.Tensor | None] = itertools.repeat(None)) -> Iterator[torch.Tensor]:
    """Clean latents [16, F, h, w] of block after block in flat memory; noises: [16, F, h, w], features: [L, Ca, 4F], context: text rows
    [n, text_dim], reference: [16, 1, h, w], motion: [16, M, h, w]. seed: of the noise on the history, where its mode has any.
    poses: like the noises, or None each."""
    steps, text, history = make_steps(model, sigmas), model.encode_text(context), course.history
    (h, w), banks, first = reference.shape[-2:], [], None
    for block, (x, feature, pose) in enumerate(zip(noises, features, poses)):
        if block == 0:
            banks = [model.new_cache(h, w, x.shape[1], course.ring_blocks, course.anchor_blocks, course.kind) for _ in history.banks(steps)]
        if block == 0 or block == course.refresh_block:
            sink = model.prefill(reference if first is None else first, motion, text)
            for bank in banks:
                model.set_sink(bank, sink, h, w)
        x, _ = roll_block(model, steps, banks, x, model.encode_audio(feature), text, block=course.first_block + block,
                          sink_distance=course.sink_distance, corruption=history.corruption(seed, block, x.shape), pose=pose)
        first = x[:, :1] if first is None else first
        yield x


# ---------------------------------------------------------------- whole clips, for training


class ClipCondition(Clip):
    """A Clip with what a rollout asks of it."""

    def to(self, device: torch.device) -> ClipCondition:
        """The same on another device; text rows stay, they are copied where they are read."""
        return replace(self, **{name: getattr(self, name).to(device) for name in ("features", "reference", "motion")})

    def of(self, clips: torch.Tensor) -> ClipCondition:
        """That of some of its clips: bool [B]."""
        return replace(self, context=[rows for rows, kept in zip(self.context, clips.tolist()) if kept],
                       **{name: getattr(self, name)[clips] for name in ("features", "reference", "motion")})

    def velocity(self, model: CausalS2V, history_grad: bool = True, pose: torch.Tensor | None = None) -> Velocity:
        """The model under this condition, all blocks at once. pose: like x. Raises ConfigError where the sink is refreshed."""
        if self.refresh_block:
            raise ConfigError("refresh_block: a clip at once has one sink; use the cached order")
        return lambda x, sigma: model.forward_clip(x, TRAIN_TIMESTEPS * sigma, self, pose=pose, history_grad=history_grad)

    def sink(self, model: CausalS2V, text: TextCache, block: int, first: torch.Tensor | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values per layer that block `block` of the clip sees. first: the clip's own first latent, once it is there."""
        own = self.refresh_block and block >= self.refresh_block
        return list(zip(*model.prefill_batch(first if own else self.reference, self.motion, text)))


def level_parallel(velocity: Velocity, sigmas: Sequence[float], x: torch.Tensor, blocks: int) -> torch.Tensor:
    """Clean latents [B,C,F,h,w] from noise x: one forward of all blocks per level, equal to the cached order with
    per-step banks. The last step is differentiable, also through history where the velocity lets it."""

    def at(sigma: float) -> torch.Tensor:
        return torch.full((len(x), blocks), sigma, device=x.device)

    with torch.no_grad():
        for sigma, after in zip(sigmas[:-2], sigmas[1:-1]):
            x = euler(x, velocity(x, at(sigma)), sigma, after)
    return euler(x, velocity(x, at(sigmas[-2])), sigmas[-2], sigmas[-1])


@dataclass(frozen=True)
class Rolled:
    """A cached rollout of clips, with what it takes to compute any block's last step again.

    latents, entered: [B,C,F,h,w], clean and as the last step found them; bank: the history that step saw.
    """

    condition: ClipCondition
    sigmas: tuple[float, ...]
    latents: torch.Tensor
    entered: torch.Tensor
    bank: ClipHistory
    blocks: int

    def piece(self, x: torch.Tensor, block: int) -> torch.Tensor:
        """The latents of one block."""
        return x.chunk(self.blocks, dim=2)[block]


@torch.no_grad()
def cached_clips(model: CausalS2V, sigmas: Sequence[float], x: torch.Tensor, condition: ClipCondition, blocks: int, *,
                 history: HistoryMode = PER_STEP, seed: int = 0) -> Rolled:
    """The cached order for a batch of clips from noise x [B,C,F,h,w]; keeps keys and values of one bank of the whole clips."""
    steps, text = make_steps(model, sigmas), model.encode_text(condition.context)
    banks = [ClipHistory(condition.window_blocks) for _ in history.banks(steps)]
    made, entered = [], []
    for block, piece in enumerate(x.chunk(blocks, dim=2)):
        if block == 0 or block == condition.refresh_block:
            sink = condition.sink(model, text, block, made[0][:, :, :1] if made else None)
            for bank in banks:
                bank.set_sink(sink, model.sink_angles(*x.shape[-2:]))
        audio = model.encode_audio(condition.features.chunk(blocks, dim=-1)[block])
        out = roll_block(model, steps, banks, piece, audio, text,
                         block=condition.first_block + block, sink_distance=condition.sink_distance,
                         corruption=history.corruption(seed, block, piece.shape))
        made.append(out[0]), entered.append(out[1])
    return Rolled(condition, tuple(sigmas), torch.cat(made, dim=2), torch.cat(entered, dim=2), banks[-1], blocks)


def replay_block(model: CausalS2V, rolled: Rolled, block: int) -> torch.Tensor:
    """The last step of one block of a rollout again, with gradients: [B,C,F/N,h,w]. History enters as a constant."""
    condition = rolled.condition
    (step,) = make_steps(model, rolled.sigmas[-2:])
    text, history = model.encode_text(condition.context), rolled.bank.before(block)
    history.set_sink(condition.sink(model, text, block, rolled.latents[:, :, :1]), model.sink_angles(*rolled.latents.shape[-2:]))
    audio = model.encode_audio(condition.features.chunk(rolled.blocks, dim=-1)[block])
    return denoise_block(model, step, rolled.piece(rolled.entered, block), audio, text, history, block=condition.first_block + block,
                         sink_distance=condition.sink_distance, remember=False)[0]
