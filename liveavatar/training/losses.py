"""Losses of the stages, and the weights that say where a picture matters."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from liveavatar.diffusion.rollout import Velocity
from liveavatar.training.levels import mix, per_latent


def box_mask(boxes: np.ndarray, sides: tuple[int, int], margin: float) -> np.ndarray:
    """Boxes [T,4] (x0 y0 x1 y1, pixels), grown by margin of the shorter side -> bool [T,height,width]."""
    high, wide = (np.arange(side) + 0.5 for side in sides)
    x0, y0, x1, y1 = (boxes[:, i, None] + sign * margin * min(sides) for i, sign in enumerate((-1, -1, 1, 1)))
    columns = (wide >= x0) & (wide <= x1)
    rows = (high >= y0) & (high <= y1)
    return rows[:, :, None] & columns[:, None, :]


def detail_weight(mouth: np.ndarray, eyes: np.ndarray, side: int, detail: float) -> np.ndarray:
    """float32 [T,side,side]: 1, and 1 + detail inside mouth and eyes. mouth: [T,4]; eyes: [T,2,4]."""
    inside = box_mask(mouth, (side, side), 0.02)
    for k in range(eyes.shape[1]):
        inside |= box_mask(eyes[:, k], (side, side), 0.01)
    return (1 + detail * inside).astype(np.float32)


def gradient_error(made: torch.Tensor, video: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """L1 between spatial and temporal differences of [B,3,T,H,W] videos, weighted by [B,1,T,H,W]: keeps edges sharp."""
    difference = made - video
    total = (difference.diff(dim=-1).abs() * weight[..., 1:]).mean() + (difference.diff(dim=-2).abs() * weight[..., 1:, :]).mean()
    if video.shape[2] > 1:
        total = total + 0.5 * (difference.diff(dim=2).abs() * weight[:, :, 1:]).mean()
    return total


def motion_error(made: torch.Tensor, video: torch.Tensor, side: int = 8) -> torch.Tensor:
    """L1, a scalar, between how much patches of `side` pixels of float [B,3,T,H,W] videos, T at least 2, change from picture to picture.

    A decoder that is only asked to be near rounds motion off inside of a latent and makes up for it where the next begins, a judder of
    every fourth picture.
    """
    change, wanted = (F.avg_pool2d(x.diff(dim=2).abs().mean(1), side) for x in (made, video))
    return (change - wanted).abs().mean()


def cell_weight(mouth: np.ndarray, eyes: np.ndarray, sides: tuple[int, int], stride: int, mouth_gain: float, eye_gain: float) -> torch.Tensor:
    """Loss weight of latent cells of pictures (height, width): float32 [1 + (T-1)/4, height/stride, width/stride], 1 plus gain * covered share.

    mouth: [T,4]; eyes: [T,2,4] boxes in pixels. Latent f > 0 covers pictures 4f-3..4f.
    """
    picture = mouth_gain * box_mask(mouth, sides, 0.03).astype(np.float32)
    for k in range(eyes.shape[1]):
        picture += eye_gain * box_mask(eyes[:, k], sides, 0.015)
    cells = F.avg_pool2d(torch.from_numpy(picture)[:, None], stride)[:, 0]
    later = cells[1:].unflatten(0, (-1, 4)).mean(1)
    return 1 + torch.cat([cells[:1], later])


def face_cells(weight: torch.Tensor) -> torch.Tensor:
    """Where a face is: cells of mouth and eyes, whose weight [B,1,F,h,w] is above 1, bool of that shape. Not in the
    lowest row, which may weigh more for its shirt."""
    face = weight > 1
    face[..., -1, :] = False
    return face


def forcing_loss(velocity: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean of |v - (eps - x0)|^2 (training.md 2.1). All [B,16,F,h,w]; weight broadcasts, mean of it need not be 1."""
    error = (velocity.float() - (noise - latents)).square()
    return (error * weight).sum() / weight.expand_as(error).sum()


# ---------------------------------------------------------------- distribution matching (training.md 2.5)

def clean_estimate(velocity: Velocity, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x - sigma v in fp32: what the model takes x [B,C,F,h,w] for. sigma: [B,N]."""
    return x.float() - per_latent(sigma, x) * velocity(x, sigma).float()


@torch.no_grad()
def dmd_gradient(made: torch.Tensor, real: Velocity, fake: Velocity, tau: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Direction [B,C,F,h,w] in which generated latents move away from the critic's and towards the teacher's estimate.

    The difference of the two clean estimates of `made` noised to tau [B,N], divided per clip by the mean
    |made - real estimate|, so that no clip and no tau outweighs another. real: guided; fake: never.
    """
    x = mix(made, noise, tau)
    towards = clean_estimate(real, x, tau)
    size = (made - towards).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return torch.nan_to_num((clean_estimate(fake, x, tau) - towards) / size)


def matching_loss(made: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """1/2 mean |X - sg(X - g)|^2: a scalar whose gradient at X is g / numel."""
    return 0.5 * (made.float() - (made.float() - gradient).detach()).square().mean()


def critic_loss(fake: Velocity, made: torch.Tensor, tau: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Flow matching on generated latents: mean |v - (eps - X)|^2 at tau, no weight."""
    return (fake(mix(made, noise, tau), tau).float() - (noise - made)).square().mean()
