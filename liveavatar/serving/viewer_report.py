"""What browsers tell of their reception every 5 s, believed no further than it can be true (MET-2).

A report holds figures of the browser's getStats(): counters since the connection began, the round trip, and by how much the sound
is played later than its picture (the difference of estimatedPlayoutTimestamp, soundLate). The differences to the report
before are clamped to what can happen in the time between, so that a viewer who lies bends a histogram a little and
breaks nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from liveavatar.core import FPS
from liveavatar.serving.metrics import Metrics
from liveavatar.serving.problems import Invalid, RateLimited

LEAST_SECONDS = 1.0  # between two reports of one viewer
JITTER_LIMIT, RTT_LIMIT, OFFSET_LIMIT = 10.0, 10.0, 10.0  # s
LARGEST = 2**53  # whole numbers of JavaScript
RATES = {"freezeCount": 2.0, "pliCount": 20.0, "nackCount": 1000.0, "packetsLost": 10_000.0, "framesDropped": 2.0 * FPS,
         "framesDecoded": 2.0 * FPS}  # most per second, of what is counted  # fmt: skip
SUMS = ("jitterBufferDelay", "jitterBufferEmittedCount")
SIGNED = ("packetsLost", "soundLate")  # may be below 0: RFC 3550; sound that comes before its picture
FIELDS = (*RATES, *SUMS, "roundTripTime", "soundLate")


@dataclass(frozen=True, kw_only=True)
class Reception:
    """What one report said of the time since the one before. None: not told. Seconds; the rest counts."""

    seconds: float
    jitter_buffer: float | None
    rtt: float | None
    sound_late: float | None
    counts: dict[str, int]

    @property
    def fps(self) -> float:
        """Pictures decoded per second."""
        return self.counts["framesDecoded"] / self.seconds


def numbers(report: object) -> dict[str, float]:
    """The fields of a report. Raises Invalid: no mapping, an unknown field, no finite number, one below 0 that is not SIGNED."""
    if not isinstance(report, Mapping):
        raise Invalid("a report is an object of figures of getStats()")
    for key, value in report.items():
        if key not in FIELDS:
            raise Invalid(f"{str(key)[:40]!r} is no field of a report; known: {', '.join(FIELDS)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or abs(value) > LARGEST:
            raise Invalid(f"{key}: must be a finite number")
        if value < 0 and key not in SIGNED:
            raise Invalid(f"{key}: must not be negative")
    return {key: float(value) for key, value in report.items()}


class Viewer:
    """The reports of one connection. begun: clock seconds at which it was made."""

    def __init__(self, metrics: Metrics, begun: float):
        self._metrics, self._before, self._at, self._last = metrics, {}, begun, None

    def take(self, report: object, now: float) -> Reception:
        """Check, clamp and count a report that came at `now`. Raises Invalid; RateLimited when it comes too soon."""
        told = numbers(report)
        if self._last is not None and now - self._last < LEAST_SECONDS:
            raise RateLimited(f"one report in {LEAST_SECONDS:g} s is enough")
        seconds = max(LEAST_SECONDS, now - self._at)
        counts = {key: round(self._grown(told, key, most * seconds)) for key, most in RATES.items()}
        seen = Reception(seconds=seconds, jitter_buffer=self._jitter(told), counts=counts,
                         rtt=min(told["roundTripTime"], RTT_LIMIT) if "roundTripTime" in told else None,
                         sound_late=max(-OFFSET_LIMIT, min(told["soundLate"], OFFSET_LIMIT)) if "soundLate" in told else None)  # fmt: skip
        self._before, self._at, self._last = {**self._before, **told}, now, now
        self._count(seen)
        return seen

    def _grown(self, told: Mapping[str, float], key: str, most: float) -> float:
        """How much a counter grew, 0..most; one that shrank began anew."""
        return min(most, max(0.0, told.get(key, 0.0) - self._before.get(key, 0.0)))

    def _jitter(self, told: Mapping[str, float]) -> float | None:
        """Mean seconds in the buffer of what left it since the last report."""
        delay, emitted = (self._grown(told, key, LARGEST) for key in SUMS)
        return min(JITTER_LIMIT, delay / emitted) if emitted else None

    def _count(self, seen: Reception) -> None:
        if seen.jitter_buffer is not None:
            self._metrics.observe("webrtc_jitter_buffer_seconds", seen.jitter_buffer, "webrtc")
        if seen.sound_late is not None:
            self._metrics.observe("webrtc_av_offset_seconds", seen.sound_late, "webrtc")
        if seen.rtt is not None:
            self._metrics.observe("webrtc_rtt_seconds", seen.rtt, "webrtc")
        for name, key in (("freezes", "freezeCount"), ("pli", "pliCount"), ("packets_lost", "packetsLost")):
            self._metrics.count(f"webrtc_{name}_total", seen.counts[key], "webrtc")
