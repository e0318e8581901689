"""Stages `lipreader` and `lips`: a finished avatar's mouth learns to do what is said, and nothing else changes.

Regressing on clips trains a mouth to its mean, and distribution matching needs a teacher that is better than the student.
What is left is a judge that can be differentiated, as Wav2Lip and LatentSync use one: a small network that reads gap and
width of the lips off latents (`lipreader`). In `lips` it reads the avatar's own rollouts, through the level that is left at,
and pulls what it reads to what the clip's lips do. Everything outside the mouth has the avatar as it was as its truth, at
the very states the rollout went through; cells in which the clip stands still, that truth's mean over time, so that few-step
noise in a backdrop goes; and no more shall change from block to block than within one. Some clips fall silent half way: nothing rendered shows lips that come to rest after a long speech.
It is no judge of the gates: those are read off pictures, by the probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from liveavatar.conditioning.audio_features import LogMelFrontEnd
from liveavatar.conditioning.behaviour import lid_planes
from liveavatar.config import one_of
from liveavatar.core import FRAMES_PER_LATENT, ConfigError, InputError
from liveavatar.diffusion.rollout import ClipCondition, exit_table, level_parallel
from liveavatar.models.encoders import TextEncoder
from liveavatar.models.probe import TYPICAL, Residual
from liveavatar.models.s2v import CausalS2V
from liveavatar.training import shards
from liveavatar.training.casting import cast_of
from liveavatar.training.checkpoints import checkpoint_path, load_average
from liveavatar.training.forcing import Batch, Encoded, EncodedReader, ForcingConfig, draw_position, read_encoded
from liveavatar.training.levels import mix
from liveavatar.training.loop import Draws, LoopConfig, Trainer
from liveavatar.training.unpack import STAGE

READ = ("aperture", "width")
SETTLING = 6  # pictures after the last word in which nothing is asked of the lips: they are on their way to rest


@dataclass(frozen=True, kw_only=True)
class LipsConfig:
    """What is not here is as in `forcing`. start: stage whose averages are the finished avatar, lids, or avatar: an
    unpacked one."""

    loop: LoopConfig
    reader: LoopConfig
    start: str = "lids"
    blocks: int = 4  # of a clip's, a piece drawn anew each time
    weight: float = 0.3  # of what is read wrong, in units of the corpus' spread, against what is changed elsewhere
    gain: float = 1.2  # how far lips are to go over what the clip's do: what is heard of a strange voice is learned as less than it is
    warp: float = 0.12  # mel bands are moved by up to so much of their number: a voice of another size
    closed: float = 2.0  # extra weight of pictures whose lips are shut
    mouth: float = 0.1  # how much of the mouth's own cells is kept: what skin and teeth look like
    still: float = 0.09  # standard deviation over time, of the corpus' own, below which a cell of a clip stands still
    calm: float = 3.0  # how much such cells weigh, where others have 1
    seam: float = 0.03  # weight of what changes more from block to block than inside blocks: every block has noise of its own
    hush_share: float = 0.25  # of the pieces fall silent somewhere
    drop_share: float = 0.4  # of the pieces come without the control of the lids
    width: int = 96  # channels of the lip reader

    def __post_init__(self):
        one_of("lips.start", self.start, ("lids", STAGE))  # both take the control of the lids
        for name in ("hush_share", "drop_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"lips.{name}={getattr(self, name)}: must be in 0..1")
        if self.blocks < 1 or self.width < 8 or self.width % 8:
            raise ConfigError(f"lips: blocks={self.blocks}: at least 1; width={self.width}: a multiple of 8")
        if min(self.weight, self.closed, self.mouth, self.still, self.calm, self.seam, self.gain) < 0 or not 0 <= self.warp < 1:
            raise ConfigError(f"lips: weight, gain, closed, mouth, still, calm and seam must not be negative, warp={self.warp} be in 0..1")


# ---------------------------------------------------------------- what reads lips


class LipReader(nn.Module):
    """Latents and the portrait's -> gap and width of the lips in every picture, in units of the probe's TYPICAL."""

    def __init__(self, channels: int, cells: int, width: int):
        super().__init__()
        self.enter = nn.Conv2d(3 * channels, width, 3, padding=1)
        self.body = nn.Sequential(*(Residual(width) for _ in range(3)))
        self.code = nn.Conv2d(width, 16, 1)
        self.mixed = nn.Linear(16 * cells, 128)
        self.lips = nn.Linear(128, FRAMES_PER_LATENT * len(READ))

    def forward(self, latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """latents [B,z,F,h,w], reference [B,z,1,h,w] -> float32 [B,F,4,2]. A latent is read beside the one before it."""
        before = torch.cat([latents[:, :, :1], latents[:, :, :-1]], dim=2)
        x = torch.cat([latents, before, reference.expand_as(latents)], dim=1).transpose(1, 2).flatten(0, 1)
        code = F.relu(self.code(F.relu(self.body(self.enter(x))))).flatten(1)
        return self.lips(F.relu(self.mixed(code))).float().unflatten(0, (len(latents), -1)).unflatten(-1, (FRAMES_PER_LATENT, len(READ)))


def units_of(lips: torch.Tensor) -> torch.Tensor:
    """Gap and width [...,2] in eye distances -> units of TYPICAL."""
    mean, spread = (torch.tensor([TYPICAL[name][i] for name in READ]).to(lips) for i in range(2))
    return (lips - mean) / spread


def new_reader(config: LipsConfig, example: Encoded, seed: int) -> LipReader:
    """A fresh one for latents like those of a clip."""
    z, _, h, w = example.latents.shape
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LipReader(z, h * w, config.width)


def lips_of(clip: Encoded, path: str | Path) -> np.ndarray:
    """What the lips of a clip do. Raises InputError where it was encoded without."""
    if clip.lips is None:
        raise InputError(f"{path}: encoded by an earlier version, without lips: delete it and run the latents stage again")
    return clip.lips


def reading_loss(reader: LipReader, batch: Batch, lips: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, dict[str, float]]:
    """Squared error on latents with some noise, so that what few steps leave is nothing new; and metrics."""
    noise = torch.randn(batch.latents.shape, generator=draws.torch).to(batch.latents)
    sigma = 0.3 * torch.rand(len(noise), 1, generator=draws.torch).to(noise)
    error = (reader(mix(batch.latents, noise, sigma), batch.reference) - units_of(lips)).square().mean((0, 1, 2))
    return error.mean(), dict(zip(READ, error.detach().tolist()))


def train_lipreader(config: LipsConfig, forcing: ForcingConfig, run: str | Path, seed: int, text: TextEncoder, default_identity: int,
                    stop_after: int | None = None) -> list[float]:
    """Train (or go on training) RUN/lipreader.pt; returns the losses of this call."""
    source = LipsReader(config, run, forcing, text, default_identity)
    source.refresh()
    reader = new_reader(config, source[0], seed)
    trainer = Trainer("lipreader", reader, config.reader, run, seed)

    def loss_of(draws: Draws):
        piece = source.pieces(draws, config.reader.batch, hush=False).to(trainer.device)
        return reading_loss(reader, piece.batch, piece.lips, draws)

    return trainer.run(loss_of, stop_after)


@torch.no_grad()
def read_held(config: LipsConfig, run: str | Path, seed: int) -> dict[str, dict[str, float]]:
    """r and slope of what is read off the held-out clips on what is there, each clip around its own mean."""
    paths = shards.clip_paths(Path(run) / "latents", "held")
    clips = [read_encoded(path) for path in paths]
    reader = new_reader(config, clips[0], seed)
    load_average(reader, checkpoint_path(run, "lipreader"))
    told, truth = [], []
    for path, clip in zip(paths, clips):
        latents, reference = (torch.from_numpy(x)[None].float() for x in (clip.latents, clip.reference))
        pair = reader(latents, reference)[0, 1:].flatten(0, 1), units_of(torch.from_numpy(lips_of(clip, path)))[1:].flatten(0, 1)
        for rows, side in zip(pair, (told, truth)):
            side.append((rows - rows.mean(0)).numpy())
    told, truth = np.concatenate(told), np.concatenate(truth)
    return {name: {"r": round(float(np.corrcoef(told[:, i], truth[:, i])[0, 1]), 4),
                   "slope": round(float(np.polyfit(truth[:, i], told[:, i], 1)[0]), 4)} for i, name in enumerate(READ)}


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class Piece:
    """lips [B,F,4,2] in eye distances; rest [B]: the width of lips that do nothing; asked bool [B,F,4]: pictures whose lips matter;
    mouth, still: bool [B,1,F,h,w] and [B,1,1,h,w]; closure [B,4F] of the lids as commanded."""

    batch: Batch
    lips: torch.Tensor
    rest: torch.Tensor
    asked: torch.Tensor
    mouth: torch.Tensor
    still: torch.Tensor
    closure: torch.Tensor

    def to(self, device: torch.device) -> Piece:
        """The same on another device."""
        others = ("lips", "rest", "asked", "mouth", "still", "closure")
        return replace(self, batch=self.batch.to(device), **{name: getattr(self, name).to(device) for name in others})


def resting_width(lips: np.ndarray) -> float:
    """Width of lips [F,4,2] that are shut, of all where they never are."""
    shut = lips[..., 1][lips[..., 0] == 0]
    return float(np.median(shut if len(shut) else lips[..., 1]))


def warped(features: torch.Tensor, factor: float) -> torch.Tensor:
    """Log-mel features [1,Ca,T] with their mel bands stretched by `factor`, interpolated; the last one goes on above."""
    mels = LogMelFrontEnd.MELS
    at = (torch.arange(mels) / factor).clamp(max=mels - 1)
    low = at.floor().long().clamp(max=mels - 2)
    bands = features.unflatten(1, (-1, mels))
    return torch.lerp(bands[:, :, low], bands[:, :, low + 1], (at - low)[:, None]).flatten(1, 2)


class LipsReader(EncodedReader):
    """Batches of pieces with what their lips do."""

    def __init__(self, lips: LipsConfig, run: str | Path, config: ForcingConfig, text: TextEncoder, default_identity: int):
        super().__init__(run, replace(config, blocks=lips.blocks, silence_share=0.0), text, default_identity)
        self.lips = lips

    def __getitem__(self, number: int) -> Encoded:
        return self._clip(self.order[number])

    def pieces(self, draws: Draws, count: int, hush: bool = True) -> Piece:
        """`count` random pieces of clips. hush: some of them fall silent. Raises InputError where clips were encoded without lips."""
        if not self.order or draws.iteration % 50 == 0:
            self.refresh()
        rng, rows, others = draws.numpy, [], []
        for _ in range(count):
            clip = self._draw_clip(rng)
            piece = self._piece(clip.latents.shape[1], rng)
            row, lips = list(self._row(clip, rng, piece)), lips_of(clip, self.folder)[piece].copy()
            asked, rest = np.ones(lips.shape[:2], bool), resting_width(clip.lips)
            row[1] = warped(row[1], 1 + float(rng.uniform(-1, 1)) * self.lips.warp)
            if hush and rng.random() < self.lips.hush_share:
                row[1] = self._hushed(row[1], lips, asked, rest, rng)
            told = float(rng.random() >= self.lips.drop_share) if clip.closure is not None else 0.0
            closure = told * clip.closure[piece].reshape(-1) if told else np.zeros(asked.size, np.float32)
            still = clip.latents.astype(np.float32).std(1).mean(0) < self.lips.still
            rows.append(row)
            others.append((lips, np.float32(rest), asked, self._mouth(clip, piece)[None], still[None, None], closure))
        lips, rest, asked, mouth, still, closure = (torch.from_numpy(np.stack(part)) for part in zip(*others))
        return Piece(self.stacked(rows), lips.float(), rest, asked, mouth, still, closure.float())

    def _hushed(self, features: torch.Tensor, lips: np.ndarray, asked: np.ndarray, rest: float, rng: np.random.Generator) -> torch.Tensor:
        """The features with silence from some picture on. From there the lips are the portrait's, shut; in place."""
        at, silent = int(rng.integers(asked.size)), self.silence.expand_as(features)
        flat, known = lips.reshape(-1, len(READ)), asked.reshape(-1)
        known[at : at + SETTLING] = False
        flat[at:] = 0, rest
        return torch.cat([features[..., :at], silent[..., at:]], dim=-1)

    @staticmethod
    def _mouth(clip: Encoded, piece: slice) -> np.ndarray:
        """Cells that are the mouth's in any latent of the clip, bool [F,h,w]: a rollout holds its head elsewhere than the clip."""
        cells = (clip.weight > 1) & ~clip.eyes if clip.eyes is not None else clip.weight > 1
        return np.broadcast_to(cells.any(0), (piece.stop - piece.start, *cells.shape[1:])).copy()


# ---------------------------------------------------------------- the stage


def kept_truth(before: torch.Tensor, still: torch.Tensor) -> torch.Tensor:
    """What the avatar as it was makes of a state, [B,z,F,h,w]; in still cells [B,1,1,h,w] its mean over time."""
    return torch.where(still, before.mean(2, keepdim=True), before)


def seam_of(latents: torch.Tensor, block: int) -> torch.Tensor:
    """Mean squared change of [B,z,F,h,w] across borders of blocks over that inside them, which has no gradient: a scalar."""
    change = latents.diff(dim=2).square().mean((0, 1, 3, 4))
    border = torch.arange(len(change), device=change.device) % block == block - 1
    return change[border].mean() / change[~border].mean().detach().clamp_min(1e-9)


def lips_loss(model: CausalS2V, kept: CausalS2V, reader: LipReader, config: LipsConfig, forcing: ForcingConfig, piece: Piece, draws: Draws,
              sigmas: Sequence[float]) -> tuple[torch.Tensor, dict[str, float]]:
    """Of one batch of rollouts, left at a level drawn for all of them, and metrics."""
    batch, blocks = piece.batch, piece.batch.latents.shape[2] // forcing.block_latents
    noise = torch.randn(batch.latents.shape, generator=draws.torch).to(batch.latents)
    distance, first = draw_position(forcing, draws.numpy)
    condition = ClipCondition(batch.features, batch.context, batch.reference, batch.motion, forcing.window_blocks, distance, first)
    planes = lid_planes(piece.closure, model.config.cond_dim, *noise.shape[-2:])
    table = exit_table(sigmas, 1 + int(draws.numpy.integers(len(sigmas) - 1)))
    velocity, left = condition.velocity(model, pose=planes), {}

    def remembered(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        left.update(x=x, sigma=sigma)
        return velocity(x, sigma)

    made = level_parallel(remembered, table, noise, blocks)
    with torch.no_grad():
        before = left["x"] - table[-2] * condition.velocity(kept, pose=planes)(left["x"], left["sigma"]).float()
    share = torch.where(piece.mouth, config.mouth, torch.where(piece.still, config.calm, 1.0))
    changed = (made - kept_truth(before, piece.still)).square().mean(1, keepdim=True)
    rest = torch.stack([torch.zeros_like(piece.rest), piece.rest], dim=-1)[:, None, None]
    error = (reader(made, batch.reference) - units_of(rest + config.gain * (piece.lips - rest))).square()
    weight = piece.asked * (1 + config.closed * (piece.lips[..., 0] <= 0.005))
    wrong = (error * weight[..., None]).sum() / (weight.sum() * len(READ)).clamp_min(1)
    seam = seam_of(made, forcing.block_latents) if blocks > 1 else torch.zeros(())
    loss = (changed * share).mean() + config.weight * wrong + config.seam * (seam - 1).clamp_min(0)
    asked = error.detach()[piece.asked]
    metrics = {"seam": float(seam.detach()), "changed": float(changed.detach()[~piece.mouth].mean()), "mouth": float(changed.detach()[piece.mouth].mean())}
    return loss, metrics | {f"{name} {'late' if len(table) == len(sigmas) else 'early'}": float(asked[:, i].mean()) for i, name in enumerate(READ)}


def train_lips(config: LipsConfig, forcing: ForcingConfig, sigmas: Sequence[float], run: str | Path, seed: int, text: TextEncoder,
               default_identity: int, stop_after: int | None = None) -> list[float]:
    """Train (or go on training) from RUN/START.pt, read by RUN/lipreader.pt; returns the losses of this call. Raises WeightsError
    without either."""
    cast = cast_of(forcing, run, seed)
    model, kept = cast.started("lips", config.start), cast.teacher(config.start)
    source = LipsReader(config, run, forcing, text, default_identity)
    source.refresh()
    reader = new_reader(config, source[0], seed)
    load_average(reader, checkpoint_path(run, "lipreader"))
    trainer = Trainer("lips", model, config.loop, run, seed)
    kept.to(trainer.device)
    reader.to(trainer.device).requires_grad_(False)

    def loss_of(draws: Draws):
        piece = source.pieces(draws, config.loop.batch).to(trainer.device)
        return lips_loss(model, kept, reader, config, forcing, piece, draws, sigmas)

    return trainer.run(loss_of, stop_after, keep_casts=False)
