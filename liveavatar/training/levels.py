"""Noise-level laws: which sigma every block of a training clip gets (training.md 2.1)."""

from __future__ import annotations

import numpy as np
import torch

from liveavatar.diffusion.schedule import shifted


def shifted_levels(rng: np.random.Generator, shape: tuple[int, ...], shift: float) -> np.ndarray:
    """sigma in (0, 1]: uniform, then moved towards noise by `shift`."""
    return shifted(1.0 - rng.random(shape), shift)


def clip_levels(rng: np.random.Generator, batch: int, blocks: int, *, levels: tuple[float, ...], same_share: float,
                table_share: float, shift: float) -> torch.Tensor:
    """float32 sigma [batch, blocks].

    A share `same_share` of the clips has one level in all blocks, as at inference, where every step
    attends to history of its own level (timestep forcing); `table_share` of those take it from
    `levels`, the others from the shifted law. The remaining clips draw every block on its own.
    """
    sigma = shifted_levels(rng, (batch, blocks), shift)
    for row in sigma:
        if rng.random() < same_share:
            row[:] = levels[int(rng.integers(len(levels)))] if rng.random() < table_share else row[0]
    return torch.from_numpy(sigma).float()


def mix(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(1 - sigma) x0 + sigma eps. latents, noise: [B,C,F,h,w]; sigma: [B,N], each for F/N latents."""
    per_latent = sigma.repeat_interleave(latents.shape[2] // sigma.shape[1], dim=1)[:, None, :, None, None]
    return torch.lerp(latents, noise, per_latent)
