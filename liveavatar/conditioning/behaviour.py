"""What a face does beside speaking (motion.md section 8): blinks and motion of the head, given to the transformer and not guessed by it.

Blinks are rare and nothing that a few-step student hears or reads asks for them, so it never makes one (training.md 2.5);
and of the ways a head may move it takes the mean. Both enter through the driving-video input that S2V has (training.md 5.6), blinks as
closure of the lids. A stream is cut in cells of CELL pictures with one blink in each, anywhere but in the rest at its end. A head drifts as
on a spring that is pushed at random, once every PUSH pictures. Blinks and pushes are functions of (seed, session, number) and nothing
else, so that any block can be computed alone, again after a restart, and for ever.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import torch

from liveavatar.core import FPS, FRAMES_PER_LATENT, ConfigError
from liveavatar.diffusion.denoise import draw_seed

LIDS = {"kind": "lids"}  # the control section of a checkpoint folder whose transformer takes control_planes of lids alone
LIDS_AND_HEAD = {"kind": "lids_head"}  # and of the head's pose too
CLOSE, HOLD, OPEN = (seconds * FPS for seconds in (0.06, 0.04, 0.12))  # pictures; some picture always falls into HOLD
CELL = 90  # pictures, 3.6 s: the mean from blink to blink
REST = 0.5 * FPS  # pictures at least between two blinks
SMALLEST = 0.1  # closure that a gaze makes is none
STRENGTH = 4.0  # of shut lids in the planes: four numbers in thousands are to be heard soon
AXES = ("yaw", "pitch", "roll")
HEAD_SPREAD = (3.0, 2.0, 1.2)  # degrees, of each axis: that of the corpus (training/synth/director.py)
HEAD_STRENGTH = (2.0, 2.0, 4.0)  # of one spread in the planes; a roll moves the fewest pixels and is heard last
TOLD = 2.0  # in the plane that says that the head is told
PUSH = 2  # pictures from one push to the next
FADE, ONSET = (seconds * FPS for seconds in (1.4, 0.16))  # time constant of a push, and the spread of its onset: a head has mass
FELT = np.array([math.exp(-t / FADE) * NormalDist(3 * ONSET, ONSET).cdf(t) for t in range(int(8 * FADE))])  # of a push so many pictures later
LID_PLANES, CONTROL_PLANES = FRAMES_PER_LATENT, FRAMES_PER_LATENT * (1 + len(AXES)) + 1


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


def head_pose(seed: int, session: str, first: int, count: int, spread: tuple[float, float, float] = HEAD_SPREAD) -> np.ndarray:
    """float32 [count,3] degrees of yaw, pitch and roll of pictures `first` and on; signs as in training/synth/director.py. spread: of
    a long stream, degrees. first: any 64-bit number."""
    numbers = range((first - len(FELT)) // PUSH, (first + count - 1) // PUSH + 1)
    pushes = np.array([[_normal("head", axis, seed, session, number) for axis in AXES] for number in numbers])
    since = first - PUSH * numbers.start + np.arange(count)[:, None] - PUSH * np.arange(len(numbers))
    felt = np.where((since >= 0) & (since < len(FELT)), FELT[since % len(FELT)], 0) / np.linalg.norm(FELT[::PUSH])
    return (felt @ pushes * spread).astype(np.float32)


def _normal(*key: object) -> float:
    """A normally distributed number that is a pure function of `key`."""
    return NormalDist().inv_cdf((draw_seed(*key) + 0.5) / 2**63)


def control_planes(closure: torch.Tensor | None, head: torch.Tensor | None, channels: int, h: int, w: int) -> torch.Tensor | None:
    """Closure [...,4F] of the lids, None: open, and pose [...,4F,3] of the head in degrees, None: not told, of the pictures of F latents ->
    what the driving-video input takes, [...,channels,F,h,w]: planes per picture of a latent, one for the lids and three for the head, and one
    that says that the head is told; the other channels 0. Open lids without a head are all zeros, which is what the input is without a
    control; None where neither is given. Raises ConfigError for too few channels."""
    if closure is None:
        if head is None:
            return None
        closure = head.new_zeros(head.shape[:-1])
    needed = LID_PLANES if head is None else CONTROL_PLANES
    if channels < needed:
        raise ConfigError(f"cond_dim={channels}: {'lids need' if head is None else 'lids and head need'} {needed} planes")
    planes = STRENGTH * closure.unflatten(-1, (-1, FRAMES_PER_LATENT)).transpose(-1, -2)
    if head is not None:
        scaled = head * head.new_tensor(HEAD_STRENGTH) / head.new_tensor(HEAD_SPREAD)
        told = scaled.unflatten(-2, (-1, FRAMES_PER_LATENT)).flatten(-2).transpose(-1, -2)
        planes = torch.cat([planes, told, torch.full_like(told[..., :1, :], TOLD)], dim=-2)
    planes = torch.nn.functional.pad(planes, (0, 0, 0, channels - needed))
    return planes[..., None, None].expand(*planes.shape, h, w)
