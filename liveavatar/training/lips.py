"""Stages `painter` and `lips`: a finished avatar's mouth learns to do what is said, and nothing else changes.

Regressing on clips trains a mouth to its mean, because where the head is is not said; distribution matching needs a teacher that is
better than the student. Here the truth is made: of what the avatar as it was makes of the states that a rollout goes through, the cells
of the mouth are painted again, by a small network (`painter`) that has learned from clips how a mouth looks among such surroundings
when lips are so far open and so wide. Then nothing is left to chance but what sound says of lips. Pieces that are told how the head is held have
their clip in place of what the avatar makes: with lips, lids and head told little of it is left to chance. What such a clip shows otherwise
than the portrait, as its text says, is weighed by itself: a shirt is six cells of 64. In cells where the clip stands still the truth is that
picture's mean over time, so that few-step noise in a backdrop goes, and the first latent of a block may be eased towards the block before, but not
its mouth, which would come late; most of what seams there were was the codec's (bench/results/training-v8). Some clips fall silent half way: nothing
rendered shows lips that come to rest after a long speech.

A network that reads lips off latents, as a loss (Wav2Lip, LatentSync), was tried first: after 1,000 iterations it was content with
a mouth that moved half as far. What the avatar as it was makes of the same noise, as truth, is a path that cannot be learned: all motion
shrank (bench/results/training-v5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from liveavatar.conditioning.behaviour import control_planes
from liveavatar.config import one_of
from liveavatar.core import FRAMES_PER_LATENT, ConfigError, InputError
from liveavatar.diffusion.rollout import ClipCondition, exit_table, level_parallel
from liveavatar.models.encoders import TextEncoder
from liveavatar.models.probe import TYPICAL, Residual
from liveavatar.models.s2v import CausalS2V
from liveavatar.training.casting import cast_of
from liveavatar.training.checkpoints import checkpoint_path, load_average
from liveavatar.training.forcing import Batch, Encoded, EncodedReader, ForcingConfig, draw_position
from liveavatar.training.levels import mix
from liveavatar.training.lids import opened
from liveavatar.training.loop import Draws, LoopConfig, Trainer
from liveavatar.training.unpack import STAGE

READ = ("aperture", "width")
SETTLING = 6  # pictures after the last word in which nothing is asked of the lips: they are on their way to rest


@dataclass(frozen=True, kw_only=True)
class LipsConfig:
    """What is not here is as in `forcing`. start: stage whose averages are the finished avatar, lids, or avatar: an unpacked one."""

    loop: LoopConfig
    painter: LoopConfig
    start: str = "lids"
    blocks: int = 4  # of a clip's, a piece drawn anew each time
    mouth: float = 2.0  # extra loss weight of the mouth's cells
    dress: float = 0.0  # extra loss weight of what a clip as truth shows otherwise than the portrait, shared by its cells: a shirt has few
    pull: tuple[float, float] = (0.15, 0.03)  # weights of lips too far open and too wide, squared, in units of the corpus' spread: of a
    # mouth's cells little is lips; how wide they are is a few pixels, and mostly noise
    gain: tuple[float, float] = (1.4, 1.4)  # how far lips go over what the clip's do: what is heard of a strange voice is learned as less than it is
    lively: float = 1.0  # how far all else moves over what the avatar makes, or the clip: a squared error takes some of the motion that is chance
    still: float = 0.09  # standard deviation over time, of the corpus' own, below which a cell of a clip stands still
    ease: float = 0.2  # of the change from block to block that is taken from the first latent of a block
    hush_share: float = 0.25  # of the pieces fall silent somewhere
    drop_share: float = 0.4  # of the pieces come without the control of the lids
    head_share: float = 0.0  # of the others, those that are told how the head is held too, where clips know; 0: no such control is learned
    blink: float = 1.7  # how far a blink of those clips goes, over what the codec makes of it, as lids.gain
    width: int = 128  # channels of the painter

    def __post_init__(self):
        one_of("lips.start", self.start, ("lids", STAGE))  # both take the control of the lids
        for name in ("hush_share", "drop_share", "head_share", "ease"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"lips.{name}={getattr(self, name)}: must be in 0..1")
        if self.blocks < 1 or self.width < 8 or self.width % 8:
            raise ConfigError(f"lips: blocks={self.blocks}: at least 1; width={self.width}: a multiple of 8")
        if min(self.mouth, self.dress, *self.pull, self.still, *self.gain, self.lively, self.blink) < 0:
            raise ConfigError("lips: mouth, dress, pull, still, gain, lively and blink must not be negative")


# ---------------------------------------------------------------- what paints mouths


class Painter(nn.Module):
    """The cells of a mouth from what is around them, the portrait, and what the lips are to do."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        lips = 2 * FRAMES_PER_LATENT * len(READ)  # a latent's own pictures, and those before: the codec remembers
        self.enter = nn.Conv2d(2 * channels + 1 + lips, width, 3, padding=1)
        self.body = nn.Sequential(*(Residual(width) for _ in range(4)))
        self.leave = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, latents: torch.Tensor, reference: torch.Tensor, mouth: torch.Tensor, lips: torch.Tensor) -> torch.Tensor:
        """latents [B,z,F,h,w] painted where mouth, bool [B,1,F,h,w], says so, float32; what they are there is not looked at.
        reference [B,z,1,h,w]; lips [B,F,4,2] in units of TYPICAL."""
        count, (h, w) = latents.shape[2], latents.shape[-2:]
        before = torch.cat([lips[:, :1], lips[:, :-1]], dim=1)
        told = torch.cat([lips, before], dim=-1).flatten(2).transpose(1, 2)[..., None, None].expand(-1, -1, -1, h, w)
        x = torch.cat([torch.where(mouth, 0, latents), reference.expand(-1, -1, count, -1, -1), mouth.to(latents), told], dim=1)
        made = self.leave(F.relu(self.body(self.enter(x.transpose(1, 2).flatten(0, 1)))))
        return torch.where(mouth, made.float().unflatten(0, (-1, count)).transpose(1, 2), latents)


def units_of(lips: torch.Tensor) -> torch.Tensor:
    """Gap and width [...,2] in eye distances -> units of TYPICAL."""
    mean, spread = (torch.tensor([TYPICAL[name][i] for name in READ]).to(lips) for i in range(2))
    return (lips - mean) / spread


def new_painter(config: LipsConfig, channels: int, seed: int) -> Painter:
    """A fresh one for latents of so many channels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Painter(channels, config.width)


def lips_of(clip: Encoded, path: str | Path) -> np.ndarray:
    """What the lips of a clip do. Raises InputError where it was encoded without."""
    if clip.lips is None:
        raise InputError(f"{path}: encoded by an earlier version, without lips: delete it and run the latents stage again")
    return clip.lips


def painting_loss(painter: Painter, piece: Piece, draws: Draws) -> tuple[torch.Tensor, dict[str, float]]:
    """Squared error in the mouth's cells, among surroundings with some noise, so that what few steps leave is nothing new; and the share
    of the cells' motion, their variance over time, that is missed: 1 for a mouth that stands still."""
    latents, noise = piece.batch.latents, torch.randn(piece.batch.latents.shape, generator=draws.torch).to(piece.batch.latents)
    sigma = 0.15 * torch.rand(len(noise), 1, generator=draws.torch).to(noise)
    made = painter(mix(latents, noise, sigma), piece.batch.reference, piece.mouth, units_of(piece.lips))
    error = (made - latents).square()[piece.mouth.expand_as(latents)].mean()
    moves = (latents - latents.mean(2, keepdim=True)).square()[piece.mouth.expand_as(latents)].mean()
    return error, {"missed": float(error.detach() / moves)}


def train_painter(config: LipsConfig, forcing: ForcingConfig, run: str | Path, seed: int, text: TextEncoder, default_identity: int,
                  stop_after: int | None = None) -> list[float]:
    """Train (or go on training) RUN/painter.pt; returns the losses of this call."""
    painter = new_painter(config, forcing.model["out_dim"], seed)
    source = LipsReader(config, run, forcing, text, default_identity)
    trainer = Trainer("painter", painter, config.painter, run, seed)
    return trainer.run(lambda draws: painting_loss(painter, source.pieces(draws, config.painter.batch, as_seen=True).to(trainer.device), draws), stop_after)


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class Piece:
    """lips [B,F,4,2] in eye distances; rest [B]: the width of lips that do nothing; asked bool [B,F,4]: pictures whose lips matter;
    mouth, still: bool [B,1,F,h,w] and [B,1,1,h,w]; closure [B,4F] of the lids and head [B,4F,3] in degrees as commanded; told bool
    [B,1,1,1,1]: whether the head is; clip [B,z,F,h,w]: the latents of those that it is of, 0 of the others."""

    batch: Batch
    lips: torch.Tensor
    rest: torch.Tensor
    asked: torch.Tensor
    mouth: torch.Tensor
    still: torch.Tensor
    closure: torch.Tensor
    head: torch.Tensor
    told: torch.Tensor
    clip: torch.Tensor

    def to(self, device: torch.device) -> Piece:
        """The same on another device."""
        others = ("lips", "rest", "asked", "mouth", "still", "closure", "head", "told", "clip")
        return replace(self, batch=self.batch.to(device), **{name: getattr(self, name).to(device) for name in others})


def resting_width(lips: np.ndarray) -> float:
    """Width of lips [F,4,2] that are shut, of all where they never are."""
    shut = lips[..., 1][lips[..., 0] == 0]
    return float(np.median(shut if len(shut) else lips[..., 1]))


class LipsReader(EncodedReader):
    """Batches of pieces with what their lips do."""

    def __init__(self, lips: LipsConfig, run: str | Path, config: ForcingConfig, text: TextEncoder, default_identity: int):
        super().__init__(run, replace(config, blocks=lips.blocks, silence_share=0.0), text, default_identity)
        self.lips = lips

    def pieces(self, draws: Draws, count: int, as_seen: bool = False) -> Piece:
        """`count` random pieces of clips. as_seen: all say what their pictures show, none falls silent. Raises InputError where clips were encoded
        without lips."""
        self.look_again(draws)
        rng, rows, others = draws.numpy, [], []
        for _ in range(count):
            clip = self._draw_clip(rng)
            piece = self._piece(clip.latents.shape[1], rng)
            row, lips = list(self._row(clip, rng, piece)), lips_of(clip, self.folder)[piece].copy()
            asked, rest = np.ones(lips.shape[:2], bool), resting_width(clip.lips)
            if not as_seen and rng.random() < self.lips.hush_share:
                row[1] = self._hushed(row[1], lips, asked, rest, rng)
            heard = rng.random() >= self.lips.drop_share
            told = heard and rng.random() < self.lips.head_share and clip.head is not None
            closure = float(heard) * clip.closure[piece].reshape(-1)
            head = clip.head[piece].reshape(-1, 3) if told else np.zeros((closure.size, 3), np.float32)
            shown = self._blinking(clip)[:, piece] if told else np.zeros(row[0].shape, np.float32)
            still = clip.latents.astype(np.float32).std(1).mean(0) < self.lips.still
            rows.append(row)
            others.append((lips, np.float32(rest), asked, self._mouth(clip, piece)[None], still[None, None], closure, head,
                           np.full((1, 1, 1, 1), told), shown))
        lips, rest, asked, mouth, still, closure, head, told, shown = (torch.from_numpy(np.stack(part)) for part in zip(*others))
        return Piece(self.stacked(rows), lips.float(), rest, asked, mouth, still, closure.float(), head, told, shown)

    def _hushed(self, features: torch.Tensor, lips: np.ndarray, asked: np.ndarray, rest: float, rng: np.random.Generator) -> torch.Tensor:
        """The features with silence from some picture on. From there the lips are the portrait's, shut; in place."""
        at, silent = int(rng.integers(asked.size)), self.silence.expand_as(features)
        flat, known = lips.reshape(-1, len(READ)), asked.reshape(-1)
        known[at : at + SETTLING] = False
        flat[at:] = 0, rest
        return torch.cat([features[..., :at], silent[..., at:]], dim=-1)

    def _blinking(self, clip: Encoded) -> np.ndarray:
        """Latents of a clip whose blinks go further, float32."""
        eyes = opened(clip.latents, clip.closure.any(1), clip.eyes)
        return eyes + self.lips.blink * (clip.latents - eyes)

    @staticmethod
    def _mouth(clip: Encoded, piece: slice) -> np.ndarray:
        """Cells that are the mouth's in any latent of the clip, bool [F,h,w]: a rollout holds its head elsewhere than the clip."""
        cells = (clip.weight > 1) & ~clip.eyes
        return np.broadcast_to(cells.any(0), (piece.stop - piece.start, *cells.shape[1:])).copy()


# ---------------------------------------------------------------- the stage


def eased(latents: torch.Tensor, block: int, share: float) -> torch.Tensor:
    """[B,z,F,h,w] whose blocks begin nearer to the latent before them, by `share` of the way."""
    made = latents.clone()
    made[:, :, block::block] -= share * (latents[:, :, block::block] - latents[:, :, block - 1 : -1 : block])
    return made


def truth_of(before: torch.Tensor, painter: Painter, config: LipsConfig, forcing: ForcingConfig, piece: Piece) -> torch.Tensor:
    """What the avatar as it was makes of a state, or the clip whose head is told, [B,z,F,h,w], as it shall be; see the module text."""
    rest, mean = resting_lips(piece), before.mean(2, keepdim=True)
    painted = painter(torch.lerp(mean, before, config.lively), piece.batch.reference, piece.mouth, units_of(rest + rest.new_tensor(config.gain) * (piece.lips - rest)))
    return torch.where(piece.still, mean, torch.where(piece.mouth, painted, eased(painted, forcing.block_latents, config.ease)))


def resting_lips(piece: Piece) -> torch.Tensor:
    """Gap and width [B,1,1,2] of lips that do nothing."""
    return torch.stack([torch.zeros_like(piece.rest), piece.rest], dim=-1)[:, None, None]


def exchanged(piece: Piece) -> torch.Tensor:
    """Cells [B,1,1,h,w] of clips as truth that are not as in the portrait, over the whole piece, 0..1: what a prompt is there to say. Where
    nothing is exchanged cells differ by .3. 0 where the avatar's own is the truth."""
    apart = (piece.clip.mean(2, keepdim=True) - piece.batch.reference).square().mean(1, keepdim=True)
    return piece.told * (apart - 0.5).clamp(0, 1)


def pulled(difference: torch.Tensor, before: torch.Tensor, painter: Painter, piece: Piece) -> torch.Tensor:
    """How much too far open and too wide lips are where latents are off by `difference` [B,z,F,h,w]: [B,F,2], units of TYPICAL. As far as
    it lies in the direction in which the painter opens, or widens, a mouth at rest among the same surroundings."""
    rest = units_of(resting_lips(piece)).expand_as(piece.lips)
    shut, found = painter(before, piece.batch.reference, piece.mouth, rest), []
    for i in range(len(READ)):
        more = rest.clone()
        more[..., i] += 1
        way = painter(before, piece.batch.reference, piece.mouth, more) - shut
        found.append((difference * way).sum((1, 3, 4)) / way.square().sum((1, 3, 4)).clamp_min(1e-6))
    return torch.stack(found, dim=-1)


def lips_loss(model: CausalS2V, kept: CausalS2V, painter: Painter, config: LipsConfig, forcing: ForcingConfig, piece: Piece, draws: Draws,
              sigmas: Sequence[float]) -> tuple[torch.Tensor, dict[str, float]]:
    """Squared error of a batch of rollouts, left at a level drawn for all of them, against what the avatar as it was makes of the very
    state they were in, or against the clip where the head is told, with another mouth; and metrics, of the mouth the share of what there was to
    learn that is not learned."""
    batch, blocks = piece.batch, piece.batch.latents.shape[2] // forcing.block_latents
    noise = torch.randn(batch.latents.shape, generator=draws.torch).to(batch.latents)
    distance, first = draw_position(forcing, draws.numpy)
    condition = ClipCondition(batch.features, batch.context, batch.reference, batch.motion, forcing.window_blocks, distance, first)
    sizes = model.config.cond_dim, *noise.shape[-2:]
    lids = control_planes(piece.closure, None, *sizes)
    planes = torch.where(piece.told, control_planes(piece.closure, piece.head, *sizes), lids) if config.head_share else lids
    table = exit_table(sigmas, 1 + int(draws.numpy.integers(len(sigmas) - 1)))
    velocity, left = condition.velocity(model, pose=planes), {}

    def remembered(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        left.update(x=x, sigma=sigma)
        return velocity(x, sigma)

    made = level_parallel(remembered, table, noise, blocks)
    with torch.no_grad():
        before, own = piece.clip.clone(), ~piece.told.flatten()
        if own.any():
            x, guess = left["x"][own], condition.of(own).velocity(kept, pose=lids[own])
            before[own] = x - table[-2] * guess(x, left["sigma"][own]).float()
        truth = truth_of(before, painter, config, forcing, piece)
    other = exchanged(piece)
    pull = pulled(made - truth, before, painter, piece)[piece.asked.all(-1)].square()
    error = (made - truth).square().mean(1, keepdim=True)
    dressed = ((error * other).mean(2).sum((1, 2, 3)) / other.sum((1, 2, 3, 4)).clamp_min(1)).mean()
    known = piece.asked.any(-1)[:, None, :, None, None] | ~piece.mouth  # on their way to rest lips may do what they like
    loss = (error * known * (1 + config.mouth * piece.mouth)).mean() + config.dress * dressed + (pull * pull.new_tensor(config.pull)).sum(-1).mean()
    there = (before - truth).square().mean(1, keepdim=True)
    left = (error.detach() * known)[piece.mouth].sum() / (there * known)[piece.mouth].sum().clamp_min(1e-9)
    metrics = {"kept": float(error.detach()[~piece.mouth].mean()), "mouth": float(left), "dress": float(dressed.detach()), "steps": float(len(table) - 1)}
    return loss, metrics | dict(zip(READ, pull.detach().mean(0).tolist()))


def train_lips(config: LipsConfig, forcing: ForcingConfig, sigmas: Sequence[float], run: str | Path, seed: int, text: TextEncoder,
               default_identity: int, stop_after: int | None = None) -> list[float]:
    """Train (or go on training) from RUN/START.pt, with mouths by RUN/painter.pt; returns the losses of this call. Raises WeightsError without what it starts from."""
    cast = cast_of(forcing, run, seed)
    model, kept = cast.started("lips", config.start), cast.teacher(config.start)
    painter = new_painter(config, forcing.model["out_dim"], seed)
    load_average(painter, checkpoint_path(run, "painter"))
    source = LipsReader(config, run, forcing, text, default_identity)
    trainer = Trainer("lips", model, config.loop, run, seed)
    kept.to(trainer.device)
    painter.to(trainer.device).requires_grad_(False)

    def loss_of(draws: Draws):
        piece = source.pieces(draws, config.loop.batch).to(trainer.device)
        return lips_loss(model, kept, painter, config, forcing, piece, draws, sigmas)

    return trainer.run(loss_of, stop_after, keep_casts=False)
