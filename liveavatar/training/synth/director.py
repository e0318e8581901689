"""Turns phones and audio into the motion of a face: lips, head, gaze, lids, brows.

The PCM clock is the master: row i of a track is the face at i/fps seconds, lag 0.
Signs, those of head.py: yaw + turns the nose to the picture's right, pitch + lifts it, roll + tilts
the head clockwise in the picture; gaze (x right, y up) is relative to the head. The eyeLook units repeat the gaze for
heads that have no eyeballs to turn: a renderer uses one of the two. Left and Right units are the
person's own, so a gaze to the picture's right is the person's left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from liveavatar.conditioning.phones import VOWELS, Utterance
from liveavatar.conditioning.visemes import ARKIT_UNITS, arkit, articulate, loudness, ramp, smooth, viseme_table
from liveavatar.core import SAMPLE_RATE


@dataclass(frozen=True)
class Track:
    units: np.ndarray  # [T, 52] in the order of ARKIT_UNITS
    articulators: np.ndarray  # [T, 8]
    pose: np.ndarray  # [T, 3] degrees: yaw, pitch, roll
    translation: np.ndarray  # [T, 2] fraction of the picture: right, down
    gaze: np.ndarray  # [T, 2] degrees: right, up


@dataclass(frozen=True)
class Behaviour:
    """How much everything but the lips moves. Smaller than life: the first model is small."""

    head_sigma: tuple[float, float, float] = (3.0, 2.0, 1.2)
    head_tau: float = 1.4
    nod: float = 1.6
    sway: float = 0.006
    gaze_sigma: tuple[float, float] = (4.0, 2.0)
    fixation: tuple[float, float] = (0.6, 2.2)
    blink_every: float = 3.4
    blink_refractory: float = 1.2
    blink_seconds: tuple[float, float] = (0.12, 0.20)
    brow: float = 0.45
    idle_smile: tuple[float, float] = (0.0, 0.12)


def _grid(frames: int, fps: int, rate: float) -> np.ndarray:
    """Times of the fine grid (sample k is exactly k/rate), a margin past the last frame."""
    return np.arange(int(np.ceil(frames / fps * rate)) + 2) / rate


def pitch(pcm: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Fundamental in Hz by autocorrelation, 0 where unvoiced."""
    n = 640
    x = np.pad(np.asarray(pcm, float), (n, n))
    at = np.clip(np.round(times * SAMPLE_RATE).astype(int) + n // 2, 0, len(x) - n)
    f = x[at[:, None] + np.arange(n)] * np.hanning(n)
    ac = np.fft.irfft(np.abs(np.fft.rfft(f, 2 * n)) ** 2)[:, :n]
    lo, hi = SAMPLE_RATE // 350, SAMPLE_RATE // 65
    best = lo + np.argmax(ac[:, lo:hi], axis=1)
    strong = ac[np.arange(len(at)), best] > 0.4 * ac[:, 0]
    return np.where(strong & (ac[:, 0] > 0.02), SAMPLE_RATE / best, 0.0)


def _ou(rng, n, dt, sigma, tau):
    """Stationary Ornstein-Uhlenbeck path, then smoothed: a head has mass."""
    warm = int(1.0 / dt)
    a = np.exp(-dt / tau)
    e = rng.normal(size=(n + warm, len(sigma))) * np.sqrt(1 - a * a)
    x = np.empty_like(e)
    x[0] = rng.normal(size=len(sigma))
    for k in range(1, len(x)):
        x[k] = a * x[k - 1] + e[k]
    width = 0.16
    x = smooth(x, width / dt)[warm // 2:warm // 2 + n]
    # OU variance kept by the Gaussian: exp((w/tau)^2) * erfc(w/tau), with erfc expanded for small w/tau
    r = width / tau
    return x * np.asarray(sigma) / np.sqrt(max(1 - 2 * r / np.sqrt(np.pi) + r * r, 0.3))


def blink_times(rng: np.random.Generator, seconds: float, behaviour: Behaviour = Behaviour()):
    """(closed at, length) of every blink: a Poisson process with a refractory pause."""
    b, out = behaviour, []
    t = rng.exponential(b.blink_every - b.blink_refractory)
    while t < seconds:
        out.append((t, rng.uniform(*b.blink_seconds)))
        t += b.blink_refractory + rng.exponential(b.blink_every - b.blink_refractory)
    return out


def _lids(rng, times, fps, b):
    lid = np.zeros(len(times))
    for t, length in blink_times(rng, times[-1], b):
        t = np.round(t * fps) / fps  # the closed moment falls on a frame and is seen
        down, up = 0.32 * length, 0.68 * length
        x = times - t
        shape = np.where(x < 0, ramp(x, -down, 0), 1 - ramp(x, 0, up))
        lid = np.maximum(lid, shape)
    return lid


def _saccades(rng, times, b):
    """Fixations joined by 30-50 ms jumps; most look at the camera."""
    gaze, at = np.zeros((len(times), 2)), 0.0
    here = rng.normal(size=2) * b.gaze_sigma * 0.3
    gaze[:] = here
    while True:
        at += rng.uniform(*b.fixation)
        if at >= times[-1]:
            return gaze
        there = rng.normal(size=2) * b.gaze_sigma * (0.25 if rng.random() < 0.65 else 1.5)
        length = 0.025 + 0.0025 * np.hypot(*(there - here))
        gaze += ramp(times, at, at + length)[:, None] * (there - here)
        here = there


def _stresses(utterance: Utterance) -> list[tuple[float, float]]:
    """(time, strength 0..1) of stressed syllables: long loud vowels, 0.35 s apart or more."""
    vowels = [p for p in utterance.phones if p.name in VOWELS]
    if not vowels:
        return []
    mid = np.array([(p.start + p.end) / 2 for p in vowels])
    score = loudness(utterance.pcm, mid, 0.08) * np.sqrt([p.end - p.start for p in vowels])
    score = score / (score.max() + 1e-9)
    out: list[tuple[float, float]] = []
    for k in np.argsort(-score):
        if score[k] < max(0.4, np.median(score)):
            break
        if all(abs(mid[k] - t) > 0.35 for t, _ in out):
            out.append((float(mid[k]), float(score[k])))
    return sorted(out)


def direct(utterance: Utterance, frames: int, seed: int, fps: int = 25,
           behaviour: Behaviour = Behaviour()) -> Track:
    """The motion of `frames` frames. The same arguments give the same bytes."""
    if frames < 1:
        raise ValueError("frames must be at least 1")
    b = behaviour
    mouth, head, eyes, brows = (np.random.default_rng([int(seed), k]) for k in range(4))
    rate = viseme_table()["rate_hz"]
    times = _grid(frames, fps, rate)
    frame_times = np.arange(frames) / fps

    def at_frames(x):
        x = np.asarray(x)
        cols = x.reshape(len(x), -1).T
        return np.stack([np.interp(frame_times, times, c) for c in cols], -1).reshape((frames,) + x.shape[1:])

    art = at_frames(articulate(utterance, times, mouth.uniform(*viseme_table()["speaker_gain"], 8)))
    units = arkit(art)

    pose = _ou(head, len(times), 1 / rate, b.head_sigma, b.head_tau)
    for t, strength in _stresses(utterance):
        if head.random() < 0.6:
            pose[:, 1] -= b.nod * strength * head.uniform(0.5, 1) * np.exp(-0.5 * ((times - t - 0.03) / 0.11) ** 2)
    sway = _ou(head, len(times), 1 / rate, (b.sway, b.sway * 0.6), b.head_tau * 1.5)
    sway[:, 1] -= pose[:, 1] * b.sway * 0.15

    gaze = _saccades(eyes, times, b)
    gaze = gaze - 0.5 * pose[:, :2]  # the eyes stay half on the camera while the head turns
    lid = _lids(eyes, times, fps, b)
    droop = 0.012 * np.clip(-gaze[:, 1], 0, 15)
    lid = np.clip(np.maximum(lid, droop + (1 - droop) * lid), 0, 1)
    wide = np.clip(0.012 * np.clip(gaze[:, 1], 0, 15) * (1 - lid), 0, 1)

    f0 = pitch(utterance.pcm, times)
    voiced = f0 > 0
    raised = np.zeros(len(times))
    if voiced.sum() > 5:
        octaves = np.where(voiced, np.log2(np.maximum(f0, 1) / np.median(f0[voiced])), 0.0)
        soft = smooth(np.where(voiced, np.clip(octaves, -0.5, 0.5), 0), 9) / np.maximum(smooth(voiced.astype(float), 9), 0.15)
        raised = b.brow * 1.6 * soft
    raised = smooth(raised, 6) + _ou(brows, len(times), 1 / rate, (0.05,), 2.0)[:, 0]
    smile = brows.uniform(*b.idle_smile)

    def put(name, x):
        k = ARKIT_UNITS.index(name)
        units[:, k] = np.clip(units[:, k] + x, 0, 1)

    lid, wide, raised, g = map(at_frames, (lid, wide, raised, gaze))
    for side, out in (("Left", 1), ("Right", -1)):
        put(f"eyeBlink{side}", lid)
        put(f"eyeWide{side}", wide)
        put(f"eyeLookOut{side}", np.clip(out * g[:, 0] / 30, 0, 1))
        put(f"eyeLookIn{side}", np.clip(-out * g[:, 0] / 30, 0, 1))
        put(f"eyeLookUp{side}", np.clip(g[:, 1] / 30, 0, 1))
        put(f"eyeLookDown{side}", np.clip(-g[:, 1] / 30, 0, 1))
        put(f"browOuterUp{side}", 0.6 * np.clip(raised, 0, 1))
        put(f"browDown{side}", 0.5 * np.clip(-raised, 0, 1))
        put(f"mouthSmile{side}", smile)
    put("browInnerUp", np.clip(raised, 0, 1))
    f32 = np.float32
    return Track(units.astype(f32), art.astype(f32), at_frames(pose).astype(f32),
                 at_frames(sway).astype(f32), g.astype(f32))
