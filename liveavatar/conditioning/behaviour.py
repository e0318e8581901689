"""What a face does beside speaking (motion.md section 8): blinks, given to the transformer and not guessed by it.

Blinks are rare and nothing that a few-step student hears or reads asks for them, so it never makes one (training.md 2.5).
They enter as closure of the lids through the driving-video input that S2V has. A stream is cut in cells of CELL pictures
with one blink in each, anywhere but in the rest at its end; a blink is a function of (seed, session, cell) and nothing
else, so that any block can be computed alone, again after a restart, and for ever.
"""

from __future__ import annotations

import numpy as np
import torch

from liveavatar.core import FPS, FRAMES_PER_LATENT, ConfigError
from liveavatar.diffusion.denoise import draw_seed

LIDS = {"kind": "lids"}  # the control section of a checkpoint folder whose transformer takes lid_planes
CLOSE, HOLD, OPEN = (seconds * FPS for seconds in (0.06, 0.04, 0.12))  # pictures; some picture always falls into HOLD
CELL = 90  # pictures, 3.6 s: the mean from blink to blink
REST = 0.5 * FPS  # pictures at least between two blinks
SMALLEST = 0.1  # closure that a gaze makes is none
STRENGTH = 4.0  # of shut lids in the planes: four numbers in thousands are to be heard soon


def blink_onset(seed: int, session: str, cell: int) -> float:
    """Pictures from the beginning of a cell to when its blink begins."""
    return draw_seed("blink", seed, session, cell) / 2**63 * (CELL - REST - CLOSE - HOLD - OPEN)


def lid_closure(seed: int, session: str, first: int, count: int) -> np.ndarray:
    """float32 [count] of pictures `first` and on: 0 open, 1 shut. first: any 64-bit number."""
    numbers = range(first, first + count)
    onsets = {cell: blink_onset(seed, session, cell) for cell in {number // CELL for number in numbers}}
    at = np.array([number % CELL - onsets[number // CELL] for number in numbers])
    return np.clip(np.minimum(at / CLOSE, (CLOSE + HOLD + OPEN - at) / OPEN), 0, 1).astype(np.float32)


def closure_of(lid: np.ndarray) -> np.ndarray:
    """float32 [T]: how far the lids of a clip are closed. lid [T]: their opening, of one person, in any unit."""
    shut = 1 - lid / max(float(np.quantile(lid, 0.9)), 1e-6)
    return np.where(shut < SMALLEST, 0, np.clip(shut, 0, 1)).astype(np.float32)


def lid_planes(closure: torch.Tensor, channels: int, h: int, w: int) -> torch.Tensor:
    """Closure [..., 4F] of the pictures of F latents -> what the driving-video input takes, [..., channels, F, h, w]: a plane per
    picture of a latent, the other channels 0. Open lids are all zeros, which is what the input is without a control.
    Raises ConfigError for fewer channels than pictures."""
    if channels < FRAMES_PER_LATENT:
        raise ConfigError(f"cond_dim={channels}: lids need {FRAMES_PER_LATENT} channels")
    by_picture = STRENGTH * closure.unflatten(-1, (-1, FRAMES_PER_LATENT)).transpose(-1, -2)
    planes = torch.nn.functional.pad(by_picture, (0, 0, 0, channels - FRAMES_PER_LATENT))
    return planes[..., None, None].expand(*planes.shape, h, w)
