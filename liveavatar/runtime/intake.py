"""What people give: PCM in chunks of any size, type and rate -> float32 16 kHz mono; and whole numbers."""

from __future__ import annotations

import operator
from fractions import Fraction

import av
import numpy as np

from liveavatar.conditioning.behaviour import AXES
from liveavatar.config import MOST_HEAD_POSE
from liveavatar.core import SAMPLE_RATE, InputError


class Intake:
    """Streaming conversion of one session's audio. Resampled whole: where chunks are cut leaves no trace.

    target: Hz of what comes out.
    A change of rate, and `flush`, end a run: what the resampler still holds comes out and it starts anew.
    """

    def __init__(self, target: int = SAMPLE_RATE):
        self.target = target
        self._rate, self._resampler, self._position = target, None, 0

    def push(self, pcm, rate: int) -> np.ndarray:
        """pcm: [n] float in -1..1 or int16 at `rate` Hz -> float32 [m] at the target's. Raises InputError."""
        if not isinstance(rate, int) or not 1000 <= rate <= 768_000:
            raise InputError(f"audio rate {rate!r}: must be 1000 to 768000 Hz")
        array, before = as_pcm(pcm), np.zeros(0, np.float32)
        if rate != self._rate:
            before, self._rate = self.flush(), rate
        if rate == self.target or not len(array):
            return np.concatenate([before, array])
        if self._resampler is None:
            self._resampler = av.AudioResampler(format="flt", layout="mono", rate=self.target)
        return np.concatenate([before, self._through(self._frame(array))])

    def flush(self) -> np.ndarray:
        """The end of the run, float32 [m]."""
        rest = self._through(None) if self._resampler is not None else np.zeros(0, np.float32)
        self._resampler, self._position = None, 0
        return rest

    def _frame(self, array: np.ndarray) -> av.AudioFrame:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(array)[None], format="flt", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = self._rate, Fraction(1, self._rate), self._position
        self._position += len(array)
        return frame

    def _through(self, frame: av.AudioFrame | None) -> np.ndarray:
        pieces = [out.to_ndarray()[0] for out in self._resampler.resample(frame)]
        return np.concatenate([np.zeros(0, np.float32), *pieces])


def as_pcm(pcm) -> np.ndarray:
    """float32 [n] in -1..1 from what people push: float or int16, numpy or torch. Raises InputError."""
    array = np.asarray(pcm)
    if array.ndim != 1:
        raise InputError(f"audio of shape {list(array.shape)}: push mono PCM, one axis")
    if array.dtype == np.int16:
        return array.astype(np.float32) / 32768.0
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"audio of type {array.dtype}: push float in -1..1 or int16")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError("audio holds NaN or infinite samples")
    return array


def as_poses(poses) -> np.ndarray:
    """float32 [n,3] degrees from what people push, numpy, torch or lists. Raises InputError."""
    try:
        array = np.asarray(poses, np.float32)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.ndim != 2 or array.shape[1] != len(AXES):
        raise InputError(f"poses of a head: give [n,3] numbers, yaw, pitch and roll of each picture, not {type(poses).__name__} {list(np.shape(array))}")
    if not (np.abs(array) <= MOST_HEAD_POSE).all():
        raise InputError(f"poses of a head: every angle must be {-MOST_HEAD_POSE:g}..{MOST_HEAD_POSE:g} degrees")
    return array


def whole(seed) -> int:
    """seed as an int. Raises InputError: what JSON cannot say would stop the chain for everybody."""
    try:
        return operator.index(seed)
    except TypeError:
        raise InputError(f"seed {seed!r}: must be a whole number") from None
