"""How a suite's speech reaches the microphone: every phone stays where it was."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from liveavatar.core import SAMPLE_RATE

SIGNAL_TO_NOISE = (12.0, 20.0)  # dB; at 8 the judge's own aligner loses the words
ECHO_SECONDS, ECHO_SHARE = (0.4, 0.9), (0.5, 0.8)  # until the room is 60 dB quieter; energy of the echo in that of the direct sound
WHISPER = -45.0  # dB of full scale
FAST = 0.65  # of the usual duration of phones: as slow a voice as there is then still talks faster than usual


def noise(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As much hum and rush, half and half, as the generator says."""
    hiss = rng.normal(size=len(pcm))
    pink = np.fft.irfft(np.fft.rfft(hiss) / np.sqrt(np.arange(len(pcm) // 2 + 1) + 1.0), len(pcm))
    both = hiss / _level(hiss) + pink / _level(pink)
    return pcm + both * _level(pcm) / _level(both) * 10 ** (-rng.uniform(*SIGNAL_TO_NOISE) / 20)


def reverb(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A room, as loud as before; the direct sound stays where it was."""
    seconds = rng.uniform(*ECHO_SECONDS)
    tail = rng.normal(size=round(seconds * SAMPLE_RATE))
    tail *= np.exp(-6.9 * np.arange(len(tail)) / len(tail))
    room = tail * np.sqrt(rng.uniform(*ECHO_SHARE) / (tail**2).sum())
    room[0] = 1.0
    size = len(pcm) + len(room)
    wet = np.fft.irfft(np.fft.rfft(pcm, size) * np.fft.rfft(room, size), size)[: len(pcm)]
    return wet * _level(pcm) / _level(wet)


def quiet(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """At the level of a whisper."""
    return pcm / _level(pcm) * 10 ** (WHISPER / 20)


def as_is(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return pcm


SOUNDS: dict[str, Callable] = {"clean": as_is, "noise": noise, "reverb": reverb, "quiet": quiet, "fast": as_is}  # fast: spoken so


def heard(pcm: np.ndarray, kind: str, seed: int) -> np.ndarray:
    """float32 [n] as it comes through one of SOUNDS."""
    return np.clip(SOUNDS[kind](pcm, np.random.default_rng([seed, 19])), -1, 1).astype(np.float32)


def _level(pcm: np.ndarray) -> float:
    return float(np.sqrt(np.mean(pcm**2)) + 1e-9)
