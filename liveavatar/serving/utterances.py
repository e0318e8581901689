"""The speech of one session: what was pushed and waits, which segment it belongs to, how much of it was heard.

Positions count 16 kHz samples of the session's speech, from 0, for its whole life. The engine is fed from a cursor, so
what it had when it died can be fed again; the 48 kHz sound is kept beside it, so that viewers hear what was pushed
and not what the model listens to. Pure bookkeeping: no clock, no task.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from liveavatar.core import SAMPLE_RATE
from liveavatar.runtime.intake import Intake, as_pcm
from liveavatar.serving.packets import SOUND_RATE, Mark
from liveavatar.serving.problems import BufferFull

UP = SOUND_RATE // SAMPLE_RATE


class Track:
    """Samples [base, total) of a stream, float32, in the pieces they came in."""

    def __init__(self):
        self.base = self.total = 0
        self._pieces: deque[np.ndarray] = deque()

    def append(self, samples: np.ndarray) -> None:
        """At the end."""
        if len(samples):
            self._pieces.append(samples)
            self.total += len(samples)

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start]; what is not there is silence."""
        out, at = np.zeros(stop - start, np.float32), self.base
        for piece in self._pieces:
            low, high = max(start, at), min(stop, at + len(piece))
            if low < high:
                out[low - start : high - start] = piece[low - at : high - at]
            at += len(piece)
            if at >= stop:
                break
        return out

    def forget(self, before: int) -> None:
        """Whole pieces that end at or before this position."""
        while self._pieces and self.base + len(self._pieces[0]) <= before:
            self.base += len(self._pieces.popleft())

    def cut(self, position: int) -> None:
        """Samples from `position` on are gone; further ones follow there, also beyond the present end."""
        if self.base <= position <= self.total:
            kept = self.read(self.base, position)
            self._pieces, self.total = deque([kept] if len(kept) else []), position
        else:
            self._pieces.clear()
            self.base = self.total = position


@dataclass
class Segment:
    """A run of speech the client named. start, stop: positions; stop is None while more may come."""

    number: int
    start: int
    stop: int | None = None
    started: bool = False


class Speech:
    """Pushed sound between client, engine and viewer. limit: seconds that may wait."""

    def __init__(self, limit: float):
        self.limit, self.cursor, self.heard = limit, 0, 0  # cursor: next sample for the engine; heard: the viewer heard up to here
        self.segments: deque[Segment] = deque()  # not yet finished, in order
        self._next_number, self._settled = 0, 0  # _settled: what lies before is whole
        self._low, self._high = Track(), Track()
        self._to_low, self._to_high = Intake(SAMPLE_RATE), Intake(SOUND_RATE)

    # ------------------------------------------------------------ from the client

    @property
    def total(self) -> int:
        """Position after the last pushed sample."""
        return self._low.total

    @property
    def waiting(self) -> float:
        """Seconds pushed and not yet heard."""
        return (self.total - self.heard) / SAMPLE_RATE

    def push(self, pcm, rate: int, segment: int | None = None, end: bool = False) -> None:
        """Append mono PCM [n], float in -1..1 or int16, at `rate` Hz, to a segment (None: the open one, or a new one).

        Raises BufferFull (nothing was taken), InputError.
        """
        pcm = as_pcm(pcm)
        if self.waiting + len(pcm) / max(1, rate) > self.limit:
            raise BufferFull(f"{self.waiting:.1f} s of speech wait, {self.limit:g} s is the limit: push slower, or interrupt")
        low, high = self._to_low.push(pcm, rate), self._to_high.push(pcm, rate)
        self._open(segment)
        self._low.append(low)
        self._high.append(high)
        if end:
            self.end()

    def _open(self, number: int | None) -> None:
        """The segment that takes what comes now; naming another one ends the open one."""
        last = self.segments[-1] if self.segments else None
        if last is not None and last.stop is None:
            if number is None or number == last.number:
                return
            self.end()
        number = self._next_number if number is None else number
        self._next_number = number + 1
        self.segments.append(Segment(number, self.total))

    def end(self) -> None:
        """The open segment is whole."""
        self._low.append(self._to_low.flush())
        self._high.append(self._to_high.flush())
        self._high.cut(min(self._high.total, UP * self.total))
        self._high.append(np.zeros(UP * self.total - self._high.total, np.float32))
        self._settled = self.total
        if self.segments and self.segments[-1].stop is None:
            self.segments[-1].stop = self.total

    def interrupt(self) -> list[Mark]:
        """Forget all that was not heard; what is pushed next follows at the cursor. Every open segment ends."""
        marks = [Mark("finished", s.number, self._heard_ms(s), interrupted=True) for s in self.segments]
        self.segments.clear()
        self._to_low, self._to_high = Intake(SAMPLE_RATE), Intake(SOUND_RATE)
        self._low.cut(self.cursor)
        self._high.cut(UP * self.cursor)
        self.heard = self._settled = self.cursor
        return marks

    def _heard_ms(self, segment: Segment) -> int:
        return 1000 * max(0, self.heard - segment.start) // SAMPLE_RATE if segment.started else 0

    @property
    def position_ms(self) -> int:
        """How much of the segment that is being spoken was heard; 0 between segments."""
        return self._heard_ms(self.segments[0]) if self.segments else 0

    # ------------------------------------------------------------ to the engine

    def take(self, samples: int) -> np.ndarray:
        """Up to so many samples from the cursor on, float32 at 16 kHz, and move it."""
        stop = min(self.total, self.cursor + samples)
        pcm = self._low.read(self.cursor, stop)
        self.cursor = stop
        return pcm

    @property
    def settled(self) -> bool:
        """The engine has all of a whole utterance: it need not wait for more."""
        return self.cursor == self.total == self._settled

    def rewind(self, position: int) -> None:
        """Feed from here again: the engine that had it is gone."""
        self.cursor = max(self._low.base, min(position, self.total))

    # ------------------------------------------------------------ to the viewer

    def sound(self, start: int, stop: int) -> np.ndarray:
        """int16 [3 * (stop - start)] at 48 kHz."""
        return np.rint(np.clip(self._high.read(UP * start, UP * stop), -1, 1) * 32767).astype(np.int16)

    def hear(self, start: int, stop: int) -> tuple[Mark, ...]:
        """The viewer hears [start, stop) now. Returns what began and ended with it; forgets what was heard."""
        self.heard = max(self.heard, stop)
        marks = []
        for segment in self.segments:
            if not segment.started and stop > segment.start:
                segment.started = True
                marks.append(Mark("started", segment.number))
        while self.segments and self.segments[0].stop is not None and self.heard >= self.segments[0].stop:
            segment = self.segments.popleft()
            marks.append(Mark("finished", segment.number, 1000 * (segment.stop - segment.start) // SAMPLE_RATE))
        self._low.forget(self.heard)
        self._high.forget(UP * self.heard)
        return tuple(marks)
