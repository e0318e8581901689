"""Noise levels of the sampler (model.md section 13)."""

from __future__ import annotations

import torch

TRAIN_TIMESTEPS = 1000


def shifted(sigma: float, shift: float) -> float:
    """shift * s / (1 + (shift - 1) * s): moves a level towards noise; works on tensors too."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigmas(steps: int, shift: float = 3.0) -> list[float]:
    """steps + 1 noise levels from 1 to 0, as float32 values.

    The shift acts twice, like diffusers' FlowMatchEulerDiscreteScheduler(shift).set_timesteps(n): the
    lowest level is shifted once, then the even spacing above it is shifted again.
    """
    lowest = shifted(1.0 / TRAIN_TIMESTEPS, shift)
    spaced = torch.linspace(1.0, lowest, steps, dtype=torch.float64)
    return [float(s) for s in shifted(spaced, shift).float()] + [0.0]


def timesteps(steps: int, shift: float = 3.0) -> list[float]:
    """Timesteps 1000 * sigma of the steps, as float32 values; what the transformer is given."""
    return timesteps_of(sigmas(steps, shift))


def timesteps_of(levels: list[float]) -> list[float]:
    """Timesteps of a table of levels that ends in 0."""
    return [float(t) for t in torch.tensor(levels[:-1], dtype=torch.float32) * TRAIN_TIMESTEPS]
