"""Mouth shapes: from phones in time to what the lips do, by the table visemes.yaml.

The generator of training pictures moves its heads by it, and evaluation predicts from speech what a mouth should do.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml

from liveavatar.conditioning.phones import PAUSE, Phone, Utterance
from liveavatar.core import SAMPLE_RATE

ARKIT_UNITS: tuple[str, ...] = (
    "eyeBlinkLeft", "eyeLookDownLeft", "eyeLookInLeft", "eyeLookOutLeft", "eyeLookUpLeft",
    "eyeSquintLeft", "eyeWideLeft", "eyeBlinkRight", "eyeLookDownRight", "eyeLookInRight",
    "eyeLookOutRight", "eyeLookUpRight", "eyeSquintRight", "eyeWideRight", "jawForward",
    "jawLeft", "jawRight", "jawOpen", "mouthClose", "mouthFunnel", "mouthPucker", "mouthLeft",
    "mouthRight", "mouthSmileLeft", "mouthSmileRight", "mouthFrownLeft", "mouthFrownRight",
    "mouthDimpleLeft", "mouthDimpleRight", "mouthStretchLeft", "mouthStretchRight",
    "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper", "mouthPressLeft",
    "mouthPressRight", "mouthLowerDownLeft", "mouthLowerDownRight", "mouthUpperUpLeft",
    "mouthUpperUpRight", "browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft",
    "browOuterUpRight", "cheekPuff", "cheekSquintLeft", "cheekSquintRight", "noseSneerLeft",
    "noseSneerRight", "tongueOut",
)  # fmt: skip
"""The 52 face units in ARKit order."""

ARTICULATORS = ("jaw", "close", "wide", "round", "upper", "lower", "roll", "tongue")
JAW, CLOSE, WIDE, ROUND, UPPER, LOWER, ROLL, TONGUE = range(8)


@lru_cache(maxsize=1)
def viseme_table() -> dict:
    """visemes.yaml with, per phone, its shape [8] and its dominance [8]."""
    data = yaml.safe_load((Path(__file__).parent / "visemes.yaml").read_text())
    shapes, doms = {}, {}
    for row in data["classes"].values():
        v = np.array(row["shape"], float)
        d = np.full(8, float(row["d"][1]))
        d[JAW] = row["d"][0]
        for name, b in data["boost"].items():
            k = ARTICULATORS.index(name)
            if v[k] >= b["at"]:
                d[k] *= b["times"]
        for p in row["phones"]:
            shapes[p], doms[p] = v, d
    return data | {"shapes": shapes, "dominance": doms}


def smooth(x: np.ndarray, sigma: float) -> np.ndarray:
    """Centred Gaussian along axis 0, sigma in samples, edge values held."""
    if sigma <= 0:
        return x
    r = int(np.ceil(4 * sigma))
    k = np.exp(-0.5 * (np.arange(-r, r + 1) / sigma) ** 2)
    k /= k.sum()
    pad = np.pad(x, [(r, r)] + [(0, 0)] * (x.ndim - 1), mode="edge")
    return np.stack([np.convolve(c, k, "valid") for c in pad.reshape(len(pad), -1).T], -1).reshape(x.shape)


def ramp(x, a, b):
    """0 up to a, 1 from b on, smooth between."""
    t = np.clip((np.asarray(x) - a) / (b - a), 0, 1)
    return t * t * (3 - 2 * t)


def loudness(pcm: np.ndarray, times: np.ndarray, window: float = 0.05) -> np.ndarray:
    """RMS [T] of pcm float32 [n] in a window centred on each time."""
    power = np.concatenate([[0.0], np.cumsum(np.asarray(pcm, float) ** 2)])
    a = np.clip(np.round((times - window / 2) * SAMPLE_RATE), 0, len(pcm)).astype(int)
    b = np.clip(np.round((times + window / 2) * SAMPLE_RATE), 0, len(pcm)).astype(int)
    return np.sqrt((power[b] - power[a]) / (window * SAMPLE_RATE))


def articulate(utterance: Utterance, times: np.ndarray, gains: np.ndarray | None = None) -> np.ndarray:
    """The eight articulators [T, 8] in 0..1 at `times`, seconds on the table's grid (rate_hz).

    gains: [8] how far this speaker goes with each; None: all 1. Everybody's lips meet, whatever the gain.
    """
    t = viseme_table()
    names, cover = _cover(utterance.phones, times)
    v = np.array([t["shapes"][p] for p in names])
    d = np.array([t["dominance"][p] for p in names])
    sigma = t["sigma_ms"] / 1000 * t["rate_hz"]
    a = smooth(cover @ (d * v), sigma) / smooth(cover @ d, sigma)
    speaking = (cover * np.array([p != PAUSE for p in names])).sum(1)
    a[:, [JAW, UPPER, LOWER]] *= _loudness_gain(utterance.pcm, times, speaking)[:, None]
    if gains is not None:
        gains = np.array(gains, float)
        gains[CLOSE] = 1.0
        a *= gains
    return np.clip(a, 0, 1)


def _cover(phones: tuple[Phone, ...], times: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names [P] of phones, glides apart, and the share [T, P] of every cell that each fills: no rounding of phone times."""
    t = viseme_table()
    spans, names = [], []
    for p in phones:
        glide = t["glides"].get(p.name)
        cut = p.start + t["glide_from"] * (p.end - p.start) if glide else p.end
        spans.append((p.start, cut)), names.append(p.name)
        if glide:
            spans.append((cut, p.end)), names.append(glide)
    end = spans[-1][1] if spans else 0.0
    spans.append((end, times[-1] + 1.0)), names.append(PAUSE)
    spans, half = np.array(spans), 0.5 / t["rate_hz"]
    first = np.maximum(times - half, 0.0)
    cover = np.minimum(times[:, None] + half, spans[:, 1]) - np.maximum(first[:, None], spans[:, 0])
    return names, np.clip(cover, 0, None) / (times + half - first)[:, None]


def _loudness_gain(pcm: np.ndarray, times: np.ndarray, speaking: np.ndarray) -> np.ndarray:
    """[T] how much wider or narrower the mouth opens for how loud it is; ones where nothing is spoken."""
    rms = loudness(pcm, times)
    voiced = rms[speaking > 0.5]
    if not len(voiced):
        return np.ones(len(times))
    lo, hi = viseme_table()["loudness"]
    return np.clip(lo + (1.1 - lo) * smooth(rms, 2.5) / (np.percentile(voiced, 75) + 1e-9), lo, hi)


def arkit(articulators: np.ndarray) -> np.ndarray:
    """Articulators [T, 8] to units [T, 52]; lips that seal stay sealed while the jaw hangs."""
    t = viseme_table()
    units = np.zeros((len(articulators), len(ARKIT_UNITS)), np.float64)

    def add(name, x):
        for n in (name[:-1] + "Left", name[:-1] + "Right") if name.endswith("+") else (name,):
            units[:, ARKIT_UNITS.index(n)] += x

    seal = ramp(articulators[:, CLOSE], t["seal"]["from"], t["seal"]["to"])
    for k, name in enumerate(ARTICULATORS):
        x = articulators[:, k]
        if k in (UPPER, LOWER):
            x = x * (1 - seal)
        if k == CLOSE:  # a resting mouth does not press
            x = x * seal
        for unit, gain in t["arkit"][name].items():
            add(unit, gain * x)
    jaw = units[:, ARKIT_UNITS.index("jawOpen")]
    rest = ramp(articulators[:, CLOSE], 0.2, 0.34) * ramp(articulators[:, JAW], 0.10, 0.04)
    add("mouthClose", jaw * np.maximum(seal, rest))
    return np.clip(units, 0, 1)


def lip_gap(units: np.ndarray) -> np.ndarray:
    """A scalar for tests: how far the lips are apart, about 0..1."""
    def u(name):
        return units[:, ARKIT_UNITS.index(name)]
    return np.clip(u("jawOpen") - u("mouthClose"), 0, 1) + 0.25 * u("mouthLowerDownLeft") + 0.1 * u("mouthUpperUpLeft")

def expected_mouth(utterance: Utterance, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a mouth that says this should do: (gap [T], width - rounding [T]), unitless, at any times in seconds."""
    rate = viseme_table()["rate_hz"]
    grid = np.arange(int(np.ceil(max(utterance.seconds, float(times[-1])) * rate)) + 2) / rate
    a = articulate(utterance, grid)
    return np.interp(times, grid, lip_gap(arkit(a))), np.interp(times, grid, a[:, WIDE] - a[:, ROUND])
