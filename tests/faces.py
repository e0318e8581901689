"""Faces without pictures: mesh points whose lips, lids and head do exactly what a test says."""

from __future__ import annotations

import numpy as np

from liveavatar.conditioning import face
from liveavatar.evaluation.landmarks import LIPS, STABLE, Track

IOD = 100.0  # pixels


def made_up(times, gap=0.05, width=0.6, lids=0.12, at=(200.0, 200.0)) -> Track:
    """A Track with these gaps, widths and lid openings (numbers or [T], in eye distances), the head at `at` ([2] or [T, 2])."""
    times = np.asarray(times, float)
    t = len(times)
    rng = np.random.default_rng(0)
    points = np.repeat(rng.uniform(-60, 60, (1, 468, 3)), t, axis=0)
    points[:, face.EYE_RIGHT], points[:, face.EYE_LEFT] = (-IOD / 2, 0, 0), (IOD / 2, 0, 0)
    for pair, size, y in ((face.INNER_LIPS, gap, 60), (face.LIDS_RIGHT, lids, 0), (face.LIDS_LEFT, lids, 0)):
        for index, sign in zip(pair, (-0.5, 0.5), strict=True):
            points[:, index, 0] = 0
            points[:, index, 1] = y + sign * IOD * np.asarray(size)
    for index, sign in zip(face.MOUTH_CORNERS, (-0.5, 0.5), strict=True):
        points[:, index, :2] = np.stack([sign * IOD * np.broadcast_to(width, t), np.full(t, 60.0)], 1)
    points[..., :2] += np.asarray(at).reshape(-1, 1, 2)
    return Track(times, points.astype(np.float32), np.ones(t, int))


__all__ = ["IOD", "LIPS", "STABLE", "made_up"]
