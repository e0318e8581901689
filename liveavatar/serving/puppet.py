"""A live microphone as what the avatar says: phrases out of a stream that never ends, on the session's clock (CLK-5).

A phrase begins with sound and ends with silence, or when nothing comes any more. Silence between phrases is not said, so
whatever made the avatar late is made good there. The microphone's clock is another one than ours: where it runs away
within a phrase, 20 ms of a pause are dropped, or said twice. Speech itself is never touched. Pure: no clock, no task.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

LEAST_NOISE_DB = -60.0  # of full scale: no room is quieter
ABOVE_DB = 10.0  # over the noise of the room: what is above is sound
RISE_DB = 2.0  # a second by which that noise is taken to rise where there is no quieter moment; down it follows at once


@dataclass(frozen=True, kw_only=True)
class Phrasing:
    """All in seconds. onset: of sound that begins a phrase (a click is shorter). lead: said of what was before it. hangover: of
    silence that ends it. pause: of silence before something of it may be dropped or said twice. mend: how much at once. settle: after
    so long the way to the viewer is what it will be. slack: it may be longer or shorter by.
    """

    onset: float = 0.06
    lead: float = 0.2
    hangover: float = 0.6
    pause: float = 0.1
    mend: float = 0.02
    settle: float = 1.0
    slack: float = 0.04


class Puppet:
    """One microphone."""

    def __init__(self, phrasing: Phrasing = Phrasing()):
        self.phrasing = phrasing
        self._noise = LEAST_NOISE_DB
        self._open, self._lead, self._loud = False, deque[np.ndarray](), 0.0  # loud: seconds of sound before a phrase
        self._silent = self._paused = 0.0  # seconds of silence in a phrase; and since something of it was mended
        self._flowed, self._late, self._usual = 0.0, None, None  # seconds that were measured; way to the viewer, smoothed; the same at first

    def hear(self, pcm: np.ndarray, rate: int, waiting: float | None) -> tuple[np.ndarray, bool]:
        """int16 [n] at `rate` Hz, the next of the stream; none: nothing comes any more. waiting: seconds that were pushed and not
        yet heard, None while nothing is being heard. Returns what to push, int16 [m], and whether the phrase is over with it.
        """
        if not len(pcm):
            self._lead.clear()
            return pcm, self._end()
        seconds = len(pcm) / rate
        quiet = self._is_quiet(pcm, seconds)
        if not self._open:
            return self._before(pcm, rate, quiet), False
        self._silent = self._silent + seconds if quiet else 0.0
        self._paused = self._paused + seconds if quiet else 0.0
        if self._silent >= self.phrasing.hangover:
            return pcm, self._end()
        return self._in_step(pcm, rate, waiting), False

    def _end(self) -> bool:
        """Whether there was a phrase."""
        was, self._open, self._silent, self._paused, self._flowed, self._late, self._usual = self._open, False, 0.0, 0.0, 0.0, None, None
        return was

    def _before(self, pcm: np.ndarray, rate: int, quiet: bool) -> np.ndarray:
        self._lead.append(pcm)
        while len(self._lead) > 1 and sum(map(len, self._lead)) > (self.phrasing.lead + self.phrasing.onset) * rate:
            self._lead.popleft()
        self._loud = 0.0 if quiet else self._loud + len(pcm) / rate
        if self._loud < self.phrasing.onset:
            return pcm[:0]
        said, self._loud, self._open = np.concatenate(self._lead), 0.0, True
        self._lead.clear()
        return said

    def _is_quiet(self, pcm: np.ndarray, seconds: float) -> bool:
        level = 20 * np.log10(np.sqrt(np.mean(np.square(pcm, dtype=np.float64))) / 32768 + 1e-6)
        self._noise = max(LEAST_NOISE_DB, min(level, self._noise + RISE_DB * seconds))
        return level < self._noise + ABOVE_DB

    def _in_step(self, pcm: np.ndarray, rate: int, waiting: float | None) -> np.ndarray:
        """`pcm`, shortened or lengthened in a pause where the way to the viewer has become longer or shorter."""
        wanted, seconds = self.phrasing, len(pcm) / rate
        if waiting is None:
            return pcm
        self._late = waiting if self._late is None else self._late + (waiting - self._late) * min(1.0, seconds / wanted.settle)
        self._flowed += seconds
        if self._flowed < wanted.settle:
            return pcm
        self._usual = self._late if self._usual is None else self._usual
        off, some = self._late - self._usual, pcm[: round(wanted.mend * rate)]
        if self._paused < wanted.pause or abs(off) < wanted.slack:
            return pcm
        change = len(some) / rate * (-1 if off > 0 else 1)
        self._paused, self._late = 0.0, self._late + change
        return pcm[len(some) :] if change < 0 else np.concatenate([some, pcm])
