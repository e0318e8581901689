"""Noise-level laws: which sigma every block of a training clip gets (training.md 2.0, 2.1, 2.2, 2.5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from liveavatar.diffusion.schedule import shifted

SCORE_RANGE = (0.02, 0.98)  # of tau: at the ends a score says nothing or is all noise


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


def score_levels(rng: np.random.Generator, batch: int, blocks: int, shift: float) -> torch.Tensor:
    """float32 tau [batch, blocks] at which scores are compared: one per clip, uniform, shifted, clamped to SCORE_RANGE."""
    tau = shifted_levels(rng, (batch, 1), shift).clip(*SCORE_RANGE)
    return torch.from_numpy(tau).float().expand(-1, blocks)


def student_table(steps: int, shift: float) -> tuple[float, ...]:
    """steps + 1 levels from 1 to 0, evenly spaced and shifted once: (1, .9375, .8333, .625, 0) for 4 and 5. Exact, never bf16."""
    return tuple(shifted(1 - i / steps, shift) for i in range(steps + 1))


def teacher_grid(table: Sequence[float], pieces: int, shift: float) -> tuple[float, ...]:
    """`table` with every interval cut into `pieces`, evenly before the shift; contains the table's own values exactly."""
    even = [s / (shift - (shift - 1) * s) for s in table]
    grid = [(shifted(a + (b - a) * i / pieces, shift) if i else s) for s, a, b in zip(table, even, even[1:]) for i in range(pieces)]
    return (*grid, table[-1])


def per_latent(sigma: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """sigma [B,N] of blocks as [B,1,F,1,1], to go with latents [B,C,F,h,w]."""
    return sigma.to(latents.device).repeat_interleave(latents.shape[2] // sigma.shape[1], dim=1)[:, None, :, None, None]


def mix(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(1 - sigma) x0 + sigma eps. latents, noise: [B,C,F,h,w]; sigma: [B,N], each for F/N latents."""
    return torch.lerp(latents, noise, per_latent(sigma, latents))
