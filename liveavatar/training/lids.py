"""Stage `lids`: a finished avatar learns to close its eyes when it is told to (training.md 5.6), and nothing else changes.

Of the clips it learns only what a blink changes: the difference, in the cells of the eyes, between the latents of a blink and
open eyes before and after it. The truth is that difference on top of what the avatar itself makes of the open eyes; without
a difference, or without the control, it is what the avatar makes. What the codec loses of a blink, which is shorter than two
of its latents, is put back by going further the same way (`gain`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from liveavatar.conditioning.behaviour import LID_PLANES, control_planes
from liveavatar.core import ConfigError, InputError
from liveavatar.diffusion.rollout import ClipCondition
from liveavatar.models.encoders import TextEncoder
from liveavatar.models.s2v import CausalS2V
from liveavatar.training import losses
from liveavatar.training.casting import cast_of
from liveavatar.training.forcing import Batch, Encoded, EncodedReader, ForcingConfig, draw_position
from liveavatar.training.levels import mix
from liveavatar.training.loop import Draws, LoopConfig, Trainer


@dataclass(frozen=True, kw_only=True)
class LidsConfig:
    """What is not here is as in `forcing`. start: stage whose averages are the finished avatar, RUN/START.pt."""

    loop: LoopConfig
    start: str = "chosen"
    blocks: int = 1  # of a clip's, a piece drawn anew each time
    blink_share: float = 0.9  # of the pieces have a blink in them, as far as the clips do
    drop_share: float = 0.15  # of the pieces come without the control
    gain: float = 1.7  # how far a blink goes in the latents, over what the codec makes of it
    weight: float = 10.0  # extra loss weight of the cells of a blink

    def __post_init__(self):
        for name in ("blink_share", "drop_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"lids.{name}={getattr(self, name)}: must be in 0..1")
        if self.blocks < 1 or self.gain < 1 or self.weight < 0:
            raise ConfigError(f"lids: blocks={self.blocks}, gain={self.gain}: at least 1; weight={self.weight}: at least 0")


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class Piece:
    """A batch with open eyes and its control. closure: float32 [B,4F] as commanded; blink: float32 [B,z,F,h,w], what it adds to
    the latents."""

    batch: Batch
    closure: torch.Tensor
    blink: torch.Tensor

    def to(self, device: torch.device) -> Piece:
        """The same on another device."""
        return Piece(self.batch.to(device), self.closure.to(device), self.blink.to(device))


def opened(latents: np.ndarray, closed: np.ndarray, eyes: np.ndarray) -> np.ndarray:
    """Latents [z,F,h,w] whose eyes never shut: in a blink they are the mean of those before and after it. closed: bool [F]; eyes:
    bool [F,h,w]. float32."""
    made, at = latents.astype(np.float32), np.flatnonzero(~closed)
    for f in np.flatnonzero(closed) if len(at) else ():
        after = np.searchsorted(at, f)
        between = made[:, [at[max(0, after - 1)], at[min(len(at) - 1, after)]]].mean(1)
        made[:, f] = np.where(eyes[f], between, made[:, f])
    return made


class LidsReader(EncodedReader):
    """Batches in which most pieces have a blink."""

    def __init__(self, lids: LidsConfig, run: str | Path, config: ForcingConfig, text: TextEncoder, default_identity: int):
        super().__init__(run, replace(config, blocks=lids.blocks), text, default_identity)
        self.lids = lids

    def pieces(self, draws: Draws, count: int) -> Piece:
        """`count` random pieces of clips. Raises InputError where clips were encoded without their lids."""
        self.look_again(draws)
        rows, controls, rng = [], [], draws.numpy
        for _ in range(count):
            clip = self._draw_clip(rng)
            if clip.closure is None:
                raise InputError(f"{self.folder}: encoded by an earlier version, without lids: delete it and run the latents stage again")
            eyes = opened(clip.latents, clip.closure.any(1), clip.eyes)
            piece = self._piece_with_blink(clip, rng)
            told = float(rng.random() >= self.lids.drop_share)
            rows.append(self._row(replace(clip, latents=eyes), rng, piece))
            controls.append((told * clip.closure[piece].reshape(-1), told * self.lids.gain * (clip.latents - eyes)[:, piece]))
        closure, blink = (torch.from_numpy(np.stack(part)).float() for part in zip(*controls))
        return Piece(self.stacked(rows), closure, blink)

    def _piece_with_blink(self, clip: Encoded, rng: np.random.Generator) -> slice:
        """Of a few pieces drawn the first with a blink; any where none has one, or none is wanted."""
        tries = 8 if rng.random() < self.lids.blink_share else 1
        for _ in range(tries):
            piece = self._piece(len(clip.closure), rng)
            if clip.closure[piece].max() > 0.5:
                break
        return piece


# ---------------------------------------------------------------- the stage


def lids_loss(model: CausalS2V, kept: CausalS2V, config: LidsConfig, forcing: ForcingConfig, piece: Piece, draws: Draws,
              levels: Sequence[float]) -> tuple[torch.Tensor, dict[str, float]]:
    """Flow-matching loss at the sampler's levels (one in all blocks of a piece, as at inference), and metrics. kept: the avatar as it was."""
    batch, rng = piece.batch, draws.numpy
    noise = torch.randn(batch.latents.shape, generator=draws.torch).to(batch.latents)
    sigma = torch.from_numpy(rng.choice(levels, size=(len(noise), 1))).float().expand(-1, config.blocks).contiguous()
    distance, first = draw_position(forcing, rng)
    condition = ClipCondition(batch.features, batch.context, batch.reference, batch.motion, forcing.window_blocks, distance, first)
    with torch.no_grad():
        truth = noise - condition.velocity(kept)(mix(batch.latents, noise, sigma), sigma) + piece.blink
    planes = control_planes(piece.closure, None, model.config.cond_dim, *noise.shape[-2:])
    velocity = condition.velocity(model, pose=planes)(mix(batch.latents + piece.blink, noise, sigma), sigma)
    blink = (piece.blink != 0).any(1, keepdim=True)
    loss = losses.forcing_loss(velocity, truth, noise, 1 + config.weight * blink)
    error = (velocity.detach() - (noise - truth)).square().mean(1, keepdim=True)
    left = error[blink].sum() / piece.blink.square().mean(1, keepdim=True).sum().clamp_min(1e-9)
    return loss, {"kept": float(error[~blink].mean()), "blink": float(left)}  # the share of a blink that is missing: 1 before training


@torch.no_grad()
def only_lids(model: CausalS2V) -> None:
    """Leave out what a transformer that was never told of more than lids makes of the other planes: random numbers."""
    model.cond_encoder.weight[:, LID_PLANES:] = 0


def only_control(model: torch.nn.Module) -> None:
    """Leave trainable what brings the control in and what makes pictures of it: the input's convolution and the feed-forward layers."""
    for name, p in model.named_parameters():
        p.requires_grad_(name == "cond_encoder.weight" or ".ffn." in name)


def train_lids(config: LidsConfig, forcing: ForcingConfig, sigmas: Sequence[float], run: str | Path, seed: int, text: TextEncoder,
               default_identity: int, stop_after: int | None = None) -> list[float]:
    """Train (or go on training) from RUN/START.pt; returns the losses of this call. Raises WeightsError without it."""
    cast = cast_of(forcing, run, seed)
    model, kept = cast.started("lids", config.start), cast.teacher(config.start)
    only_lids(model)
    only_control(model)
    reader = LidsReader(config, run, forcing, text, default_identity)
    trainer = Trainer("lids", model, config.loop, run, seed)
    kept.to(trainer.device)

    def loss_of(draws: Draws):
        piece = reader.pieces(draws, config.loop.batch).to(trainer.device)
        return lids_loss(model, kept, config, forcing, piece, draws, list(sigmas[:-1]))

    return trainer.run(loss_of, stop_after)
