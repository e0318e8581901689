"""Do the lips meet at p, b and m, and stay apart at open vowels? Needs no reference video (evaluation.md 2.4)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from liveavatar.conditioning.phones import LIPS_MEET, WIDE_OPEN, Utterance
from liveavatar.evaluation.landmarks import Track
from liveavatar.evaluation.report import Measure, absent, bootstrap

BACKEND = "pocketsphinx phones; tracked gap"
WINDOW = 0.06  # seconds to either side of a phone's middle
OPENED = 0.023  # IOD above rest from which lips count as apart: .03 on a mesh that reads .007 on closed lips
REST_QUANTILE, MAX_REST = 5, 0.035  # of the video's own gap, per cent; no higher, or a mouth that never closes would be its own rest
MIN_EVENTS = 3
Z = 1.96
NAMES = {"closure": ("", "higher"), "false_closure": ("", "lower"), "closure_minus_false": ("", "higher"), "closure_lag_ms": ("ms", "target")}


def closure(track: Track, utterance: Utterance, source: str = "", language: str = "en") -> list[Measure]:
    """closure, false_closure, their difference, and the median lag of the narrowest moment behind the phone's middle.

    The tracker reads closed lips of small faces as .003 to .03 IOD apart, another value for each face: what it reads
    at this video's narrowest moments is taken off first.
    """
    if language != "en":
        return _absent(f"no phone map for language {language}")
    if not track.seen.any():
        return _absent("no face")
    gap, limit = lips(track)
    shut, lags = _events(track, gap, utterance, LIPS_MEET, limit)
    falsely, _ = _events(track, gap, utterance, WIDE_OPEN, limit)
    if len(shut) < MIN_EVENTS or len(falsely) < MIN_EVENTS:
        return _absent(f"too few phones: {len(shut)} of p b m, {len(falsely)} open vowels, {MIN_EVENTS} of each needed")
    found = {  # value, interval, n
        "closure": (shut.mean(), wilson(shut.mean(), len(shut)), len(shut)),
        "false_closure": (falsely.mean(), wilson(falsely.mean(), len(falsely)), len(falsely)),
        "closure_minus_false": (shut.mean() - falsely.mean(), _difference(shut, falsely), len(shut) + len(falsely)),
        "closure_lag_ms": (np.median(lags), bootstrap(lags, np.median), len(lags)),
    }
    return [Measure(name=name, value=float(value), unit=NAMES[name][0], better=NAMES[name][1], n=n, backend=BACKEND, reason=source,
                    interval=interval and (float(interval[0]), float(interval[1]))) for name, (value, interval, n) in found.items()]  # fmt: skip


def lips(track: Track) -> tuple[np.ndarray, float]:
    """([T] gap in eye distances, the limit below which lips count as closed) of a video that shows a face."""
    gap = track.gap if np.nanstd(track.gap) >= track.gap_floor else np.full_like(track.gap, np.nanmean(track.gap))  # jitter shuts no mouth
    return gap, min(float(np.nanpercentile(gap, REST_QUANTILE)), MAX_REST) + OPENED


def _absent(reason: str) -> list[Measure]:
    return [absent(name, reason, unit=unit, better=better, backend=BACKEND) for name, (unit, better) in NAMES.items()]


def _events(track: Track, gap: np.ndarray, utterance: Utterance, names: Iterable[str], limit: float) -> tuple[np.ndarray, np.ndarray]:
    """(closed float [n] 0 or 1, lag of the narrowest moment [n] ms) of every phone of `names` that is seen."""
    closed, lags = [], []
    for phone in utterance.phones:
        if phone.name not in names:
            continue
        middle = (phone.start + phone.end) / 2
        near = np.flatnonzero((np.abs(track.times - middle) <= WINDOW) & track.seen)
        if len(near):
            narrowest = near[np.argmin(gap[near])]
            closed.append(gap[narrowest] < limit)
            lags.append(1000 * (track.times[narrowest] - middle))
    return np.array(closed, float), np.array(lags, float)


def wilson(p: float, n: int) -> tuple[float, float]:
    """95 % interval of a share p of n events; unlike a bootstrap it does not claim certainty where all went well."""
    middle, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return (middle - half) / (1 + Z * Z / n), (middle + half) / (1 + Z * Z / n)


def _difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """95 % of mean(a) - mean(b) of two independent shares, from their Wilson intervals (Newcombe 1998, method 10)."""
    (p, q), (low_p, high_p), (low_q, high_q) = (a.mean(), b.mean()), wilson(a.mean(), len(a)), wilson(b.mean(), len(b))
    return p - q - math.hypot(p - low_p, high_q - q), p - q + math.hypot(high_p - p, q - low_q)
